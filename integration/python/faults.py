#!/usr/bin/env python3
"""A cluster of processes in network namespaces of their own, under load, with faults: every stream must complete with the tokens of an undisturbed run.

Run as root: integration/python/faults.py --volley target/release/volley [--only NAME ...] [--soak SECONDS] [--streams 64]
Two scheduler processes stand beside the workers. Where etcd is installed (Debian: etcd-server), members find each other and elect a scheduler through it; --no-etcd does without.
Prints one line for each fault with the longest pause of any stream. Exit code 1 if a stream was lost or a token differs.
"""

import argparse
import asyncio
import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from switch import Namespaces, Switch

WORKERS = ["a0", "a1", "e0", "e1", "e2"]
SCHEDULERS = ["s0", "s1"]
PORT = 8000
CLONE_NEWNET = 0x40000000


class Cluster:
    """`volley serve` (and etcd, if there is one) in namespace `c`; five workers and two schedulers, each in its own."""

    def __init__(self, volley, flags, log, etcd):
        self.volley, self.flags, self.log = volley, flags, log
        self.folder = tempfile.mkdtemp(prefix="volley-faults-")
        self.spaces = Namespaces(["c"] + WORKERS + SCHEDULERS)
        self.switch = Switch(self.spaces)
        certs = f"{self.folder}/certs"
        subprocess.run([volley, "certs", "--out", certs], check=True, stdout=subprocess.DEVNULL)
        self.processes = {}
        controller = ["--controller", f"{self.spaces.address('c')}:7600"]
        # With etcd nobody but the controller itself is told where it is.
        self.find = controller
        if etcd:
            self.find = ["--membership", "etcd", "--membership-endpoints", self.start_etcd(etcd)]
        self.common = ["--attention-workers", "2", "--expert-workers", "3", "--isolate", "host", *flags]
        for name in WORKERS:
            self.start(name)
        self.processes["c"] = self.spawn(
            "c", "serve", "--host", "0.0.0.0", "--port", str(PORT), "--certificates", f"{certs}/controller",
            *self.common, *self.find, *(controller if etcd else []), stdout=subprocess.PIPE,
        )
        line = self.processes["c"].stdout.readline()
        if not line.startswith("volley: ready"):
            raise SystemExit(f"the server did not start: {line!r}; see {log.name}")
        for name in SCHEDULERS:
            self.start(name)

    def start_etcd(self, program):
        """Returns the URL of its clients."""
        url, peer = (f"http://{self.spaces.address('c')}:{port}" for port in (2379, 2380))
        command = [
            "ip", "netns", "exec", self.spaces.space("c"), program, "--data-dir", f"{self.folder}/etcd", "--log-level", "error",
            "--listen-client-urls", url, "--advertise-client-urls", url, "--listen-peer-urls", peer,
            "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}",
        ]
        self.processes["etcd"] = subprocess.Popen(command, stderr=self.log, text=True)
        return url

    def spawn(self, name, *arguments, **more):
        command = ["ip", "netns", "exec", self.spaces.space(name), self.volley, *arguments]
        return subprocess.Popen(command, stderr=self.log, text=True, **more)

    def start(self, name):
        if name in SCHEDULERS:
            self.processes[name] = self.spawn(name, "scheduler", "--name", name, "--certificates", f"{self.folder}/certs/scheduler", *self.find)
            return
        role = {"a": "attention", "e": "expert"}[name[0]]
        self.processes[name] = self.spawn(
            name, "worker", role, "--index", name[1:], "--certificates", f"{self.folder}/certs/worker",
            "--threads", "1", *self.common, *self.find,
        )

    def signal(self, name, number):
        os.kill(self.processes[name].pid, number)

    def close(self):
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()
        self.switch.close()
        self.spaces.close()
        shutil.rmtree(self.folder)


async def stream(host, index, tokens, times):
    """One streamed completion by hand, so that no client library hides a pause. Returns its text."""
    body = json.dumps({
        "model": "volley-demo", "prompt": f"{chr(65 + index % 26)}{index}: Now is the", "max_tokens": tokens,
        "temperature": 0, "stream": True, "ignore_eos": True,
    })
    reader, writer = await asyncio.open_connection(host, PORT)
    writer.write(
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
    )
    text, last, longest, done = [], time.monotonic(), 0.0, False
    while line := await reader.readline():
        line = line.decode().strip()
        if not line.startswith("data:"):
            continue
        now = time.monotonic()
        longest, last = max(longest, now - last), now
        data = line[5:].strip()
        if data == "[DONE]":
            done = True
            break
        event = json.loads(data)
        if "error" in event:
            raise RuntimeError(event["error"])
        text.append(event["choices"][0]["text"])
    writer.close()
    if not done:
        raise RuntimeError("the stream ended early")
    times.append(longest)
    return "".join(text)


async def load(host, streams, tokens):
    times = []
    tasks = [stream(host, index, tokens, times) for index in range(streams)]
    texts = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), timeout=300)
    return texts, max(times, default=float("nan"))


def restart(cluster, name, after):
    async def act():
        cluster.signal(name, signal.SIGKILL)
        cluster.processes[name].wait()
        await asyncio.sleep(after)
        cluster.start(name)
    return act


def freeze(cluster, name, seconds):
    async def act():
        cluster.signal(name, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        cluster.signal(name, signal.SIGCONT)
    return act


def network(cluster, seconds, ports=None, **fault):
    async def act():
        cluster.switch.set(ports, **fault)
        await asyncio.sleep(seconds)
        cluster.switch.set(ports)
    return act


def leave(cluster, name):
    async def act():
        cluster.signal(name, signal.SIGTERM)
        await asyncio.to_thread(cluster.processes[name].wait, 60)
        cluster.start(name)
    return act


async def state(host):
    reader, writer = await asyncio.open_connection(host, PORT)
    writer.write(b"GET /admin/state HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return json.loads(answer.split(b"\r\n\r\n", 1)[1])


async def planned_by_process(host):
    """The scheduler that plans, when both are there."""
    for _ in range(300):
        now = await state(host)
        if now["scheduler"] and now["standby"]:
            return now["scheduler"]
        await asyncio.sleep(0.1)
    raise SystemExit(f"the schedulers are not both there: {now['scheduler']}, {now['standby']}")


def kill_scheduler(cluster, host="127.0.0.1"):
    """The one that plans; the other takes over."""
    async def act():
        leader = await planned_by_process(host)
        cluster.signal(leader, signal.SIGKILL)
        cluster.processes[leader].wait()
        await asyncio.sleep(2)
        if (await state(host))["scheduler"] == leader:
            raise SystemExit("a scheduler that is dead still plans")
        cluster.start(leader)
    return act


def faults(cluster):
    more = {}
    if "etcd" in cluster.processes:
        more["etcd-stopped-60s"] = freeze(cluster, "etcd", 60)
    return more | {
        "kill-scheduler": kill_scheduler(cluster),
        "kill-expert": restart(cluster, "e1", 2),
        "kill-attention": restart(cluster, "a1", 2),
        "stop-expert": freeze(cluster, "e2", 10),
        "stop-attention": freeze(cluster, "a0", 10),
        "partition-attention-expert": network(cluster, 5, ["a0", "e1"], loss=1),
        "partition-controller-expert": network(cluster, 5, ["c", "e0"], loss=1),
        "partition-controller-attention": network(cluster, 5, ["c", "a1"], loss=1),
        "loss-1%": network(cluster, 8, loss=0.01),
        "loss-5%": network(cluster, 8, loss=0.05),
        "delay-50ms": network(cluster, 8, delay_ms=50, jitter_ms=10),
        "drain-expert": leave(cluster, "e0"),
        "drain-attention": leave(cluster, "a0"),
    }


async def settle(host):
    """Until a short request is quick again."""
    for _ in range(100):
        before = time.monotonic()
        try:
            await asyncio.wait_for(stream(host, 0, 4, []), timeout=5)
            if time.monotonic() - before < 1:
                return
        except (RuntimeError, OSError, asyncio.TimeoutError):
            pass
        await asyncio.sleep(0.2)
    raise SystemExit("the cluster does not recover")


async def under(name, act, host, args, expected):
    """Load, round after round, from before a fault until it is over."""
    fault = asyncio.create_task(after(0.5, act))
    texts, pause = [], 0.0
    while not fault.done() or not texts:
        more, longest = await load(host, args.streams, args.tokens)
        texts, pause = texts + more, max(pause, longest)
    await fault
    return check(name, texts, expected * (len(texts) // len(expected)), pause)


async def after(seconds, act):
    await asyncio.sleep(seconds)
    await act()


def check(name, texts, expected, pause):
    lost = [f"stream {i}: {text}" for i, text in enumerate(texts) if isinstance(text, BaseException)]
    other = [f"stream {i}: {a!r} instead of {b!r}" for i, (a, b) in enumerate(zip(texts, expected)) if isinstance(a, str) and a != b]
    print(f"{name:32} {len(texts)} streams, {len(lost)} lost, {len(other)} with other tokens, longest pause {pause:.2f} s", flush=True)
    for line in (lost + other)[:3]:
        print("   ", line[:300])
    return not lost and not other


async def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volley", required=True)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--soak", type=float, default=0, help="seconds of random faults")
    parser.add_argument("--seed", type=int, default=1, help="of the soak")
    parser.add_argument("--no-etcd", action="store_true", help="find the controller by its address, and let the first scheduler plan")
    parser.add_argument("--log", default="/tmp/volley-faults.log")
    parser.add_argument("flags", nargs="*", help="further flags of all processes, after --")
    args = parser.parse_args()
    alone = subprocess.run([args.volley, "generate", "--prompt", "A0: Now is the", "--max-tokens", "60", "--temperature", "0"],
                           capture_output=True, text=True, check=True).stdout
    with open(args.log, "w") as log:
        etcd = None if args.no_etcd else shutil.which("etcd")
        if not etcd and not args.no_etcd:
            print("LEFT OUT: etcd is not installed (Debian: etcd-server); its fault is not tried", flush=True)
        cluster = Cluster(os.path.abspath(args.volley), args.flags, log, etcd)
        try:
            # From within the controller's namespace, through its own loopback: the faults are the cluster's, not the client's.
            host = await enter(cluster)
            await planned_by_process(host)
            expected, pause = await load(host, args.streams, args.tokens)
            good = check("undisturbed", expected, expected, pause)
            prompt = "A0: Now is the"
            same = (prompt + expected[0]).startswith(alone.rstrip("\n"))
            print(f"{'one process':32} {'the same text' if same else 'another text: ' + repr(alone) + repr(expected[0][:80])}")
            good &= same
            for name, act in faults(cluster).items():
                if args.only is None or name in args.only:
                    good &= await under(name, act, host, args, expected)
                    await settle(host)
            chance, until = random.Random(args.seed), time.monotonic() + args.soak
            while time.monotonic() < until:
                # An outage of a minute would be most of a soak.
                some = {name: act for name, act in faults(cluster).items() if name != "etcd-stopped-60s"}
                name, act = chance.choice(list(some.items()))
                good &= await under(f"soak {name}", act, host, args, expected)
                await asyncio.sleep(chance.random())
        finally:
            cluster.close()
    sys.exit(0 if good else 1)


async def enter(cluster):
    """This process enters the controller's namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(os.open(f"/run/netns/{cluster.spaces.space('c')}", os.O_RDONLY), CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
    return "127.0.0.1"


if __name__ == "__main__":
    asyncio.run(main())
