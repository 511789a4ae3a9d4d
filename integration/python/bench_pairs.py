#!/usr/bin/env python3
"""Compare programs on one noisy machine: they take turns, round after round, and what counts is the ratio of medians.

    pip install llama-cpp-python          # builds natively
    python bench_pairs.py --llama mid-mixtral-bf16.gguf --volley "volley bench --model mid-mixtral" --batch 1,8,32,128
    python bench_pairs.py --volley "volley bench --model M --micro-batches 1" --volley "volley bench --model M --micro-batches 2" --batch 32

The first contestant is what the others are divided by: llama.cpp where there is one, else the first --volley. In each round every contestant runs once, in an
order that is turned from round to round, so that slow spells of the machine meet all of them. A run of Volley is a process of its own, with one unmeasured run first;
llama.cpp keeps its model loaded and has one unmeasured run for each batch size.

With --config (the checkpoint's config.json) and --bits, shares of what the machine can do are added: the floors are measured before and after by --floor, the program of
`cargo bench -p volley-models --bench floor -- --json`.
"""

import argparse
import json
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile


class Llama:
    def __init__(self, path, args):
        import bench_llama

        self.name, self.args = "llama.cpp", args
        self.bench = bench_llama
        self.model, self.vocab = bench_llama.load(path)
        self.warm = set()

    def run(self, batch, output):
        shape = argparse.Namespace(input=self.args.input, output=output, threads=self.args.threads)
        if batch not in self.warm:
            self.warm.add(batch)
            short = argparse.Namespace(input=16, output=4, threads=self.args.threads)
            self.bench.run(self.model, self.vocab, batch, short)
        return self.bench.run(self.model, self.vocab, batch, shape)


class Volley:
    def __init__(self, command, args):
        self.name, self.command, self.args = command, shlex.split(command), args

    def run(self, batch, output):
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            shape = ["--batch", batch, "--input-len", self.args.input, "--output-len", output, "--warmup", 1, "--repetitions", 1]
            shape += ["--threads", self.args.threads, "--json", file.name]
            subprocess.run(self.command + [str(word) for word in shape], check=True, stdout=subprocess.DEVNULL)
            median = json.load(open(file.name))["batches"][0]["median"]
        return median["prefill_tokens_per_s"], median["decode_tokens_per_s"]


def work(config, bits):
    """Bytes of weights that one token reads by itself, and floating-point operations of a prompt's token (products with weights alone)."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    experts = config.get("num_local_experts") or config["num_experts"]
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    dense = hidden * (q + 2 * kv + q)
    chosen = 3 * hidden * width * config["num_experts_per_tok"]
    params = layers * (dense + chosen)
    head = hidden * config["vocab_size"]
    router = layers * hidden * experts * 2  # the router is not quantised
    return (params + head) * bits / 8 + router, 2 * params + router


def measure_floor(program):
    out = subprocess.run([program, "--json"], check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--llama", metavar="GGUF")
    ap.add_argument("--volley", metavar="COMMAND", action="append", default=[], help="a `volley bench` command line; may be repeated")
    ap.add_argument("--batch", default="1,8,32,128")
    ap.add_argument("--input", type=int, default=128)
    ap.add_argument("--output", default="64", help="tokens generated, one number or one for each batch size")
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--config", type=pathlib.Path)
    ap.add_argument("--bits", type=float, default=16, help="bits of a weight: 16, or 8.25 for q8, 4.5 for q4")
    ap.add_argument("--rate", default="bf16", help="which of the floor's rates prefill is held against: f32, bf16, int8")
    ap.add_argument("--floor", metavar="PROGRAM")
    ap.add_argument("--json", metavar="FILE", help="append every run to this file")
    args = ap.parse_args()
    contestants = ([Llama(args.llama, args)] if args.llama else []) + [Volley(v, args) for v in args.volley]
    if not contestants:
        ap.error("nobody to measure: give --llama, --volley, or both")
    sizes = [int(size) for size in args.batch.split(",")]
    outputs = [int(n) for n in args.output.split(",")]
    outputs = outputs if len(outputs) == len(sizes) else outputs[:1] * len(sizes)
    floors = [measure_floor(args.floor)] if args.floor else []

    medians = {}
    for size, output in zip(sizes, outputs):
        runs = {c.name: [] for c in contestants}
        for turn in range(args.rounds):
            first = turn % len(contestants)
            for contestant in contestants[first:] + contestants[:first]:
                run = contestant.run(size, output)
                runs[contestant.name].append(run)
                if args.json:
                    record = {"batch": size, "round": turn, "who": contestant.name, "prefill": run[0], "decode": run[1]}
                    with open(args.json, "a") as file:
                        print(json.dumps(record), file=file)
        base = None
        for name, all_runs in runs.items():
            prefill, decode = (statistics.median(column) for column in zip(*all_runs))
            base = base or (prefill, decode)
            low, high = min(r[1] for r in all_runs), max(r[1] for r in all_runs)
            medians[size, name] = (prefill, decode)
            print(
                f"batch {size:>4}  decode {decode:>8.1f} tok/s ({low:.0f} to {high:.0f}), x{decode / base[1]:.2f}"
                f"   prefill {prefill:>8.1f} tok/s, x{prefill / base[0]:.2f}   {name}",
                flush=True,
            )
    if args.floor:
        floors.append(measure_floor(args.floor))
        reads = max(floor["reads_gb_per_s"] for floor in floors)
        rate = max(floor["gops_per_s"][args.rate] for floor in floors)
        print(f"floors, the better of before and after: reads {reads:.1f} GB/s, {args.rate} {rate:.0f} Gop/s")
        if args.config:
            bytes_a_token, ops_a_token = work(json.loads(args.config.read_text()), args.bits)
            for (size, name), (prefill, decode) in medians.items():
                share = f"prefill {prefill * ops_a_token / 1e9 / rate:.2f} of the rate"
                if size == 1:
                    share += f", decode {decode * bytes_a_token / 1e9 / reads:.2f} of the reads"
                print(f"batch {size:>4}  {share}   {name}")


if __name__ == "__main__":
    sys.exit(main())
