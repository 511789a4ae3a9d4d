#!/usr/bin/env python3
"""Hold a server under many streams for minutes and do its accounts.

    python soak.py http://127.0.0.1:8000 --streams 256 --seconds 300 --pid $(pgrep -f 'volley serve')

Each of N clients sends one streamed completion after the other: prompts of random length in text or token
ids, greedy or sampled, some with the end of text ignored, one in ten hung up midway. One in eight is one of
a few fixed greedy requests, whose answers must never differ, whatever runs beside them.

What is checked (exit status 1 if anything of it fails):
* no error, and every stream that is not hung up ends with [DONE], has as many tokens as its usage says, and
  not more than were asked for;
* volley_generation_tokens_total grew by the tokens received. For streams read to their end that is exact.
  For one that was hung up the server may have sent what the client did not read any more: its count lies
  between what was received and the max_tokens of the request;
* volley_requests_total grew by the requests sent, none with the reason error, none rejected; those with the
  reason cancelled are at most those hung up (the rest of these had ended before the server saw it);
* volley_http_requests_total of the route with status 200 grew by the requests sent;
* nothing runs or waits at the end, and no KV block is in use;
* with --pid: the resident memory at the end is at most --rss-growth-mib above that after --warm-seconds.

Needs Python 3.11 and nothing else. It speaks HTTP over plain sockets, because a client library in Python
would be busier than the server.
"""

import argparse
import array
import asyncio
import json
import math
import random
import re
import statistics
import sys
import time
import urllib.request

PATH = "/v1/completions"
WORDS = "the king hath sent for thee and I shall speak of love or war, my lord; good night".split()
PROBES = 4
HANG_UP_SHARE, PROBE_SHARE = 0.10, 0.125
READ_DEADLINE_S = 120  # no event for so long is an error
END_DEADLINE_S = 180  # for the last streams to end


class Soak:
    def __init__(self, args):
        self.args = args
        self.host, self.port = args.url.split("://", 1)[1].rstrip("/").removesuffix("/v1").rsplit(":", 1)
        self.errors = []
        self.sent = self.completed = self.hung_up = 0
        self.tokens_completed = self.tokens_hung_up = self.tokens_unread_max = 0
        self.ttft, self.itl = array.array("d"), array.array("d")
        self.probes = {}
        self.rss = []  # (seconds, KiB)

    async def run(self):
        before = await asyncio.to_thread(self.metrics)
        self.begin = time.monotonic()
        sampler = asyncio.create_task(self.sample())
        clients = [asyncio.create_task(self.client(i)) for i in range(self.args.streams)]
        await asyncio.wait(clients, timeout=self.args.seconds + END_DEADLINE_S)
        for client in clients:
            if not client.done():
                self.error(f"a stream has not ended {END_DEADLINE_S} s after the last request")
                client.cancel()
        self.wall = time.monotonic() - self.begin
        sampler.cancel()
        after = await self.idle()
        self.check_accounts(before, after)
        self.check_memory()
        return self.report()

    async def client(self, number):
        rng = random.Random(self.args.seed * 100_003 + number)
        while time.monotonic() - self.begin < self.args.seconds:
            body, probe = self.request(rng)
            hang_up_after = rng.randint(1, body["max_tokens"] // 2) if probe is None and rng.random() < HANG_UP_SHARE else None
            self.sent += 1
            try:
                await self.stream(body, probe, hang_up_after)
            except Exception as error:  # whatever it is, it is what this script is here to find
                self.error(f"{type(error).__name__}: {error}")
                await asyncio.sleep(0.5)

    def request(self, rng):
        """A random request, and the number of the probe if it is one."""
        common = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
        if rng.random() < PROBE_SHARE:
            probe = rng.randrange(PROBES)
            prompt = [30 + (17 * i + 5 * probe) % 90 for i in range(5 + 12 * probe)]
            return {**common, "prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True}, probe
        length = rng.choice([1, 4, 16, 40, 100, 300])
        if rng.random() < 0.5:
            prompt = [rng.randrange(20, 250) for _ in range(length)]
        else:
            prompt = " ".join(rng.choice(WORDS) for _ in range(max(1, length // 3)))
        body = {**common, "prompt": prompt, "max_tokens": rng.choice([2, 16, 64, 128, 200]), "seed": rng.randrange(1 << 32)}
        body["temperature"] = rng.choice([0, 0.7, 1.0])
        body["ignore_eos"] = rng.random() < 0.7
        return body, None

    async def stream(self, body, probe, hang_up_after):
        data = json.dumps(body).encode()
        start = time.monotonic()
        reader, writer = await asyncio.open_connection(self.host, int(self.port))
        try:
            head = f"POST {PATH} HTTP/1.1\r\nHost: {self.host}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            writer.write(head.encode() + data)
            await writer.drain()
            async with asyncio.timeout(READ_DEADLINE_S):
                answer = await reader.readuntil(b"\r\n\r\n")
            status = answer.decode().splitlines()[0]
            if " 200 " not in status:
                text = await asyncio.wait_for(reader.read(2000), READ_DEADLINE_S)
                raise RuntimeError(f"{status}: {text.decode(errors='replace')}")
            tokens, usage, finish, last, done = [], None, None, start, False
            async for event in events(reader):
                if event == "[DONE]":
                    done = True
                    continue
                if done:
                    raise RuntimeError(f"after [DONE] came {event[:200]}")
                chunk = json.loads(event)
                if "error" in chunk:
                    raise RuntimeError(f"in the stream: {chunk['error']}")
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    finish = choice["finish_reason"] or finish
                    new = choice.get("token_ids") or []
                    if new:
                        now = time.monotonic()
                        (self.itl if tokens else self.ttft).append(now - last)
                        last = now
                        tokens += new
                if hang_up_after is not None and len(tokens) >= hang_up_after:
                    self.hung_up += 1
                    self.tokens_hung_up += len(tokens)
                    self.tokens_unread_max += body["max_tokens"] - len(tokens)
                    writer.transport.abort()
                    return
            self.completed += 1
            self.tokens_completed += len(tokens)
            self.check_stream(body, probe, tokens, usage, finish, done)
        finally:
            writer.close()

    def check_stream(self, body, probe, tokens, usage, finish, done):
        if not done:
            self.error("a stream ended without [DONE]")
        if usage is None or usage["completion_tokens"] != len(tokens):
            self.error(f"{len(tokens)} tokens received, usage {usage}")
        if isinstance(body["prompt"], list) and usage and usage["prompt_tokens"] != len(body["prompt"]):
            self.error(f"{len(body['prompt'])} prompt tokens sent, usage {usage}")
        exact = finish == "length" or body["ignore_eos"]
        if finish not in ("stop", "length") or len(tokens) > body["max_tokens"] or (exact and len(tokens) != body["max_tokens"]):
            self.error(f"finish_reason {finish} after {len(tokens)} of {body['max_tokens']} tokens")
        if probe is not None and self.probes.setdefault(probe, tokens) != tokens:
            self.error(f"the greedy answer {probe} differs: {tokens} after {self.probes[probe]}")

    def check_accounts(self, before, after):
        def grew(name, **labels):
            matches = lambda key: key[0] == name and all((k, v) in key[1] for k, v in labels.items())
            total = lambda sample: sum(value for key, value in sample.items() if matches(key))
            return round(total(after) - total(before))

        received = self.tokens_completed + self.tokens_hung_up
        counted = grew("volley_generation_tokens_total")
        self.counted, self.cancelled = counted, grew("volley_requests_total", finished_reason="cancelled")
        if not received <= counted <= received + self.tokens_unread_max:
            self.error(f"{counted} tokens counted, {received} received, {self.tokens_unread_max} at most unread")
        sums = {
            "requests ended": (grew("volley_requests_total"), self.sent),
            "requests that failed": (grew("volley_requests_total", finished_reason="error"), 0),
            "requests rejected": (grew("volley_rejected_requests_total"), 0),
            "answers with status 200": (grew("volley_http_requests_total", route=PATH, status="200"), self.sent),
            "requests completed or hung up": (self.completed + self.hung_up, self.sent),
        }
        for name, (given, expected) in sums.items():
            if given != expected:
                self.error(f"{name}: {given}, expected {expected}")
        if self.cancelled > self.hung_up:
            self.error(f"{self.cancelled} requests cancelled, only {self.hung_up} were hung up")
        self.server_times = {
            label: [self.quantile(name, p, grew) for p in (0.5, 0.99)]
            for label, name in (("TTFT", "volley_time_to_first_token_seconds"), ("ITL", "volley_inter_token_latency_seconds"))
        }
        self.preemptions = grew("volley_preemptions_total")
        # The one request that is in flight is the one for the metrics.
        rest = {"volley_num_requests_running": 0, "volley_num_requests_waiting": 0, "volley_kv_cache_usage_ratio": 0, "volley_http_requests_in_flight": 1}
        for name, expected in rest.items():
            left = sum(value for key, value in after.items() if key[0] == name)
            if left != expected:
                self.error(f"{name} is {left} at the end")

    @staticmethod
    def quantile(name, p, grew):
        """The bucket in which the server's own quantile lies: its upper end in milliseconds."""
        edges = [0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60]
        total = grew(f"{name}_count")
        return next((1e3 * edge for edge in edges if grew(f"{name}_bucket", le=f"{edge:g}") >= p * total), math.inf)

    def check_memory(self):
        warm = [kib for at, kib in self.rss if at >= self.args.warm_seconds]
        if not self.rss:
            self.memory = None
        elif len(warm) < 10:
            self.memory = None
            self.error(f"too short to judge memory: {len(warm)} samples after {self.args.warm_seconds} s")
        else:
            self.memory = statistics.median(warm[:5]) / 1024, statistics.median(warm[-5:]) / 1024
            if self.memory[1] - self.memory[0] > self.args.rss_growth_mib:
                self.error(f"resident memory grew from {self.memory[0]:.1f} to {self.memory[1]:.1f} MiB")

    def report(self):
        q = lambda values, p: 1e3 * sorted(values)[min(len(values) - 1, int(p * len(values)))] if values else float("nan")
        print(f"streams      {self.args.streams} for {self.wall:.0f} s")
        print(f"requests     {self.sent} sent, {self.completed} completed, {self.hung_up} hung up ({self.cancelled} seen as cancelled), {self.preemptions} preemptions")
        received = self.tokens_completed + self.tokens_hung_up
        print(f"tokens       {received} received ({self.tokens_hung_up} of streams hung up), {self.counted} counted; {received / self.wall:.0f}/s")
        # Where this client is the bottleneck it reads several tokens at once (ITL 0) and all of them late: the server's
        # own histograms are beside its times, as the upper ends of buckets.
        for label, values in (("TTFT", self.ttft), ("ITL", self.itl)):
            server = "p50 up to {:g} ms, p99 up to {:g} ms".format(*self.server_times[label])
            print(f"{label:12} p50 {q(values, 0.5):.1f} ms, p99 {q(values, 0.99):.1f} ms as read here; by the server's metrics {server}")
        if self.memory:
            print(f"memory       {self.memory[0]:.1f} MiB after {self.args.warm_seconds} s, {self.memory[1]:.1f} MiB at the end")
        for error in self.errors[:20]:
            print(f"ERROR        {error}")
        print(f"errors       {len(self.errors)}")
        return 1 if self.errors else 0

    async def sample(self):
        while self.args.pid:
            with open(f"/proc/{self.args.pid}/status") as status:
                kib = next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
            self.rss.append((time.monotonic() - self.begin, kib))
            await asyncio.sleep(1)

    async def idle(self):
        """The metrics once nothing runs; the hung-up requests need a moment."""
        until = time.monotonic() + 10
        while True:
            sample = await asyncio.to_thread(self.metrics)
            busy = ("volley_num_requests_running", "volley_num_requests_waiting", "volley_http_requests_in_flight")
            if sum(value for (name, _), value in sample.items() if name in busy) <= 1 or time.monotonic() > until:
                return sample
            await asyncio.sleep(0.2)

    def metrics(self):
        """{(name, labels): value}"""
        with urllib.request.urlopen(f"http://{self.host}:{self.port}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        sample = {}
        for line in lines:
            if line and not line.startswith("#"):
                name, labels, value = re.fullmatch(r"([^ {]+)(?:\{(.*)\})? (\S+)", line).groups()
                sample[name, frozenset(re.findall(r'(\w+)="([^"]*)"', labels or ""))] = float(value)
        return sample

    def error(self, message):
        self.errors.append(message)
        if len(self.errors) <= 20:
            print(f"{time.monotonic() - self.begin:7.1f} s  {message}", file=sys.stderr)


async def events(reader):
    """The data of each server-sent event of a chunked answer."""
    text = b""
    while True:
        async with asyncio.timeout(READ_DEADLINE_S):
            size = int(await reader.readuntil(b"\r\n"), 16)
            text += (await reader.readexactly(size + 2))[:-2]
        while (end := text.find(b"\n\n")) >= 0:
            if text.startswith(b"data: "):
                yield text[6:end].decode()
            text = text[end + 2:]
        if size == 0:
            if text:
                raise RuntimeError(f"the stream is cut off in {text[:200]!r}")
            return


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--pid", type=int, help="of the server, to watch its memory")
    parser.add_argument("--warm-seconds", type=float, default=60, help="memory counts from here on")
    parser.add_argument("--rss-growth-mib", type=float, default=16)
    parser.add_argument("--seed", type=int, default=1)
    sys.exit(asyncio.run(Soak(parser.parse_args()).run()))


if __name__ == "__main__":
    main()
