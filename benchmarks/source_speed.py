"""Images a second from every kind of source and by every launcher, against the plain folder and the plain shard loop.

    python benchmarks/source_speed.py [--images 2000] [--shards 8] [--size 320x240] [--rounds 3] [--only tar,parquet]

JPEGs are generated and packed: the same bytes as a folder, as tars, zips, Parquet, as a Hugging Face data set, and on
an S3 server (moto's, a process of its own on 127.0.0.1). Each round embeds all of them once, in an order that is drawn
anew, with the encoder mini; ratios are taken within a round, so that other work on the machine hurts all alike. CPU is
that of this process. Launchers are timed from their first finished shard to the last, so that start-up does not count;
it is said beside. Needs protoprune[tables,remote,ray], datasets and moto. Prints markdown rows.
"""

import argparse
import contextlib
import io
import os
import random
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

from protoprune import cluster
from protoprune.embedding import embed
from protoprune.encoders import load_encoder
from protoprune.images import list_folder
from protoprune.sharding import embed_shards
from protoprune.sources import find_shards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--size", default="320x240")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1, help="processes of the launchers, and threads of the loops")
    parser.add_argument("--only", default="", help="sources and launchers, separated by commas; all of them else")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        packed = pack(Path(scratch), options.images, options.shards, options.size)
        if wanted("S3", options.only):
            packed["S3 (tar)"] = upload(packed["tar"], stack)
        encoder = load_encoder("mini")
        ways = {name: source_way(name, where, encoder, options) for name, where in packed.items()}
        ways |= launcher_ways(packed["tar"], encoder, options)
        ways = {name: way for name, way in ways.items() if name in ("folder", "loop") or wanted(name, options.only)}
        out = Path(scratch) / "out"
        out.mkdir()
        for name in ways:
            timed(ways[name], out / "warm-up")  # file cache, kernels
        rounds = []
        for number in range(options.rounds):
            order = random.Random(number).sample(list(ways), len(ways))
            rounds.append({name: timed(ways[name], out / f"{number}") for name in order})
    report(rounds, options)


def wanted(name: str, only: str) -> bool:
    return not only or any(one and name.startswith(one) for one in only.split(","))


def timed(way, out: Path) -> tuple[float, float, float]:
    """(images a second, seconds of start-up, seconds of this process's CPU)."""
    with tempfile.TemporaryDirectory(dir=out.parent) as place:
        started = time.process_time()
        return *way(Path(place) / "features"), time.process_time() - started


def source_way(name: str, where: str, encoder, options):
    """Start to end: finding, listing, reading, decoding, embedding and writing."""

    def run(out: Path) -> tuple[float, float]:
        started = time.perf_counter()
        if name == "folder":
            n = embed(list_folder(where), encoder, f"{out}.h5", device="cpu", workers=options.workers).n
        else:
            n = embed_shards(find_shards(where), encoder, out, device="cpu", workers=options.workers).n
        assert n == options.images
        return n / (time.perf_counter() - started), 0.0

    return run


def launcher_ways(tars: str, encoder, options) -> dict:
    """After start-up: from the first finished shard of each worker on."""

    def way(name: str):
        def run(out: Path) -> tuple[float, float]:
            ends: list[float] = []
            counts: list[int] = []

            def on_shard(one) -> None:
                ends.append(time.perf_counter())
                counts.append(one.embedded)

            how = {
                "loop": {"device": "cpu", "workers": options.workers},
                "--devices": {"devices": ["cpu"] * options.workers},
                "--engine ray": {"ray": True, "device": "cpu"},
            }[name]
            started = time.perf_counter()
            with cluster.connected("local") if "ray" in how else contextlib.nullcontext():
                embed_shards(find_shards(tars), encoder, out, on_shard=on_shard, **how)
            first = options.workers if name != "loop" else 1
            rate = sum(counts[first:]) / (ends[-1] - ends[first - 1])
            return rate, ends[0] - started

        return run

    return {name: way(name) for name in ("loop", "--devices", "--engine ray")}


def pack(scratch: Path, count: int, shards: int, size: str) -> dict[str, str]:
    """The same JPEGs in every form: name -> where."""
    width, height = map(int, size.split("x"))
    places = {name: scratch / name for name in ("folder", "tar", "zip", "parquet")}
    rows = []
    for place in places.values():
        place.mkdir()
    for number in range(count):
        rng = np.random.default_rng(number)
        pixels = np.asarray(Image.fromarray(rng.integers(0, 255, (height // 16, width // 16, 3), np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC), np.int16)  # fmt: skip
        pixels = np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
        rows.append((f"{number:06d}.jpg", buffer.getvalue()))
        (places["folder"] / rows[-1][0]).write_bytes(rows[-1][1])
    for shard in range(shards):
        part = rows[shard * count // shards : (shard + 1) * count // shards]
        with tarfile.open(places["tar"] / f"{shard:04d}.tar", "w") as tar:
            for name, data in part:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        with zipfile.ZipFile(places["zip"] / f"{shard:04d}.zip", "w") as archive:
            for name, data in part:
                archive.writestr(name, data)
        table = pyarrow.table({"image": [{"bytes": data, "path": name} for name, data in part]})
        pyarrow.parquet.write_table(table, places["parquet"] / f"{shard:04d}.parquet", row_group_size=100)
    import datasets

    datasets.disable_progress_bars()
    saved = datasets.Dataset.from_dict({"image": [{"bytes": data, "path": None} for _, data in rows]})
    saved.cast_column("image", datasets.Image()).save_to_disk(str(scratch / "hf"), num_shards=shards)
    return {name: str(place) for name, place in places.items()} | {"Hugging Face": str(scratch / "hf")}


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
    print(
        f"{options.images:,} JPEGs of {options.size} in {options.shards} shards, {options.workers} threads or workers,"
    )
    print(f"{options.rounds} rounds; images/s and ratios: median (least-most)\n")
    print("| source or launcher | images/s | ratio | in CPU | to | start-up, s |\n|---|---|---|---|---|---|")
    for name in rounds[0]:
        launcher = name in ("loop", "--devices", "--engine ray")
        base = "loop" if launcher else "folder"
        ratio = _spread([one[name][0] / one[base][0] for one in rounds])
        processor = "" if launcher else _spread([one[base][2] / one[name][2] for one in rounds])
        start = f"{statistics.median(one[name][1] for one in rounds):.1f}" if launcher else ""
        rate = statistics.median(one[name][0] for one in rounds)
        print(f"| {name} | {rate:,.0f} | {ratio} | {processor} | {base} | {start} |")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
