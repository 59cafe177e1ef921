"""Images a second from every kind of source and by every launcher, against the plain folder and the plain shard loop.

    python benchmarks/source_speed.py [--from FOLDER] [--images 2000] [--shards 20] [--rounds 5] [--only tar,parquet]

The images of a folder (again and again, until there are enough; without one, JPEGs of 320 x 240 pixels are made) are
packed: the same bytes as a folder, as tars, packed tars, zips, Parquet, as a Hugging Face data set, and on an S3
server (moto's, a process of its own on 127.0.0.1). Each round embeds all of them once, in an order that is drawn anew,
with the encoder mini; ratios are taken within a round, so that other work on the machine hurts all alike.

Sources are timed from beginning to end, in one process that has its encoder; CPU is that of this process. Launchers are
the command line, on the tars, with all cores: timed from the moment at which each worker has finished a shard to the
last shard, so that start-up (till the first shard) does not count; it is said beside. CPU is that of the command's
processes in that time. Needs protoprune[tables,remote,ray], datasets and moto. Prints markdown rows.
"""

import argparse
import contextlib
import glob
import gzip
import io
import itertools
import os
import random
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from protoprune.device import cores
from protoprune.embedding.pipeline import embed
from protoprune.encoders import load_encoder
from protoprune.images.listing import list_folder, list_paths
from protoprune.shards.sharding import embed_shards
from protoprune.sources import find_shards

_TICK = os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="folder", help="folder of images; some are made without one")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--shards", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="sources and launchers, separated by commas; all of them else")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        packed = pack(Path(scratch), options)
        if wanted("S3", options.only):
            packed["S3 (tar)"] = upload(packed["tar"], stack)
        encoder = load_encoder("mini")
        ways = {name: source_way(name, where, encoder, options.images) for name, where in packed.items()}
        ways |= {name: launcher_way(arguments, packed["tar"], options) for name, arguments in LAUNCHERS.items()}
        ways = {name: way for name, way in ways.items() if name in ("folder", "loop") or wanted(name, options.only)}
        sources, launchers = ([name for name in ways if (name in LAUNCHERS) is one] for one in (False, True))
        for name in ways:
            timed(ways[name], scratch)  # file cache, kernels
        rounds = []
        for number in range(options.rounds):
            shuffled = random.Random(number)
            order = shuffled.sample(sources, len(sources)) + shuffled.sample(launchers, len(launchers))
            rounds.append({name: timed(ways[name], scratch) for name in order})
            print(f"round {number + 1}: {rounds[-1]}, load {os.getloadavg()}", file=sys.stderr)
        report(rounds, options)


def wanted(name: str, only: str) -> bool:
    return not only or any(one and name.startswith(one) for one in only.split(","))


def timed(way, scratch: str) -> tuple[float, float, float]:
    """(images a second, images a CPU second, seconds of start-up)."""
    with tempfile.TemporaryDirectory(dir=scratch) as place:
        return way(os.path.join(place, "features"))


def source_way(name: str, where: str, encoder, images: int):
    """Start to end: finding, listing, reading, decoding, embedding and writing."""

    def run(out: str) -> tuple[float, float, float]:
        started, used = time.perf_counter(), time.process_time()
        if name == "folder":
            n = embed(list_folder(where), encoder, f"{out}.h5", device="cpu").n
        elif name == "list":
            names = Path(where, "list.txt").read_text().splitlines()
            n = embed(list_paths(names, os.path.join(where, "folder")), encoder, f"{out}.h5", device="cpu").n
        else:
            n = embed_shards(find_shards(where), encoder, out, device="cpu").n
        assert n == images
        return n / (time.perf_counter() - started), n / (time.process_time() - used), 0.0

    return run


# --- launchers --------------------------------------------------------------------------------------------------------

LAUNCHERS = {
    "loop": [[]],
    "--devices": [["--devices", ",".join(["cpu"] * cores())]],
    "ranks": [["--rank", str(rank), "--world-size", str(cores())] for rank in range(cores())],
    "--engine ray": [["--engine", "ray", "--device", "cpu"]],
}


def launcher_way(arguments: list[list[str]], tars: str, options):
    """The command once for each list of arguments, at the same time; several commands have a core each."""
    workers = 1 if arguments == [[]] else cores()

    def run(out: str) -> tuple[float, float, float]:
        started, before = time.time(), children()
        command = [sys.executable, "-m", "protoprune", "embed", tars, "-o", out, "--encoder", "mini"]
        running = [
            subprocess.Popen(
                [*command, *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                preexec_fn=(lambda core=core: os.sched_setaffinity(0, {core})) if len(arguments) > 1 else None,
            )
            for core, more in zip(itertools.cycle(sorted(os.sched_getaffinity(0))), arguments)
        ]  # fmt: skip
        begun = ended = None
        while any(one.poll() is None for one in running):
            time.sleep(0.02)
            done = len(glob.glob(f"{out}/*.h5"))
            if begun is None and done >= workers:
                begun = processor(running)
            if done == options.shards and ended is None:
                ended = processor(running)
        assert not any(one.returncode for one in running)
        ends = sorted(os.stat(path).st_mtime for path in glob.glob(f"{out}/*.h5"))
        assert len(ends) == options.shards
        images = options.images * (options.shards - workers) / options.shards
        used = (ended or children() - before) - (begun or 0)
        return images / (ends[-1] - ends[workers - 1]), images / used if used > 0 else np.nan, ends[0] - started

    return run


def children() -> float:
    """CPU seconds of processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def processor(running: list[subprocess.Popen]) -> float:
    """CPU seconds so far of processes and all that descend from them."""
    parents: dict[int, list[int]] = {}
    used: dict[int, float] = {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError), open(path) as file:
            fields = file.read().rpartition(")")[2].split()
            pid = int(path.split("/")[2])
            parents.setdefault(int(fields[1]), []).append(pid)
            used[pid] = (int(fields[11]) + int(fields[12])) / _TICK
    todo, total = [one.pid for one in running], 0.0
    while todo:
        pid = todo.pop()
        total += used.get(pid, 0.0)
        todo += parents.get(pid, [])
    return total


# --- the same images in every form ------------------------------------------------------------------------------------


def pack(scratch: Path, options) -> dict[str, str]:
    """name -> where."""
    places = {name: scratch / name for name in ("folder", "tar", "tar.gz", "zip", "parquet")}
    for place in places.values():
        place.mkdir()
    rows = list(images(options))
    for name, data in rows:
        (places["folder"] / name).write_bytes(data)
    (scratch / "list.txt").write_text("".join(f"{name}\n" for name, _ in rows))
    for shard in range(options.shards):
        part = rows[shard * len(rows) // options.shards : (shard + 1) * len(rows) // options.shards]
        with tarfile.open(places["tar"] / f"{shard:04d}.tar", "w") as tar:
            for name, data in part:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        with (
            open(places["tar"] / f"{shard:04d}.tar", "rb") as plain,
            gzip.open(places["tar.gz"] / f"{shard:04d}.tar.gz", "wb", 6) as packed,
        ):
            shutil.copyfileobj(plain, packed)
        with zipfile.ZipFile(places["zip"] / f"{shard:04d}.zip", "w") as archive:
            for name, data in part:
                archive.writestr(name, data)
        table = pyarrow.table({"image": [{"bytes": data, "path": name} for name, data in part]})
        pyarrow.parquet.write_table(table, places["parquet"] / f"{shard:04d}.parquet", row_group_size=100)
    import datasets

    datasets.disable_progress_bars()
    saved = datasets.Dataset.from_dict({"image": [{"bytes": data, "path": None} for _, data in rows]})
    saved.cast_column("image", datasets.Image()).save_to_disk(str(scratch / "hf"), num_shards=options.shards)
    found = {name: str(place) for name, place in places.items()} | {"Arrow (Hugging Face)": str(scratch / "hf")}
    return {"folder": found.pop("folder"), "list": str(scratch), **found}


def images(options):
    """(name, bytes) of each image."""
    if options.folder:
        files = sorted(path for path in Path(options.folder).rglob("*") if path.is_file())
        files = random.Random(0).sample(files, min(len(files), options.images))
        for number in range(options.images):
            path = files[number % len(files)]
            yield f"{number:06d}{path.suffix.lower()}", path.read_bytes()
        return
    for number in range(options.images):
        rng = np.random.default_rng(number)
        small = Image.fromarray(rng.integers(0, 255, (15, 20, 3), np.uint8))
        pixels = np.asarray(small.resize((320, 240), Image.Resampling.BICUBIC), np.int16)
        pixels = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        yield f"{number:06d}.jpg", buffer.getvalue()


def upload(folder: str, stack) -> str:
    """The tars on an S3 server on this machine."""
    import fsspec

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stack.callback(server.wait)
    stack.callback(server.terminate)
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            break
        time.sleep(0.1)
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", **keys}
    store = fsspec.filesystem("s3")
    store.mkdir("bench")
    for path in sorted(Path(folder).iterdir()):
        store.put_file(str(path), f"bench/{path.name}")
    return "s3://bench"


def report(rounds: list[dict[str, tuple[float, float, float]]], options) -> None:
    what = f"images of {options.folder}" if options.folder else "JPEGs of 320x240"
    print(f"{options.images:,} {what} in {options.shards} shards, {cores()} cores, {options.rounds} rounds;")
    print("images/s and ratios: median (least-most)\n")
    print("| source or launcher | images/s | ratio | images a CPU second, ratio | to | start-up, s |")
    print("|---|---|---|---|---|---|")
    for name in rounds[0]:
        base = "loop" if name in LAUNCHERS else "folder"
        wall, processor = (_spread([one[name][i] / one[base][i] for one in rounds]) for i in (0, 1))
        start = f"{statistics.median(one[name][2] for one in rounds):.1f}" if name in LAUNCHERS else ""
        rates = [one[name][0] for one in rounds]
        rate = f"{statistics.median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f})"
        print(f"| {name} | {rate} | {wall} | {processor} | {base} | {start} |")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
