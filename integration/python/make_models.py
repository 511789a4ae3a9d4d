#!/usr/bin/env python3
"""Make small, seeded, random-initialised MoE checkpoints in Hugging Face layout.

Every model directory holds config.json, generation_config.json,
model.safetensors (bf16, the tensor names used on the hub), tokenizer.json,
tokenizer_config.json.  With --golden, OUT/golden/NAME.json and NAME.safetensors
hold f32 reference logits, expert choices and greedy continuations computed by
HF transformers (kept out of the model directory: vLLM loads every *.safetensors
it finds there).

A tensor's values depend only on (model name, tensor name, --seed): each tensor
gets its own PCG64 stream, so adding a tensor or a model changes no other.
Needs numpy, safetensors, tokenizers, torch; --golden also needs transformers.

    pip install numpy safetensors tokenizers torch transformers
    python make_models.py --out DIR [--only NAME ...] [--seed N] [--golden]

The tiny-* models are for correctness, the mid-* ones (0.8 and 1.3 GB) for speed.
"""

import argparse
import hashlib
import json
import pathlib

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

# --------------------------------------------------------------------------
# tokenizer: byte-level BPE (GPT-2 split), trained on the demo model's corpus
# --------------------------------------------------------------------------
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
BOS, EOS = 1, 2
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


CORPUS = pathlib.Path(__file__).parent.parent.parent / "models" / "demo" / "shakespeare.txt"


def make_tokenizer(vocab_size):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        CORPUS.read_text().splitlines(keepends=True),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    assert tok.get_vocab_size() == vocab_size, tok.get_vocab_size()
    return tok


# --------------------------------------------------------------------------
# architectures: config.json in hub style + a table  name -> (shape, kind)
# kinds: w = linear, N(0, 1/fan_in); embed; head; router; norm = 1 + 0.1 N; bias
# --------------------------------------------------------------------------
def common(arch, model_type, vocab):
    return {
        "architectures": [arch],
        "model_type": model_type,
        "vocab_size": vocab,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "attention_dropout": 0.0,
    }


def gqa(t, p, h, heads, kv, hd):
    t[p + "q_proj.weight"] = ((heads * hd, h), "w")
    t[p + "k_proj.weight"] = ((kv * hd, h), "w")
    t[p + "v_proj.weight"] = ((kv * hd, h), "w")
    t[p + "o_proj.weight"] = ((h, heads * hd), "w")


def swiglu(t, p, h, inter, names=("gate_proj", "up_proj", "down_proj")):
    t[f"{p}{names[0]}.weight"] = ((inter, h), "w")
    t[f"{p}{names[1]}.weight"] = ((inter, h), "w")
    t[f"{p}{names[2]}.weight"] = ((h, inter), "w")


def ends(t, h, vocab):
    t["model.embed_tokens.weight"] = ((vocab, h), "embed")
    t["model.norm.weight"] = ((h,), "norm")
    t["lm_head.weight"] = ((vocab, h), "head")


def layer_norms(t, p, h):
    t[p + "input_layernorm.weight"] = ((h,), "norm")
    t[p + "post_attention_layernorm.weight"] = ((h,), "norm")


def mixtral(vocab, hidden, layers, heads, kv, inter, experts, topk):
    cfg = common("MixtralForCausalLM", "mixtral", vocab) | {
        "hidden_size": hidden, "intermediate_size": inter, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv,
        "num_local_experts": experts, "num_experts_per_tok": topk,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0,
        "sliding_window": None, "output_router_logits": False, "router_aux_loss_coef": 0.02,
    }
    t = {}
    ends(t, hidden, vocab)
    for i in range(layers):
        p = f"model.layers.{i}."
        layer_norms(t, p, hidden)
        gqa(t, p + "self_attn.", hidden, heads, kv, hidden // heads)
        t[p + "block_sparse_moe.gate.weight"] = ((experts, hidden), "router")
        for e in range(experts):
            swiglu(t, f"{p}block_sparse_moe.experts.{e}.", hidden, inter, ("w1", "w3", "w2"))
    return cfg, t


def qwen3_moe(vocab, hidden, layers, heads, kv, head_dim, inter, experts, topk):
    cfg = common("Qwen3MoeForCausalLM", "qwen3_moe", vocab) | {
        "hidden_size": hidden, "intermediate_size": inter * topk, "moe_intermediate_size": inter,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv,
        "head_dim": head_dim, "num_experts": experts, "num_experts_per_tok": topk,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "max_position_embeddings": 8192, "max_window_layers": layers, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "rope_scaling": None, "attention_bias": False,
        "sliding_window": None, "use_sliding_window": False,
        "output_router_logits": False, "router_aux_loss_coef": 0.001,
    }
    t = {}
    ends(t, hidden, vocab)
    for i in range(layers):
        p = f"model.layers.{i}."
        layer_norms(t, p, hidden)
        gqa(t, p + "self_attn.", hidden, heads, kv, head_dim)
        t[p + "self_attn.q_norm.weight"] = ((head_dim,), "norm")
        t[p + "self_attn.k_norm.weight"] = ((head_dim,), "norm")
        t[p + "mlp.gate.weight"] = ((experts, hidden), "router")
        for e in range(experts):
            swiglu(t, f"{p}mlp.experts.{e}.", hidden, inter)
    return cfg, t


def deepseek(version, vocab, hidden, layers, heads, dense_inter, inter, experts, topk, shared,
             kv_lora, q_lora, nope, rope, v_dim, n_group=1, topk_group=1):
    v3 = version == 3
    cfg = common(f"DeepseekV{version}ForCausalLM", f"deepseek_v{version}", vocab) | {
        "hidden_size": hidden, "intermediate_size": dense_inter, "moe_intermediate_size": inter,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        "n_routed_experts": experts, "n_shared_experts": shared, "num_experts_per_tok": topk,
        "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "kv_lora_rank": kv_lora, "q_lora_rank": q_lora, "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope, "v_head_dim": v_dim,
        "n_group": n_group, "topk_group": topk_group,
        "topk_method": "noaux_tc" if v3 else "greedy",
        "scoring_func": "sigmoid" if v3 else "softmax",
        "norm_topk_prob": v3, "routed_scaling_factor": 2.5 if v3 else 1.0,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "rope_scaling": None, "attention_bias": False,
    }
    if v3:
        cfg["num_nextn_predict_layers"] = 0
    t = {}
    ends(t, hidden, vocab)
    for i in range(layers):
        p = f"model.layers.{i}."
        a = p + "self_attn."
        layer_norms(t, p, hidden)
        if q_lora:
            t[a + "q_a_proj.weight"] = ((q_lora, hidden), "w")
            t[a + "q_a_layernorm.weight"] = ((q_lora,), "norm")
            t[a + "q_b_proj.weight"] = ((heads * (nope + rope), q_lora), "w")
        else:
            t[a + "q_proj.weight"] = ((heads * (nope + rope), hidden), "w")
        t[a + "kv_a_proj_with_mqa.weight"] = ((kv_lora + rope, hidden), "w")
        t[a + "kv_a_layernorm.weight"] = ((kv_lora,), "norm")
        t[a + "kv_b_proj.weight"] = ((heads * (nope + v_dim), kv_lora), "w")
        t[a + "o_proj.weight"] = ((hidden, heads * v_dim), "w")
        if i == 0:
            swiglu(t, p + "mlp.", hidden, dense_inter)
            continue
        t[p + "mlp.gate.weight"] = ((experts, hidden), "router")
        if v3:
            t[p + "mlp.gate.e_score_correction_bias"] = ((experts,), "bias")
        swiglu(t, p + "mlp.shared_experts.", hidden, inter * shared)
        for e in range(experts):
            swiglu(t, f"{p}mlp.experts.{e}.", hidden, inter)
    return cfg, t


def dbrx(vocab, hidden, layers, heads, kv, inter, experts, topk):
    cfg = {
        "architectures": ["DbrxForCausalLM"], "model_type": "dbrx", "vocab_size": vocab,
        "bos_token_id": BOS, "eos_token_id": EOS,
        "d_model": hidden, "n_heads": heads, "n_layers": layers, "max_seq_len": 8192,
        "attn_config": {"clip_qkv": 8, "kv_n_heads": kv, "rope_theta": 500000, "model_type": ""},
        # transformers 5.23 does not read attn_config.rope_theta and would use 10000
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "ffn_config": {"ffn_hidden_size": inter, "moe_num_experts": experts, "moe_top_k": topk,
                       "moe_jitter_eps": 0.0, "moe_loss_weight": 0.05, "model_type": ""},
        "emb_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.02,
        "output_router_logits": False, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_cache": True,
    }
    hd = hidden // heads
    t = {
        "transformer.wte.weight": ((vocab, hidden), "embed"),
        "transformer.norm_f.weight": ((hidden,), "norm"),
        "lm_head.weight": ((vocab, hidden), "head"),
    }
    for i in range(layers):
        p = f"transformer.blocks.{i}."
        t[p + "norm_attn_norm.norm_1.weight"] = ((hidden,), "norm")
        t[p + "norm_attn_norm.norm_2.weight"] = ((hidden,), "norm")
        t[p + "norm_attn_norm.attn.Wqkv.weight"] = ((hidden + 2 * kv * hd, hidden), "w")
        t[p + "norm_attn_norm.attn.out_proj.weight"] = ((hidden, hidden), "w")
        t[p + "ffn.router.layer.weight"] = ((experts, hidden), "router")
        for n in ("w1", "v1", "w2"):  # w1, v1: [e*inter, h] applied as x @ w.T;  w2: x @ w
            t[p + f"ffn.experts.mlp.{n}"] = (
                (experts * inter, hidden), ("w", inter) if n == "w2" else "w")
    return cfg, t


SPECS = {
    # for correctness; head_dim 32 is the smallest that vLLM on a CPU accepts
    "tiny-mixtral": lambda: mixtral(512, 128, 2, 4, 2, 96, 4, 2),
    "tiny-qwen3moe": lambda: qwen3_moe(512, 64, 2, 4, 2, 32, 32, 16, 4),
    "tiny-deepseek-v2": lambda: deepseek(2, 512, 64, 3, 4, 128, 32, 8, 2, 2, 32, 48, 16, 8, 16),
    "tiny-deepseek-v2-lite": lambda: deepseek(2, 512, 64, 3, 4, 128, 32, 8, 2, 2, 32, None, 16, 8, 16),
    "tiny-deepseek-v3": lambda: deepseek(3, 512, 64, 3, 4, 128, 32, 8, 2, 1, 32, 48, 16, 8, 16, 4, 2),
    "tiny-dbrx": lambda: dbrx(512, 128, 2, 4, 2, 96, 4, 2),
    # for speed
    "mid-mixtral": lambda: mixtral(8192, 1024, 8, 16, 4, 1792, 8, 2),
    "mid-qwen3moe": lambda: qwen3_moe(8192, 768, 8, 12, 4, 64, 256, 128, 8),
}


def values(model, name, shape, kind, seed):
    digest = hashlib.sha256(f"{seed}/{model}/{name}".encode()).digest()
    x = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))
    x = x.standard_normal(shape, dtype=np.float32)
    fan_in = shape[-1]
    if isinstance(kind, tuple):
        kind, fan_in = kind
    if kind == "norm":
        x = 1.0 + 0.1 * x
    elif kind == "bias":
        x *= 0.1
    elif kind == "embed":
        pass
    elif kind == "router":  # wide enough that top-k gaps exceed bf16 noise
        x *= 2.0 / np.sqrt(fan_in)
    elif kind == "head":  # logits with a standard deviation of about 3
        x *= 3.0 / np.sqrt(fan_in)
    elif kind == "w":
        x /= np.sqrt(fan_in)
    else:
        raise ValueError(kind)
    return torch.from_numpy(x).to(torch.bfloat16)


def write_model(name, out, seed, tokenizers):
    cfg, table = SPECS[name]()
    d = out / name
    d.mkdir(parents=True, exist_ok=True)
    tensors = {n: values(name, n, s, k, seed) for n, (s, k) in table.items()}
    save_file(tensors, d / "model.safetensors", metadata={"format": "pt"})
    (d / "model.safetensors").chmod(0o644)
    vocab = cfg["vocab_size"]
    if vocab not in tokenizers:
        tokenizers[vocab] = make_tokenizer(vocab)
    tokenizers[vocab].save(str(d / "tokenizer.json"))
    dump = lambda f, o: (d / f).write_text(json.dumps(o, indent=2) + "\n")
    dump("config.json", cfg)
    dump("generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS, "do_sample": False})
    dump("tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": SPECIALS[0],
        "bos_token": SPECIALS[BOS], "eos_token": SPECIALS[EOS], "add_bos_token": False,
        "clean_up_tokenization_spaces": False, "model_max_length": 8192,
        "chat_template": CHATML,
    })
    total = sum(t.numel() for t in tensors.values())
    experts = sum(t.numel() for n, t in tensors.items() if ".experts." in n)
    print(f"{name}: {total / 1e6:.2f} M params ({experts / 1e6:.2f} M in routed experts), "
          f"{(d / 'model.safetensors').stat().st_size / 2**20:.1f} MiB")


# --------------------------------------------------------------------------
# golden outputs from HF transformers, f32 compute on the bf16 weights
# --------------------------------------------------------------------------
PROMPTS = [
    "ROMEO:\n",
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\n",
    "The quick brown fox jumps over the lazy dog. 0123456789 \u00e9\u00fc\u4f60\u597d",
    "return",
]


def golden(name, out, new_tokens=32):
    from transformers import AutoModelForCausalLM
    d = out / name
    tok = Tokenizer.from_file(str(d / "tokenizer.json"))
    model, info = AutoModelForCausalLM.from_pretrained(
        d, dtype=torch.float32, output_loading_info=True, attn_implementation="eager",
        experts_implementation="eager")
    bad = {k: v for k, v in info.items() if v}
    assert not bad, f"{name}: load problems {bad}"
    model.eval()
    routes = []  # (expert ids, weights) of each MoE layer of the last forward
    for m in model.modules():
        if type(m).__name__.endswith("Experts"):
            m.register_forward_pre_hook(
                lambda _m, a, kw: routes.append(tuple(list(a) + list(kw.values()))[1:3]), with_kwargs=True)
    arrays, records = {}, []
    for i, text in enumerate(PROMPTS):
        ids = tok.encode(text, add_special_tokens=False).ids
        seq, gaps = list(ids), []
        with torch.no_grad():
            for step in range(new_tokens):  # full recompute: no cache code in the reference
                routes.clear()
                logits = model(torch.tensor([seq]), use_cache=False).logits[0]
                if step == 0:
                    arrays[f"logits.{i}"] = logits.contiguous()
                    for layer, (idx, w) in enumerate(routes):
                        arrays[f"expert_ids.{i}.{layer}"] = idx.to(torch.int32).contiguous()
                        arrays[f"expert_weights.{i}.{layer}"] = w.float().contiguous()
                top = logits[-1].topk(2)
                gaps.append(float(top.values[0] - top.values[1]))
                seq.append(int(top.indices[0]))
        records.append({"prompt": text, "prompt_ids": ids, "greedy_ids": seq[len(ids):],
                        "top2_gaps": [round(g, 5) for g in gaps]})
        print(f"  {name} prompt {i}: {len(ids)} ids, smallest top-2 logit gap {min(gaps):.4f}")
    g = out / "golden"
    g.mkdir(exist_ok=True)
    save_file(arrays, g / f"{name}.safetensors")
    (g / f"{name}.safetensors").chmod(0o644)
    (g / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n")


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--out", type=pathlib.Path, required=True)
    ap.add_argument("--only", nargs="*", choices=list(SPECS), default=list(SPECS))
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--golden", action="store_true", help="write golden outputs of the tiny models")
    args = ap.parse_args()
    tokenizers = {}
    for name in args.only:
        write_model(name, args.out, args.seed, tokenizers)
        if args.golden and name.startswith("tiny"):
            golden(name, args.out)


if __name__ == "__main__":
    main()
