#!/usr/bin/env python3
"""Measure llama.cpp as `volley bench` measures Volley: prompts of --input tokens, --output greedy tokens each, many sequences in one batch.

    pip install llama-cpp-python          # builds natively
    python bench_llama.py MODEL.gguf --threads 2 --batch 1,8,32,128

Prints a JSON line for each batch size: prefill and decode tokens per second, the best of --repetitions (a slow peer shall not lose by the noise of the machine).
"""

import argparse
import ctypes
import json
import time

import llama_cpp as llama


# The library keeps the address, not the object.
quiet = llama.llama_log_callback(lambda *_: None)


def load(path):
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    return model, llama.llama_model_get_vocab(model)


def clock(step, ctx):
    start = time.perf_counter()
    step()
    llama.llama_synchronize(ctx)
    return time.perf_counter() - start


def fill(batch, rows):
    """rows: (token, position, sequence, wants logits)"""
    batch.n_tokens = len(rows)
    for i, (token, position, sequence, logits) in enumerate(rows):
        batch.token[i], batch.pos[i], batch.logits[i] = token, position, logits
        batch.n_seq_id[i] = 1
        batch.seq_id[i][0] = sequence


def run(model, vocab, size, args):
    params = llama.llama_context_default_params()
    params.n_ctx = size * (args.input + args.output)
    params.n_batch = params.n_ubatch = 512
    params.n_seq_max = size
    params.n_threads = params.n_threads_batch = args.threads
    params.kv_unified = True
    ctx = llama.llama_init_from_model(model, params)
    batch = llama.llama_batch_init(512, 0, 1)
    n_vocab = llama.llama_vocab_n_tokens(vocab)

    def decode(rows):
        fill(batch, rows)
        code = llama.llama_decode(ctx, batch)
        assert code == 0, f"llama_decode: {code}"

    prompt = [
        ((s * 31 + i * 7) % 1000 + 5, i, s, i == args.input - 1) for s in range(size) for i in range(args.input)
    ]
    prefill = 0.0
    for start in range(0, len(prompt), 512):
        prefill += clock(lambda: decode(prompt[start : start + 512]), ctx)
    tokens = [5] * size
    decode_time = 0.0
    for step in range(args.output):
        rows = [(tokens[s], args.input + step, s, True) for s in range(size)]
        decode_time += clock(lambda: decode(rows), ctx)
        for s in range(size):
            logits = llama.llama_get_logits_ith(ctx, s)
            # The choice of a token is not timed; it is done here only so that each run generates its own text.
            tokens[s] = 5 + int(abs(logits[step % n_vocab]) * 1000) % 1000
    llama.llama_batch_free(batch)
    llama.llama_free(ctx)
    return size * args.input / prefill, size * args.output / decode_time


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("model")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--batch", default="1,8,32,128")
    ap.add_argument("--input", type=int, default=128)
    ap.add_argument("--output", type=int, default=64)
    ap.add_argument("--repetitions", type=int, default=3)
    args = ap.parse_args()
    model, vocab = load(args.model)
    for size in map(int, args.batch.split(",")):
        runs = [run(model, vocab, size, args) for _ in range(args.repetitions)]
        prefill, decode = (max(r[i] for r in runs) for i in (0, 1))
        print(json.dumps({"batch": size, "prefill": round(prefill, 1), "decode": round(decode, 1)}), flush=True)


if __name__ == "__main__":
    main()
