"""What covering costs: CPU seconds, peak memory and their slope, by number of images, for classes and for clusters.

    python benchmarks/cover_speed.py [--size 50000,200000,1000000,5000000] [--dim 192] [--order cover]

Synthetic float16 features in a mixture of tight Gaussians, in a file that is mapped into memory as a feature file is.
Classes have 1,300 images, as ImageNet's; clusters are those of about 400 that `--by cluster` makes, k-means included.
Each measurement has a process of its own, so that peaks are its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np

from protoprune.cli.options import whole_numbers

CLASS = 1300
SIZES = "50000,200000,1000000,5000000"


def features(path: str, n: int, dim: int) -> None:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(2, n // CLASS), dim)).astype(np.float32)
    out = np.lib.format.open_memmap(path, "w+", np.float16, (n, dim))
    for first in range(0, n, 65_536):
        own = np.arange(first, min(n, first + 65_536)) * len(centres) // n
        out[first : first + len(own)] = centres[own] + 0.7 * rng.standard_normal((len(own), dim), dtype=np.float32)
    out.flush()


def measure(path: str, by: str, order: str) -> dict:
    from protoprune import selection
    from protoprune.clustering import partition
    from protoprune.device import cores

    x = np.load(path, mmap_mode="r")
    n = len(x)
    ids = [f"{i:08d}.jpg" for i in range(n)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    if by == "class":
        groups = partition.split(x, np.arange(n) * max(2, n // CLASS) // n, partition.CLASS_SIZE, ids=ids)
    else:
        groups = partition.split(x, np.zeros(n, np.int64), partition.CLUSTER_SIZE, ids=ids)
    split = time.process_time() - cpu
    places = selection.cover(x, groups, ids=ids, method=order, workers=cores())
    assert np.isfinite(places).all()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"n": n, "by": by, "groups": int(groups.max()) + 1, "split_cpu": round(split, 1),
            "cpu": round(time.process_time() - cpu, 1), "wall": round(time.perf_counter() - wall, 1),
            "peak_mib": peak // 1024}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", action="append", help="images: 50000,200000; repeatable")
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--order", default="cover")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options.order)))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for n in whole_numbers(options.size or SIZES, "--size", example=SIZES):
            path = os.path.join(folder, f"{n}.npy")
            features(path, n, options.dim)
            for by in ("class", "cluster"):
                command = [sys.executable, __file__, "--order", options.order, "--one", path, by]
                rows.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
                print(rows[-1], f"{1e6 * rows[-1]['cpu'] / n:.1f} CPU s a million", flush=True)
            os.unlink(path)
        for by in ("class", "cluster"):
            own = [row for row in rows if row["by"] == by]
            if len(own) > 1:
                slope = np.polyfit(np.log([row["n"] for row in own]), np.log([row["cpu"] for row in own]), 1)[0]
                print(f"{by}: CPU time grows as n^{slope:.2f}")


if __name__ == "__main__":
    main()
