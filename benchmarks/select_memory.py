"""How the memory of `protoprune` grows with the number of images: peak of the whole process, and its slope.

    python benchmarks/select_memory.py [--count 1000000,5000000] [--dim 32] [--rounds 3] [--folder DIR] [--only 1,2]

Writes a feature file of each size (ids as LAION's shards have them, 1,000 classes, tight made-up clusters of about
1,000 images, one image in fifty nearly a copy of another one) into a temporary folder under DIR, puts clusterings into
its cache, writes two score tables in an order of their own, and runs the command line as a user would, each time in a
new process. Prints a markdown table: CPU seconds, peak memory (ru_maxrss) at each size, and how many bytes an image it
grows from the first size to the last.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile

from protoprune.cli.options import whole_numbers

SELECT = ["select", "features.h5", "--keep"]
COMMANDS = (
    [*SELECT, "0.7"],
    [*SELECT, "0.7", "--manifest", "all.csv"],
    [*SELECT, "0.7", "--balance", "0.5"],
    [*SELECT, "0.7", "--order", "random"],
    [*SELECT, "0.7", "--dedup", "0.05", "--k"],  # and the number of clusters
    [*SELECT, "0.1", "--order", "cover"],
    [*SELECT, "0.1", "--order", "facility"],
    [*SELECT, "0.7", "--scores", "a.csv"],
    ["compare", "a.csv", "b.csv", "--features", "features.h5", "--keep", "0.5", "--bootstrap", "0"],
    ["report", "features.h5", "--no-thumbnails", "--duplicates", "0.001"],
    ["info", "features.h5"],
)
CLUSTER = 1000  # images
COUNTS = "1000000,5000000"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", action="append", help="images: 1000000,5000000; repeatable")
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder")
    parser.add_argument("--only", action="append", help="numbers of the commands to run, from 1: 1,4; repeatable")
    options = parser.parse_args()
    counts = whole_numbers(options.count or COUNTS, "--count", example=COUNTS)
    only = whole_numbers(options.only, "--only", example="1,4")
    commands = [one for number, one in enumerate(COMMANDS, 1) if not only or number in only]
    found = {}
    for n in counts:
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            path = os.path.join(scratch, "features.h5")
            # In a process of its own: what a process has used counts as the peak of those that it starts.
            maker = multiprocessing.get_context("spawn").Process(target=write, args=(path, n, options.dim))
            maker.start()
            maker.join()
            assert not maker.exitcode
            for number, arguments in enumerate(commands):
                arguments = [*arguments, str(n // CLUSTER)] if arguments[-1] == "--k" else arguments
                found[number, n] = [run(path, arguments) for _ in range(options.rounds)]
                print(f"{n:,}: {' '.join(arguments)}: {found[number, n]}", file=sys.stderr)
    table(commands, counts, found)


def shown(arguments: list[str]) -> str:
    return " ".join(one for one in arguments if not one.endswith(".h5")).removesuffix(" --k")


def table(commands, counts, found) -> None:
    heads = [f"{n / 1e6:g} M: CPU s (min-max), peak" for n in counts]
    print(f"| command | {' | '.join(heads)} | bytes an image |\n|---|{'---|' * len(counts)}---|")
    for number, arguments in enumerate(commands):
        cells, peaks = [], []
        for n in counts:
            seconds, memory = zip(*found[number, n], strict=True)
            peaks.append(statistics.median(memory))
            cells.append(
                f"{statistics.median(seconds):.1f} ({min(seconds):.1f}-{max(seconds):.1f}), "
                f"{min(memory) / 1e9:.2f}-{max(memory) / 1e9:.2f} GB"
            )
        slope = (peaks[-1] - peaks[0]) / max(counts[-1] - counts[0], 1)
        print(f"| {shown(arguments)} | {' | '.join(cells)} | {slope:.0f} |")


def run(path: str, arguments: list[str]) -> tuple[float, float]:
    """(CPU seconds, peak bytes) of one run with its list written to a file."""
    command = [sys.executable, "-m", "protoprune", *arguments]
    with open(path + ".kept", "wb") as kept:
        process = subprocess.Popen(command, stdout=kept, stderr=subprocess.PIPE, cwd=os.path.dirname(path))
        said = process.stderr.read().decode()
        _, code, usage = os.wait4(process.pid, 0)
    assert code == 0, said
    clusters = arguments[0] == "select" and not {"cover", "facility", "--scores"} & {*arguments}
    assert not clusters or "from the cache" in said, said
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def write(path: str, n: int, d: int) -> None:
    """The feature file, and clusterings of it in its cache, as `select` by itself and with --k asks for them."""
    import numpy as np

    from protoprune.clustering.prototypes import Clustering, cached
    from protoprune.features.featurefile import FeatureFile, PartialFile, create_partial
    from protoprune.images.listing import ImageList
    from protoprune.paths import Paths

    k = n // CLUSTER
    rng = np.random.default_rng(0)
    cluster = rng.integers(0, k, n).astype(np.int32)
    paths = Paths(n, lambda first, last: [b"%05d.tar/%09d.jpg" % (i // 10_000, i) for i in range(first, last)])
    ones, labels = np.ones(n, np.int64), rng.integers(0, 1000, n).astype(np.int32)
    images = ImageList("/data/images", paths, ones, ones, labels, [f"class {i:04d}" for i in range(1000)])
    made_by = {"encoder": "random", "weights_sha256": "0", "preprocess": "{}", "precision": "fp32", "store": "float16"}
    create_partial(path, images, d, made_by, [])
    partial, centres = PartialFile(path), rng.normal(size=(k, d)).astype(np.float32)
    for start in range(0, n, 50_000):
        rows = np.arange(start, min(start + 50_000, n))
        x = centres[cluster[rows]] + rng.normal(size=(len(rows), d)).astype(np.float32) / 2
        x[1::50] = x[::50] + 0.001
        cluster[rows[1::50]] = cluster[rows[::50]]
        partial.commit(rows, x.astype(np.float16), np.ones(len(rows), np.uint8), [""] * len(rows))
    partial.finish()
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    with FeatureFile(path) as file:
        for number in (1000, k):  # the first is `select`'s own choice, the number of classes

            def compute(**settings) -> Clustering:
                own, distance = cluster % settings["k"], rng.random(n).astype(np.float32)
                return Clustering(centres[: settings["k"]], own, distance, 0.0, 0, True, 25, n, "faiss")

            cached(
                path + ".clusters", file.provenance["uuid"], compute,
                k=number, spherical=True, seed=0, iterations=25, train_points=None, backend="auto",
            )  # fmt: skip
    score_table(os.path.join(os.path.dirname(path), "a.csv"), n, 1)
    score_table(os.path.join(os.path.dirname(path), "b.csv"), n, 2)


def score_table(path: str, n: int, seed: int) -> None:
    """One score an image, in an order of its own."""
    import numpy as np

    rng = np.random.default_rng(seed)
    with open(path, "w") as file:
        file.write("path,score\n")
        for some in np.array_split(rng.permutation(n), max(1, n // 100_000)):
            scores = rng.random(len(some)).tolist()
            rows = zip(some.tolist(), scores, strict=True)
            file.writelines(f"{i // 10_000:05d}.tar/{i:09d}.jpg,{x:.6f}\n" for i, x in rows)


if __name__ == "__main__":
    main()
