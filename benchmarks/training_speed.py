"""Training against a plain PyTorch loop, and an ensemble of heads against one head after another.

    python benchmarks/training_speed.py [--rounds 3] [--images 768] [--heads 20] [--rows 50000] [--dim 192]

The plain loop is ImageFolder, torchvision transforms and a DataLoader with a worker a core. Images are generated,
32 x 32. Everything is measured once in every round, so that what else the machine does meets all alike; a ratio is the
median of the rounds' ratios. Networks: the second of two epochs. Prints markdown tables.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from protoprune.device import cores, native_bf16
from protoprune.training import heads, loop, recording
from protoprune.training.examples import Examples, load_examples
from protoprune.training.loop import Recipe
from protoprune.training.models import small_cnn

CPU = torch.device("cpu")
CLASSES, BATCH = 10, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--heads", type=int, default=20)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=192)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, {options.rounds} rounds\n")
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), options.images)
        networks(folder, options.rounds)
    ensembles(options)


def write_images(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"c{i % CLASSES}" / f"{i:05d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)


def networks(folder: str, rounds: int) -> None:
    data = load_examples(folder, 32)
    few = Examples(data.root, data.paths[:BATCH], data.labels[:BATCH], data.classes, data.inputs[:BATCH])
    precisions = ("fp32", "bf16") if native_bf16(CPU) else ("fp32",)
    methods, base = {}, {}
    for width in (16, 32):
        plain_name = f"cnn, width {width}, plain PyTorch loop, fp32"
        methods[plain_name] = lambda width=width: plain(folder, width)
        for precision in precisions:
            name = f"cnn, width {width}, {precision}"
            methods[name] = lambda width=width, precision=precision: ours(data, "cnn", width, precision)
            base[name] = plain_name
    for precision in precisions:
        methods[f"resnet18, {precision}"] = lambda precision=precision: ours(few, "resnet18", 32, precision)
    methods["cnn, width 16, fp32: a recording pass"] = lambda: recording_pass(data)
    base["cnn, width 16, fp32: a recording pass"] = "cnn, width 16, fp32"
    rates = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            rates[name].append(method())
    table("network", "images/s", rates, base)


def ours(data: Examples, model: str, width: int, precision: str) -> float:
    recipe = Recipe.for_model(model, epochs=2, batch_size=BATCH, width=width, precision=precision)
    first, second = (state.seconds for state in loop.epochs(data, recipe, device=CPU))
    return BATCH * (len(data) // BATCH) / (second - first)


def recording_pass(data: Examples) -> float:
    """What recording costs after an epoch: every statistic of every example, without gradient norms."""
    recipe = Recipe.for_model("cnn", width=16, precision="fp32")
    model = loop.make_model(data, recipe, 0)
    started = time.perf_counter()
    recording._measure(model, data, recipe, False, None)
    return len(data) / (time.perf_counter() - started)


def plain(folder: str, width: int) -> float:
    """What one writes first."""
    steps = [
        transforms.RandomCrop(32, padding=4, padding_mode="reflect"), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3),
    ]  # fmt: skip
    images = datasets.ImageFolder(folder, transforms.Compose(steps))
    loader = DataLoader(images, BATCH, shuffle=True, drop_last=True, num_workers=cores(), persistent_workers=True)
    model = small_cnn(CLASSES, width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    for _ in range(2):
        started = time.perf_counter()
        for inputs, labels in loader:
            loss = nn.functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return BATCH * len(loader) / (time.perf_counter() - started)


def ensembles(options) -> None:
    rng = np.random.default_rng(0)
    n, count = options.rows, options.heads
    inputs = torch.from_numpy(rng.normal(size=(n, options.dim)).astype(np.float32))
    data = Examples("", [""] * n, rng.integers(0, CLASSES, n), [str(c) for c in range(CLASSES)], inputs)
    recipe = Recipe.for_model("head", epochs=1)
    subset = rng.random((count, n)) < 0.7
    few = max(1, count // 5)  # of those one after another a fifth is trained, and the time multiplied
    kept = {}

    def together() -> None:
        ((_, kept["ensemble"]),) = heads.epochs(data, recipe, subset, range(count), 0, CPU)

    def loop_of_one() -> None:
        for number in range(few):
            loop.fit(data, None, recipe, rows=np.flatnonzero(subset[number]), seed=number, device=CPU)

    methods = {
        "all at once": (together, 1),
        "one after another": (loop_of_one, count / few),
        "recording them": (lambda: heads.measure(kept["ensemble"], data, gradients=False), 1),
        "recording them with gradient norms": (lambda: heads.measure(kept["ensemble"], data, gradients=True), 1),
    }
    seconds = {name: [] for name in methods}
    for _ in range(options.rounds):
        for name, (method, times) in methods.items():
            started = time.perf_counter()
            method()
            seconds[name].append(times * (time.perf_counter() - started))
    print(f"\n{count} linear heads, each on 70 % of {n:,} x {options.dim}, {CLASSES} classes, one epoch:\n")
    table("heads", "seconds", seconds, dict.fromkeys(methods, "all at once"))


def table(what: str, unit: str, measured: dict[str, list[float]], base: dict[str, str]) -> None:
    print(f"| {what} | {unit} (median) | min-max | ratio | to |\n|---|---|---|---|---|")
    for name, values in measured.items():
        to = base.get(name, "")
        ratios = [a / b for a, b in zip(values, measured[to], strict=True)] if to else []
        digits = 0 if unit == "images/s" else 2
        low, middle, high = (f"{one:,.{digits}f}" for one in (min(values), statistics.median(values), max(values)))
        print(f"| {name} | {middle} | {low}-{high} | {f'{statistics.median(ratios):.2f}' if to else ''} | {to} |")


if __name__ == "__main__":
    main()
