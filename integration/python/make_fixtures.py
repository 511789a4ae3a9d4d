#!/usr/bin/env python3
"""Make the small checkpoints under fixtures/variants and their golden outputs.

Each variant has what real checkpoints have and plain ones lack: tied embeddings, other dtypes,
shards, sliding windows, rope scaling, biases, dense layers among sparse ones, odd sizes, clipping.
Weights are random and seeded; a tensor's values depend only on (variant, tensor, seed), so adding
a variant changes no other. Golden outputs are computed by HF transformers: f32, eager attention,
no cache.

    pip install numpy safetensors tokenizers torch transformers
    python make_fixtures.py [--only NAME ...] [--out DIR]
"""

import argparse
import hashlib
import json
import pathlib
import shutil
import tempfile

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

TREE = pathlib.Path(__file__).resolve().parents[2]
CORPUS = TREE / "models/demo/shakespeare.txt"
SEED = 1
NEW_TOKENS = 24
PROMPTS = [
    "I",
    "ROMEO:\nBut soft",
    "caf\u00e9 \u4f60\u597d 0123",
    # More than 100 tokens in every variant's tokenizer: longer than any sliding window here, and
    # than the original context of every scaled rope.
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n"
    "First Citizen:\nYou are all resolved rather to die than to famish?\n",
]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# --------------------------------------------------------------------------
# architectures: hub-style config + a table  name -> (shape, kind)
# --------------------------------------------------------------------------
def ends(t, hidden, vocab, tied):
    # A random tied embedding of the usual size would only ever predict the token it was given.
    # A small one leaves the residual stream to the layers; the final norm makes up for it.
    t["model.embed_tokens.weight"] = ((vocab, hidden), "tied" if tied else "embed")
    t["model.norm.weight"] = ((hidden,), "big_norm" if tied else "norm")
    if not tied:
        t["lm_head.weight"] = ((vocab, hidden), "head")


def attention(t, p, hidden, heads, kv, head_dim, bias=False):
    for name, (rows, cols) in {
        "q": (heads * head_dim, hidden), "k": (kv * head_dim, hidden),
        "v": (kv * head_dim, hidden), "o": (hidden, heads * head_dim),
    }.items():
        t[f"{p}{name}_proj.weight"] = ((rows, cols), "w")
        if bias:
            t[f"{p}{name}_proj.bias"] = ((rows,), "bias")


def gated(t, p, hidden, inter, names):
    gate, up, down = names
    t[f"{p}{gate}.weight"] = ((inter, hidden), "w")
    t[f"{p}{up}.weight"] = ((inter, hidden), "w")
    t[f"{p}{down}.weight"] = ((hidden, inter), "w")


def mixtral(cfg):
    """Fills in what every Mixtral config has; returns it with its tensor table."""
    cfg = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu",
           "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 512,
           "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None,
           "tie_word_embeddings": False, "torch_dtype": "bfloat16"} | cfg
    h, heads = cfg["hidden_size"], cfg["num_attention_heads"]
    t = {}
    ends(t, h, cfg["vocab_size"], cfg["tie_word_embeddings"])
    for i in range(cfg["num_hidden_layers"]):
        p = f"model.layers.{i}."
        t[p + "input_layernorm.weight"] = t[p + "post_attention_layernorm.weight"] = ((h,), "norm")
        attention(t, p + "self_attn.", h, heads, cfg["num_key_value_heads"],
                  cfg.get("head_dim", h // heads))
        t[p + "block_sparse_moe.gate.weight"] = ((cfg["num_local_experts"], h), "router")
        for e in range(cfg["num_local_experts"]):
            gated(t, f"{p}block_sparse_moe.experts.{e}.", h, cfg["intermediate_size"], ("w1", "w3", "w2"))
    return cfg, t


def qwen3_moe(cfg):
    cfg = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_act": "silu",
           "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 256,
           "rms_norm_eps": 1e-6, "rope_theta": 1e6, "rope_scaling": None, "attention_bias": False,
           "sliding_window": None, "use_sliding_window": False, "decoder_sparse_step": 1,
           "mlp_only_layers": [], "tie_word_embeddings": False, "torch_dtype": "bfloat16"} | cfg
    h, hd, t = cfg["hidden_size"], cfg["head_dim"], {}
    ends(t, h, cfg["vocab_size"], cfg["tie_word_embeddings"])
    names = ("gate_proj", "up_proj", "down_proj")
    for i in range(cfg["num_hidden_layers"]):
        p = f"model.layers.{i}."
        t[p + "input_layernorm.weight"] = t[p + "post_attention_layernorm.weight"] = ((h,), "norm")
        attention(t, p + "self_attn.", h, cfg["num_attention_heads"], cfg["num_key_value_heads"], hd,
                  cfg["attention_bias"])
        t[p + "self_attn.q_norm.weight"] = t[p + "self_attn.k_norm.weight"] = ((hd,), "norm")
        if i in cfg["mlp_only_layers"]:
            gated(t, p + "mlp.", h, cfg["intermediate_size"], names)
            continue
        t[p + "mlp.gate.weight"] = ((cfg["num_experts"], h), "router")
        for e in range(cfg["num_experts"]):
            gated(t, f"{p}mlp.experts.{e}.", h, cfg["moe_intermediate_size"], names)
    return cfg, t


def dbrx(cfg):
    cfg = {"architectures": ["DbrxForCausalLM"], "model_type": "dbrx", "bos_token_id": 1,
           "eos_token_id": 2, "emb_pdrop": 0.0, "resid_pdrop": 0.0, "max_seq_len": 512,
           "tie_word_embeddings": False, "torch_dtype": "bfloat16"} | cfg
    h, vocab, ffn = cfg["d_model"], cfg["vocab_size"], cfg["ffn_config"]
    kv = cfg["attn_config"]["kv_n_heads"] * (h // cfg["n_heads"])
    rows = ffn["moe_num_experts"] * ffn["ffn_hidden_size"]
    t = {"transformer.wte.weight": ((vocab, h), "embed"), "transformer.norm_f.weight": ((h,), "norm"),
         "lm_head.weight": ((vocab, h), "head")}
    for i in range(cfg["n_layers"]):
        p = f"transformer.blocks.{i}."
        t[p + "norm_attn_norm.norm_1.weight"] = t[p + "norm_attn_norm.norm_2.weight"] = ((h,), "norm")
        # q, k and v with a deviation of 2, so that clip_qkv = 2 clips a third of them
        t[p + "norm_attn_norm.attn.Wqkv.weight"] = ((h + 2 * kv, h), ("w", h / 4))
        t[p + "norm_attn_norm.attn.out_proj.weight"] = ((h, h), "w")
        t[p + "ffn.router.layer.weight"] = ((ffn["moe_num_experts"], h), "router")
        for name in ("w1", "v1", "w2"):
            t[p + f"ffn.experts.mlp.{name}"] = (
                (rows, h), ("w", ffn["ffn_hidden_size"]) if name == "w2" else "w")
    return cfg, t


# --------------------------------------------------------------------------
# the variants.  shards: weight files; index: whether an index names them;
# tokens: tokenizer size where smaller than vocab_size; resave: let transformers write the
# directory; override: what transformers must be told to read the config as its authors meant it
# --------------------------------------------------------------------------
VARIANTS = {
    "mixtral-tied-top1-f16": dict(
        model=lambda: mixtral(dict(
            vocab_size=288, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=3,
            num_experts_per_tok=1, tie_word_embeddings=True, torch_dtype="float16")),
        shards=3),
    "mixtral-window-top3-f32": dict(
        model=lambda: mixtral(dict(
            vocab_size=272, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, num_local_experts=5,
            num_experts_per_tok=3, sliding_window=16, torch_dtype="float32"))),
    "qwen3moe-yarn-bias-dense": dict(
        model=lambda: qwen3_moe(dict(
            vocab_size=288, hidden_size=32, intermediate_size=80, moe_intermediate_size=24,
            num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            num_experts=6, num_experts_per_tok=2, norm_topk_prob=False, mlp_only_layers=[1],
            attention_bias=True, rope_scaling={
                "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64})),
        shards=2, index=False, tokens=280),
    "qwen3moe-v5-llama3": dict(
        model=lambda: qwen3_moe(dict(
            vocab_size=283, hidden_size=40, intermediate_size=72, moe_intermediate_size=24,
            num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1, head_dim=16,
            num_experts=7, num_experts_per_tok=3, norm_topk_prob=True, tie_word_embeddings=True,
            rope_theta=10000.0, rope_scaling={
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 32})),
        resave=True),
    "dbrx-clip-top4": dict(
        model=lambda: dbrx(dict(
            vocab_size=272, d_model=48, n_heads=6, n_layers=2,
            attn_config={"clip_qkv": 2, "kv_n_heads": 3, "rope_theta": 500000, "model_type": ""},
            ffn_config={"ffn_hidden_size": 32, "moe_num_experts": 6, "moe_top_k": 4,
                        "moe_jitter_eps": 0.01, "moe_loss_weight": 0.05, "model_type": ""})),
        # transformers 5.23 does not read attn_config.rope_theta and would use 10000
        override={"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
}


def values(variant, name, shape, kind, dtype):
    digest = hashlib.sha256(f"{SEED}/{variant}/{name}".encode()).digest()
    x = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    x = x.standard_normal(shape, dtype=np.float32)
    fan_in = shape[-1]
    if isinstance(kind, tuple):
        kind, fan_in = kind
    scale = {  # deviations: routers wide enough that top-k gaps exceed rounding, logits of about 3
        "embed": 1.0, "w": fan_in**-0.5, "router": 2.0 * fan_in**-0.5, "head": 3.0 * fan_in**-0.5,
        "tied": 0.3 * fan_in**-0.5, "bias": 0.3, "norm": 0.1, "big_norm": 1.0,
    }[kind]
    mean = {"norm": 1.0, "big_norm": 10.0}.get(kind, 0.0)
    return torch.from_numpy(scale * x + mean).to(dtype)


def make_tokenizer(size):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        CORPUS.read_text().splitlines(keepends=True),
        trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIALS, show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    assert tok.get_vocab_size() == size, tok.get_vocab_size()
    return tok


def dump(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")


def save(path, tensors):
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)


def shard(tensors, n):
    """{file name: tensors}, cut where the hub's tools would: by size, in order."""
    if n == 1:
        return {"model.safetensors": tensors}
    size = lambda t: t.numel() * t.element_size()
    limit, done = sum(map(size, tensors.values())) / n, 0
    files = {f"model-{i:05}-of-{n:05}.safetensors": {} for i in range(1, n + 1)}
    for name, tensor in tensors.items():
        list(files.values())[min(int(done / limit), n - 1)][name] = tensor
        done += size(tensor)
    return files


def write_index(d, files):
    dump(d / "model.safetensors.index.json", {
        "metadata": {"total_size": sum(
            t.numel() * t.element_size() for ts in files.values() for t in ts.values())},
        "weight_map": {name: file for file, ts in files.items() for name in ts},
    })


def write(variant, d):
    """The model directory; returns the files that hold its weights."""
    spec = VARIANTS[variant]
    cfg, table = spec["model"]()
    shutil.rmtree(d, ignore_errors=True)
    d.mkdir(parents=True)
    tok = make_tokenizer(spec.get("tokens", cfg["vocab_size"]))
    dtype = DTYPES[cfg["torch_dtype"]]
    tensors = {n: values(variant, n, s, k, dtype) for n, (s, k) in table.items()}
    if "lm_head.weight" in tensors:  # rows of padded vocabulary are never the best
        tensors["lm_head.weight"][tok.get_vocab_size():] = 0
    files = shard(tensors, spec.get("shards", 1))
    for file, part in files.items():
        save(d / file, part)
    if len(files) > 1 and spec.get("index", True):
        write_index(d, files)
    dump(d / "config.json", cfg)
    dump(d / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False})
    if spec.get("resave"):
        model = AutoModelForCausalLM.from_pretrained(d, dtype=dtype)
        for old in d.iterdir():
            old.unlink()
        model.save_pretrained(d)
        files = {f.name: load_file(f) for f in sorted(d.glob("*.safetensors"))}
        (d / "model.safetensors").chmod(0o644)
    tok.save(str(d / "tokenizer.json"))
    dump(d / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>",
        "eos_token": "</s>", "add_bos_token": False, "clean_up_tokenization_spaces": False,
        "model_max_length": cfg.get("max_seq_len", cfg.get("max_position_embeddings")),
        "chat_template": CHATML,
    })
    return files


def load(variant, d, files):
    """The reference model. Without an index transformers refuses shards (vLLM and Volley do not),
    so it is given a copy that has one."""
    spec = VARIANTS[variant]
    with tempfile.TemporaryDirectory() as tmp:
        copy = pathlib.Path(shutil.copytree(d, pathlib.Path(tmp) / variant))
        if len(files) > 1:
            write_index(copy, files)
        config = AutoConfig.from_pretrained(copy)
        for key, value in spec.get("override", {}).items():
            setattr(config, key, value)
        model, info = AutoModelForCausalLM.from_pretrained(
            copy, config=config, dtype=torch.float32, output_loading_info=True,
            attn_implementation="eager", experts_implementation="eager")
    bad = {k: v for k, v in info.items() if v}
    assert not bad, f"{variant}: load problems {bad}"
    return model.eval()


def golden(variant, d, files, out):
    """Logits at every position of the prompt, the experts and weights chosen there (numbered by
    MoE layer: dense layers are not counted), and the greedy continuation."""
    model = load(variant, d, files)
    tok = Tokenizer.from_file(str(d / "tokenizer.json"))
    routes, clipped, arrays, records = [], [], {}, []
    for m in model.modules():
        if type(m).__name__.endswith("Experts"):
            m.register_forward_pre_hook(
                lambda _m, a, kw: routes.append(tuple(list(a) + list(kw.values()))[1:3]),
                with_kwargs=True)
        if clip := getattr(m, "clip_qkv", None):
            m.Wqkv.register_forward_hook(
                lambda _m, _a, y, c=clip: clipped.append((y.abs() > c).float().mean().item()))
    for i, text in enumerate(PROMPTS):
        ids = tok.encode(text, add_special_tokens=False).ids
        seq, gaps = list(ids), []
        with torch.no_grad():
            for step in range(NEW_TOKENS):
                routes.clear()
                logits = model(torch.tensor([seq]), use_cache=False).logits[0]
                if step == 0:
                    arrays[f"logits.{i}"] = logits.contiguous()
                    for layer, (chosen, weights) in enumerate(routes):
                        arrays[f"expert_ids.{i}.{layer}"] = chosen.to(torch.int32).contiguous()
                        arrays[f"expert_weights.{i}.{layer}"] = weights.float().contiguous()
                top = logits[-1].topk(2)
                gaps.append(float(top.values[0] - top.values[1]))
                seq.append(int(top.indices[0]))
        records.append({"prompt": text, "prompt_ids": ids, "greedy_ids": seq[len(ids):],
                        "top2_gaps": [round(g, 5) for g in gaps]})
        print(f"  prompt {i}: {len(ids)} ids, smallest top-2 logit gap {min(gaps):.4f}")
    assert len(records[-1]["prompt_ids"]) > 100
    if clipped:
        print(f"  {100 * sum(clipped) / len(clipped):.0f} % of q, k, v clipped")
    out.mkdir(parents=True, exist_ok=True)
    save(out / f"{variant}.safetensors", arrays)
    dump(out / f"{variant}.json", records)


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--out", type=pathlib.Path, default=TREE / "integration/fixtures/variants")
    ap.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    args = ap.parse_args()
    torch.set_num_threads(1)
    for variant in args.only:
        files = write(variant, args.out / variant)
        size = sum(f.stat().st_size for f in (args.out / variant).iterdir())
        print(f"{variant}: {sum(map(len, files.values()))} tensors in {len(files)} files, {size / 1e3:.0f} kB")
        golden(variant, args.out / variant, files, args.out / "golden")


if __name__ == "__main__":
    main()
