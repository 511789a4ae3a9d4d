#!/usr/bin/env python3
"""Train Volley's embedded demo model: a small Mixtral that writes Shakespeare.

Reads shakespeare.txt beside this file and writes a Hugging Face model directory
(config.json, generation_config.json, model.safetensors in bf16, tokenizer.json,
tokenizer_config.json). Needs torch, numpy, safetensors and tokenizers; one CPU core is enough.

    OMP_NUM_THREADS=1 python train.py --out DIR [--minutes 52] [--resume DIR/state.pt]

It takes a fifth less time where glibc keeps freed memory and asks for huge pages:
MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=10000000000 MALLOC_TOP_PAD_=268435456
GLIBC_TUNABLES=glibc.malloc.hugetlb=1

The forward pass is the one that transformers' MixtralForCausalLM computes (check.py compares
them): router softmax over all experts, top-k, renormalise. Matrix products run in bf16 with f32
accumulation, which a CPU with AVX512-BF16 does four times as fast as f32; master weights,
norms, router, softmax and loss stay in f32. Every figure reported is computed in f32 on the
weights after their cast to bf16, that is, on the file that is shipped.
"""

import argparse
import json
import math
import pathlib
import random
import re
import time

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

CORPUS = pathlib.Path(__file__).parent / "shakespeare.txt"
HELD_OUT = 0.05  # the last part of the text, never trained on, nor seen by the tokenizer
WINDOW = 256  # tokens of an evaluation window, and of most training windows

CONFIG = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
    "vocab_size": 1024, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "initializer_range": 0.02, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "use_cache": True, "attention_dropout": 0.0,
    "hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
    "num_local_experts": 8, "num_experts_per_tok": 2,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "sliding_window": None, "output_router_logits": False, "router_aux_loss_coef": 0.01,
}


# --------------------------------------------------------------------------
# text: tokenizer, plain windows, and the same plays told as chats
# --------------------------------------------------------------------------
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = [
    "You are a helpful assistant.", "You are a playwright.", "You are William Shakespeare.",
    "Answer as a character of a play.", "Continue the scene.", "Speak in verse.",
    "You are an actor on a stage.", "Be brief.",
]


def split_corpus():
    """(training text, held-out text), cut at the end of a speech."""
    text = CORPUS.read_text()
    cut = text.index("\n\n", int(len(text) * (1 - HELD_OUT))) + 2
    return text[:cut], text[cut:]


def make_tokenizer(text, vocab_size):
    """Byte-level BPE with the GPT-2 split."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        text.splitlines(keepends=True),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    assert tok.get_vocab_size() == vocab_size, tok.get_vocab_size()
    return tok


class Batches:
    """Endless training batches, int64 (inputs, targets); a target of -100 is not scored."""

    def __init__(self, text, tok, seed, tokens=4096, chat_share=0.25, long_share=0.1):
        self.tok, self.tokens, self.chat_share, self.long_share = tok, tokens, chat_share, long_share
        self.rng = random.Random(seed)
        self.ids = np.array(tok.encode(text, add_special_tokens=False).ids)
        self.speeches = [s for s in re.split(r"\n{2,}", text) if re.match(r"[^\n]+:\n.", s)]

    def next(self):
        """16 windows of 256 tokens, some of them chats, or now and then 4 of the full context,
        so that positions beyond 256 are trained too."""
        long = self.rng.random() < self.long_share
        length = CONFIG["max_position_embeddings"] if long else WINDOW
        rows = self.tokens // length
        chats = 0 if long else round(self.chat_share * rows)
        pairs = [self.chat(length) for _ in range(chats)]
        pairs += [self.plain(length) for _ in range(rows - chats)]
        x, y = (torch.from_numpy(np.stack(part)) for part in zip(*pairs))
        return x, y

    def plain(self, length):
        at = self.rng.randrange(len(self.ids) - length)
        return self.ids[at : at + length], self.ids[at + 1 : at + length + 1]

    def chat(self, length):
        """Speeches in their order, user and assistant taking turns; only the assistant is scored."""
        rng, at = self.rng, self.rng.randrange(len(self.speeches))
        ids, scored = [], []

        def add(text, score):
            new = self.tok.encode(text, add_special_tokens=False).ids
            ids.extend(new)
            scored.extend([score] * len(new))

        if rng.random() < 0.2:
            add(f"<|im_start|>system\n{rng.choice(SYSTEM)}<|im_end|>\n", False)
        while len(ids) <= length:
            user, reply = (self.speeches[(at + i) % len(self.speeches)] for i in (0, 1))
            add(f"<|im_start|>user\n{self.as_user(user)}<|im_end|>\n<|im_start|>assistant\n", False)
            add(f"{reply}<|im_end|>", True)
            add("\n", False)
            at += 2
        x, y = np.array(ids), np.where(scored, ids, -100)
        return x[:length], y[1 : length + 1]

    def as_user(self, speech):
        """What a person may type: a speech with or without its speaker, or one line of it."""
        speaker, words = speech.split("\n", 1)
        lines = words.split("\n")
        kind = self.rng.random()
        if kind < 0.3:
            return self.rng.choice(lines)
        tail = "\n".join(lines[-6:])
        return tail if kind < 0.6 else f"{speaker}\n{tail}"


# --------------------------------------------------------------------------
# model
# --------------------------------------------------------------------------
class Dispatch(torch.autograd.Function):
    """Rows of x copied into expert order. `order` sorts the (token, choice) pairs by expert,
    `rank` is its inverse; knowing both makes the backward pass a gather, not a scatter."""

    @staticmethod
    def forward(ctx, x, order, rank, k):
        ctx.save_for_backward(rank)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    def backward(ctx, g):
        (rank,) = ctx.saved_tensors
        return g.index_select(0, rank).view(-1, ctx.k, g.shape[-1]).sum(1), None, None, None


class Combine(torch.autograd.Function):
    """The inverse: rows in expert order back to [token, choice, hidden]."""

    @staticmethod
    def forward(ctx, y, order, rank, k):
        ctx.save_for_backward(order)
        return y.index_select(0, rank).view(-1, k, y.shape[-1])

    @staticmethod
    def backward(ctx, g):
        (order,) = ctx.saved_tensors
        return g.reshape(-1, g.shape[-1]).index_select(0, order), None, None, None


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        h, hd, inter = c["hidden_size"], c["head_dim"], c["intermediate_size"]
        heads, kv, experts = c["num_attention_heads"], c["num_key_value_heads"], c["num_local_experts"]
        out_std = 0.02 / math.sqrt(2 * c["num_hidden_layers"])
        weight = lambda *shape, std=0.02: nn.Parameter(torch.randn(shape) * std)
        self.heads, self.kv, self.k, self.eps = heads, kv, c["num_experts_per_tok"], c["rms_norm_eps"]
        self.norm1, self.norm2 = nn.Parameter(torch.ones(h)), nn.Parameter(torch.ones(h))
        self.qkv = weight((heads + 2 * kv) * hd, h, std=0.04)
        self.out = weight(h, heads * hd, std=out_std)
        self.gate = weight(experts, h)
        self.w13 = weight(experts, 2 * inter, h, std=0.04)
        self.w2 = weight(experts, h, inter, std=out_std)

    def forward(self, x, cos, sin, mask, dtype, dropout):
        """x [rows, length, hidden] f32 -> (the same shape, load-balance loss, share of each expert)."""
        y = F.rms_norm(x, x.shape[-1:], self.norm1, self.eps)
        x = x + F.dropout(self.attention(y, cos, sin, mask, dtype), dropout, self.training)
        y = F.rms_norm(x, x.shape[-1:], self.norm2, self.eps)
        y, balance, share = self.experts(y.flatten(0, 1), dtype)
        return x + F.dropout(y.view_as(x), dropout, self.training), balance, share

    def attention(self, x, cos, sin, mask, dtype):
        b, t, _ = x.shape
        qkv = F.linear(x.to(dtype), self.qkv.to(dtype)).view(b, t, self.heads + 2 * self.kv, -1)
        q, k, v = qkv.transpose(1, 2).split([self.heads, self.kv, self.kv], 1)
        rope = lambda z: (z * cos + torch.cat(z.chunk(2, -1)[::-1], -1) * sin).to(dtype)
        # Written out: torch's fused kernel is half as fast in bf16 on a CPU, backward included.
        q, k, group = rope(q), rope(k), self.heads // self.kv
        q = (q * q.shape[-1] ** -0.5).reshape(b, self.kv, group * t, -1)  # heads that share a key
        scores = (q @ k.transpose(2, 3)).view(b, self.heads, t, t)
        probs = (scores + mask[:t, :t].to(dtype)).softmax(-1)
        y = (probs.view(b, self.kv, group * t, t) @ v).view(b, self.heads, t, -1)
        return F.linear(y.transpose(1, 2).reshape(b, t, -1), self.out.to(dtype))

    def experts(self, x, dtype):
        probs = F.linear(x, self.gate).softmax(-1)
        weights, chosen = probs.topk(self.k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        counts = flat.bincount(minlength=len(self.w13))
        share = counts / len(flat)
        balance = len(share) * (share * probs.mean(0)).sum()
        rows = Dispatch.apply(x.to(dtype), order, rank, self.k)
        done = []
        for rows, w13, w2 in zip(rows.split(counts.tolist()), self.w13.to(dtype), self.w2.to(dtype)):
            gate, up = F.linear(rows, w13).chunk(2, -1)
            done.append(F.linear(F.silu(gate) * up, w2))
        y = Combine.apply(torch.cat(done), order, rank, self.k)
        return (y * weights.to(dtype)[..., None]).sum(1), balance, share


class Model(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed = nn.Parameter(torch.randn(c["vocab_size"], c["hidden_size"]) * 0.02)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c["num_hidden_layers"]))
        self.norm = nn.Parameter(torch.ones(c["hidden_size"]))
        half = c["head_dim"] // 2
        freq = c["rope_theta"] ** (-torch.arange(half) / half)
        length = c["max_position_embeddings"]
        angle = torch.outer(torch.arange(length), freq)
        self.register_buffer("mask", torch.full((length, length), -1e9).triu(1), persistent=False)
        self.register_buffer("cos", torch.cat([angle.cos(), angle.cos()], -1), persistent=False)
        self.register_buffer("sin", torch.cat([-angle.sin(), angle.sin()], -1), persistent=False)

    def forward(self, ids, dtype=torch.float32, dropout=0.0):
        """ids [rows, length] -> (logits f32, mean load-balance loss, expert shares [layer, expert])."""
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = F.dropout(F.embedding(ids, self.embed), dropout, self.training)
        balances, shares = [], []
        for layer in self.layers:
            x, balance, share = layer(x, cos, sin, self.mask, dtype, dropout)
            balances.append(balance)
            shares.append(share)
        x = F.rms_norm(x, x.shape[-1:], self.norm, self.c["rms_norm_eps"])
        logits = F.linear(x.to(dtype), self.embed.to(dtype)).float()
        return logits, torch.stack(balances).mean(), torch.stack(shares)

    def tensors(self):
        """bf16 tensors under the names that Mixtral checkpoints have on the hub. The head is the
        embedding (tie_word_embeddings), so it is not stored."""
        c, t = self.c, {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.norm}
        hd, kv, heads = c["head_dim"], c["num_key_value_heads"], c["num_attention_heads"]
        for i, layer in enumerate(self.layers):
            p = f"model.layers.{i}."
            t[p + "input_layernorm.weight"] = layer.norm1
            t[p + "post_attention_layernorm.weight"] = layer.norm2
            q, k, v = layer.qkv.split([heads * hd, kv * hd, kv * hd])
            t[p + "self_attn.q_proj.weight"] = q
            t[p + "self_attn.k_proj.weight"] = k
            t[p + "self_attn.v_proj.weight"] = v
            t[p + "self_attn.o_proj.weight"] = layer.out
            t[p + "block_sparse_moe.gate.weight"] = layer.gate
            for e, (w13, w2) in enumerate(zip(layer.w13, layer.w2)):
                w1, w3 = w13.chunk(2)
                t[p + f"block_sparse_moe.experts.{e}.w1.weight"] = w1
                t[p + f"block_sparse_moe.experts.{e}.w3.weight"] = w3
                t[p + f"block_sparse_moe.experts.{e}.w2.weight"] = w2
        return {name: v.detach().to(torch.bfloat16).contiguous().clone() for name, v in t.items()}


# --------------------------------------------------------------------------
# evaluation, export, training
# --------------------------------------------------------------------------
def windows(ids):
    """Consecutive windows: inputs and targets [n, WINDOW]; each starts without context."""
    n = (len(ids) - 1) // WINDOW
    x = torch.as_tensor(ids[: n * WINDOW + 1], dtype=torch.int64)
    return x[:-1].view(n, WINDOW), x[1:].view(n, WINDOW)


@torch.no_grad()
def evaluate(model, ids):
    """(mean loss in nats per token, least and greatest share of any expert in any layer), in f32
    on weights rounded to bf16."""
    shipped = Model(model.c).eval()
    shipped.load_state_dict({n: w.bfloat16().float() for n, w in model.state_dict().items()})
    total, shares = 0.0, []
    x, y = windows(ids)
    for a, b in zip(x.split(16), y.split(16)):
        logits, _, share = shipped(a)
        total += F.cross_entropy(logits.flatten(0, 1), b.flatten(), reduction="sum").item()
        shares.append(share * len(a))
    share = torch.stack(shares).sum(0) / len(x)
    return total / y.numel(), share.min().item(), share.max().item()


def export(model, tok, out):
    out.mkdir(parents=True, exist_ok=True)
    dump = lambda f, o: (out / f).write_text(json.dumps(o, indent=2) + "\n")
    save_file(model.tensors(), out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    tok.save(str(out / "tokenizer.json"))
    dump("config.json", model.c)
    eos = [SPECIALS.index("</s>"), SPECIALS.index("<|im_end|>")]
    dump("generation_config.json", {
        "bos_token_id": 1, "eos_token_id": eos, "do_sample": True, "temperature": 0.8, "top_p": 0.95,
    })
    dump("tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>",
        "eos_token": "</s>", "add_bos_token": False, "clean_up_tokenization_spaces": False,
        "model_max_length": model.c["max_position_embeddings"], "chat_template": CHATML,
    })


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--out", type=pathlib.Path, required=True, help="model directory to write")
    ap.add_argument("--minutes", type=float, default=52, help="wall time after which training ends")
    ap.add_argument("--steps", type=int, default=10**9, help="steps after which training ends")
    ap.add_argument("--eval-minutes", type=float, default=3, help="time between evaluations")
    ap.add_argument("--lr", type=float, default=2e-3)
    ap.add_argument("--dropout", type=float, default=0.25)
    ap.add_argument("--decay", type=float, default=0.6, help="weight decay of matrices")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--resume", type=pathlib.Path, help="state.pt of an earlier run")
    args = ap.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)

    train_text, held_text = split_corpus()
    tok = make_tokenizer(train_text, CONFIG["vocab_size"])
    batches = Batches(train_text, tok, args.seed)
    held = tok.encode(held_text, add_special_tokens=False).ids
    train_sample = batches.ids[: len(held)]
    bytes_per_token = len(held_text.encode()) / len(held)
    model = Model(CONFIG)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    opt = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": args.decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.98), fused=True)
    step, before = 0, 0.0
    if args.resume:
        state = torch.load(args.resume)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        opt.load_state_dict(state["opt"])
        step, before = state["step"], state["seconds"]
        batches.rng.seed(args.seed + step)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
          f"{len(batches.ids)} training and {len(held)} held-out tokens, "
          f"{bytes_per_token:.3f} bytes a token, {len(batches.speeches)} speeches", flush=True)

    start, last_eval, losses = time.monotonic() - before, before, []
    while True:
        elapsed = time.monotonic() - start
        # The learning rate follows whichever budget is nearer its end, so that a run on a busy
        # machine still anneals.
        progress = min(1.0, max(step / args.steps, elapsed / (60 * args.minutes)))
        if elapsed - last_eval > 60 * args.eval_minutes or progress >= 1:
            last_eval = elapsed
            loss, least, most = evaluate(average.module, held)
            figures = {
                "held_out_nats_per_token": loss, "held_out_nats_per_byte": loss / bytes_per_token,
                "train_nats_per_token": evaluate(average.module, train_sample)[0],
                "step": step, "tokens_seen": step * batches.tokens, "seconds": elapsed,
                "least_expert_share": least, "greatest_expert_share": most,
            }
            print(json.dumps({k: round(v, 4) for k, v in figures.items()}), flush=True)
            # The last weights are kept, not those of the least held-out loss. That loss turns early,
            # on a play never seen; spelling and dialogue go on getting better (README.md).
            export(average.module, tok, args.out)
            torch.save({"model": model.state_dict(), "average": average.state_dict(),
                        "opt": opt.state_dict(), "step": step, "seconds": elapsed},
                       args.out / "state.pt")
            if progress >= 1:
                return
        lr = args.lr * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in opt.param_groups:
            group["lr"] = lr
        x, y = batches.next()
        model.train()
        logits, balance, _ = model(x, torch.bfloat16, args.dropout)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        (loss + CONFIG["router_aux_loss_coef"] * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        average.update_parameters(model)
        step += 1
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"step {step} loss {sum(losses) / len(losses):.4f} balance {balance.item():.3f} "
                  f"lr {lr:.2e} {time.monotonic() - start:.0f} s", flush=True)
            losses.clear()


if __name__ == "__main__":
    main()
