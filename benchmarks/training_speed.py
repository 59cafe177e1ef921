"""Training against a plain PyTorch loop, and an ensemble of heads against one head after another.

    python benchmarks/training_speed.py [--rounds 3] [--images 768] [--heads 20] [--rows 50000] [--dim 192]
    python benchmarks/training_speed.py --accuracy TRAIN TEST [--rounds 3] [--images 5000] [--epochs 8] [--width 16]

The plain loop is ImageFolder, torchvision transforms and a DataLoader with a worker a core. Images are generated,
32 x 32. Everything is measured once in every round, so that what else the machine does meets all alike; a ratio is the
median of the rounds' ratios. Networks: the second of two epochs. Prints markdown tables. With --accuracy: CPU seconds
of training, and how right `cnn` is about the test folder after them, beside the plain network that it replaced.
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
from protoprune.training import heads, loop, models, recording
from protoprune.training.examples import Examples, load_examples
from protoprune.training.loop import Recipe
from protoprune.training.models import small_cnn

CPU = torch.device("cpu")
CLASSES, BATCH = 10, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int)
    parser.add_argument("--accuracy", nargs=2, metavar=("TRAIN", "TEST"))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--heads", type=int, default=20)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=192)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, {options.rounds} rounds\n")
    if options.accuracy:
        accuracy(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), options.images or 768)
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


def accuracy(options) -> None:
    """Both networks in turn, a seed a round; evaluation is not counted."""
    train, test = (load_examples(path, 32) for path in options.accuracy)
    rows = np.sort(np.random.default_rng(5).permutation(len(train))[: options.images or 5000])
    train = Examples(train.root, [train.paths[r] for r in rows], train.labels[rows], train.classes, train.inputs[rows])
    before = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "bias_lr": 1.0}
    print("| seed | network | CPU seconds: accuracy after each epoch |\n|---|---|---|")
    for seed in range(options.rounds):
        for name, make, recipe in (("cnn", small_cnn, {}), ("plain network, until 0.1", seven_convolutions, before)):
            recipe = Recipe.for_model("cnn", epochs=options.epochs, width=options.width, **recipe)
            models.small_cnn, curve, spent, started = make, [], 0.0, time.process_time()
            for state in loop.epochs(train, recipe, seed=seed, device=CPU):
                spent += time.process_time() - started
                right = (loop.predict(state.model, test) == test.labels).mean()
                curve.append(f"{spent:.1f}: {100 * right:.1f} %")
                started = time.process_time()
            print(f"| {seed} | {name} | {', '.join(curve)} |", flush=True)


def seven_convolutions(classes: int, width: int, images: torch.Tensor) -> nn.Module:
    """The `cnn` of the first days: seven 3x3 convolutions in three stages of w, 2w and 4w channels."""

    def conv(inside: int, outside: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(inplace=False)
        )

    def stage(inside: int, outside: int) -> nn.Sequential:
        return nn.Sequential(conv(inside, outside), nn.MaxPool2d(2), conv(outside, outside))

    return nn.Sequential(
        conv(3, width), stage(width, width), stage(width, 2 * width), stage(2 * width, 4 * width),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes),
    )  # fmt: skip


def plain(folder: str, width: int) -> float:
    """What one writes first."""
    steps = [
        transforms.RandomCrop(32, padding=4, padding_mode="reflect"), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3),
    ]  # fmt: skip
    images = datasets.ImageFolder(folder, transforms.Compose(steps))
    loader = DataLoader(images, BATCH, shuffle=True, drop_last=True, num_workers=cores(), persistent_workers=True)
    model = small_cnn(CLASSES, width, torch.randn(64, 3, 32, 32))
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
