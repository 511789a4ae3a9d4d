#!/usr/bin/env python3
"""Links beside each other and beside what users would pick on the same hosts, in one run:

    integration/python/links.py [--shapes 1x1,2x2] [--sizes 4096,262144] [--only volley,gloo,mpi] [--bench PATH]

The exchange is the same for all: M attention workers each send a frame to each of N expert workers, and get as many bytes back; then the next turn.
  volley   `cargo bench -p volley-transports --bench links`: the in-process fabric, QUIC, plain TCP, TCP under TLS
  gloo     PyTorch's torch.distributed over Gloo: batched isend/irecv between M + N processes (Debian: python3-torch)
  mpi      MPI_Alltoallv in a world of M + N ranks with zero counts within a side, once there and once back (Debian: openmpi-bin, libopenmpi-dev; compiled with mpicc)
Times are one turn's, seen by the first attention worker. Processor time is that of all processes. What is not installed is left out, with a word."""

import argparse
import json
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
VOLUME = 256 << 20


def turns_for(size, pairs):
    """As many as the bench of the transports takes."""
    return min(max(VOLUME // (2 * size * pairs), 20), 3000)


def row(shape, size, link, times, wall, cpu):
    m, n = map(int, shape.split("x"))
    times = sorted(times)
    moved = 2 * size * m * n * len(times) / 1e6
    return {
        "shape": shape, "bytes": size, "link": link, "median_us": statistics.median(times) * 1e6, "p99_us": times[int((len(times) - 1) * 0.99)] * 1e6,
        "mb_s": moved / wall, "mb_cpu_s": moved / cpu if cpu else float("nan"),
    }  # fmt: skip


# --- Gloo: this file again, once for each rank ---


def gloo_rank(rank, shape, size, store):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    m, n = map(int, shape.split("x"))
    dist.init_process_group("gloo", rank=rank, world_size=m + n, init_method=f"file://{store}")
    peers = range(m, m + n) if rank < m else range(m)
    out = {peer: torch.zeros(size, dtype=torch.uint8) for peer in peers}
    back = {peer: torch.zeros(size, dtype=torch.uint8) for peer in peers}

    def turn():
        if rank < m:
            pending = [dist.irecv(back[p], p) for p in peers] + [dist.isend(out[p], p) for p in peers]
            for work in pending:
                work.wait()
        else:
            # Answers each as soon as it is there, as an expert worker would.
            arriving = [(p, dist.irecv(back[p], p)) for p in peers]
            sent = []
            for p, work in arriving:
                work.wait()
                sent.append(dist.isend(out[p], p))
            for work in sent:
                work.wait()

    turns = turns_for(size, m * n)
    for _ in range(turns // 10 + 1):
        turn()
    dist.barrier()
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    times = []
    for _ in range(turns):
        at = time.perf_counter()
        turn()
        times.append(time.perf_counter() - at)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    cpu = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    print(json.dumps({"rank": rank, "times": times if rank == 0 else [], "wall": wall, "cpu": cpu}), flush=True)
    dist.barrier()


def gloo(python, shape, size):
    m, n = map(int, shape.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        command = [python, __file__, "--gloo-rank"]
        started = [
            subprocess.Popen([*command, json.dumps([rank, shape, size, f"{folder}/store"])], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            for rank in range(m + n)
        ]
        try:
            said = [json.loads(process.communicate(timeout=120)[0]) for process in started]
        finally:
            for process in started:
                process.kill()
    return row(shape, size, "gloo", said[0]["times"], said[0]["wall"], sum(one["cpu"] for one in said))


# --- Open MPI ---

MPI = r"""
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
static double cpu(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return u.ru_utime.tv_sec + u.ru_stime.tv_sec + (u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}
int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    int rank, m = atoi(argv[1]), n = atoi(argv[2]), size = atoi(argv[3]), turns = atoi(argv[4]), all = m + n;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    int *there = calloc(all, sizeof(int)), *from = calloc(all, sizeof(int)), *none = calloc(all, sizeof(int)), *at = calloc(all, sizeof(int));
    for (int p = 0; p < all; p++) {
        int other = (rank < m) != (p < m);
        if (other && rank < m) there[p] = size;
        if (other && rank >= m) from[p] = size;
        at[p] = p * size;
    }
    char *out = calloc(all, size), *in = calloc(all, size);
    double *times = calloc(turns, sizeof(double)), wall = 0, spent = 0;
    for (int t = -(turns / 10 + 1); t < turns; t++) {
        if (t == 0) { MPI_Barrier(MPI_COMM_WORLD); wall = MPI_Wtime(); spent = cpu(); }
        double start = MPI_Wtime();
        MPI_Alltoallv(out, there, at, MPI_BYTE, in, from, at, MPI_BYTE, MPI_COMM_WORLD);
        MPI_Alltoallv(out, from, at, MPI_BYTE, in, there, at, MPI_BYTE, MPI_COMM_WORLD);
        if (t >= 0) times[t] = MPI_Wtime() - start;
    }
    wall = MPI_Wtime() - wall; spent = cpu() - spent;
    double sum = 0;
    MPI_Reduce(&spent, &sum, 1, MPI_DOUBLE, MPI_SUM, 0, MPI_COMM_WORLD);
    if (rank == 0) {
        printf("{\"wall\": %.9f, \"cpu\": %.9f, \"times\": [", wall, sum);
        for (int t = 0; t < turns; t++) printf("%s%.9f", t ? "," : "", times[t]);
        printf("]}\n");
    }
    MPI_Finalize();
    return 0;
}
"""


def mpi(program, shape, size):
    m, n = map(int, shape.split("x"))
    # Ranks beyond the cores have to give way instead of spinning.
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--mca", "mpi_yield_when_idle", "1", "-np", str(m + n)]
    command += [program, str(m), str(n), str(size), str(turns_for(size, m * n))]
    said = json.loads(subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, timeout=180).stdout)
    return row(shape, size, "mpi", said["times"], said["wall"], said["cpu"])


def volley(bench, shape, size):
    command = [bench] if bench else ["cargo", "bench", "-q", "-p", "volley-transports", "--bench", "links", "--"]
    said = subprocess.run([*command, shape, str(size), "--json"], stdout=subprocess.PIPE, check=True, cwd=HERE.parent.parent).stdout
    return [json.loads(line) for line in said.splitlines()]


def torch_python():
    """A Python that has torch with Gloo."""
    for python in [sys.executable, "/usr/bin/python3"]:
        check = "import torch.distributed as d; assert d.is_available() and d.is_gloo_available()"
        if os.path.exists(python) and subprocess.run([python, "-c", check], stderr=subprocess.DEVNULL).returncode == 0:
            return python
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="1x1,2x2,4x4,8x8")
    parser.add_argument("--sizes", default="256,4096,65536,262144,1048576,4194304")
    parser.add_argument("--only", default="volley,gloo,mpi")
    parser.add_argument("--bench", help="the compiled bench, instead of cargo")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--gloo-rank", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.gloo_rank:
        return gloo_rank(*json.loads(args.gloo_rank))
    only = args.only.split(",")
    python = torch_python() if "gloo" in only else None
    if "gloo" in only and not python:
        print("left out: Gloo (no Python with torch)", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        program = None
        if "mpi" in only and shutil.which("mpicc") and shutil.which("mpirun"):
            source, program = pathlib.Path(folder, "links.c"), str(pathlib.Path(folder, "links"))
            source.write_text(MPI)
            subprocess.run(["mpicc", "-O2", "-o", program, str(source)], check=True)
        elif "mpi" in only:
            print("left out: Open MPI (no mpicc, mpirun)", file=sys.stderr)
        if not args.json:
            print(f"{'MxN':>5} {'bytes':>8} {'link':12} {'median us':>10} {'P99 us':>10} {'MB/s':>10} {'MB/cpu-s':>10}")
        for shape in args.shapes.split(","):
            for size in map(int, args.sizes.split(",")):
                rows = volley(args.bench, shape, size) if "volley" in only else []
                rows += [gloo(python, shape, size)] if python else []
                rows += [mpi(program, shape, size)] if program else []
                for r in rows:
                    if args.json:
                        print(json.dumps(r), flush=True)
                        continue
                    print(f"{r['shape']:>5} {r['bytes']:>8} {r['link']:12} {r['median_us']:>10.1f} {r['p99_us']:>10.1f} {r['mb_s']:>10.1f} {r['mb_cpu_s']:>10.1f}", flush=True)


if __name__ == "__main__":
    main()
