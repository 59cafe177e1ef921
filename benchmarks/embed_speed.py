"""End-to-end embedding against the plain loop a user would write and against the model's forward alone.

    python benchmarks/embed_speed.py [--images FOLDER] [--encoder NAME] [--size 500x375] [--count 200] [--rounds 3]

Without --images, JPEGs are generated. The modes run in turn, so that a drifting machine hurts all of them alike; the
ratios are taken within a round. Random weights: speed does not depend on them. Prints a markdown row.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

from protoprune.device import resolve_device
from protoprune.embedding.pipeline import embed, resolve_precision
from protoprune.encoders import Encoder, digest, load_encoder
from protoprune.images.decode import Preprocess
from protoprune.images.listing import list_folder, list_paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path)
    parser.add_argument("--encoder", default="vit_small_patch16_224.dino", help="a timm architecture, mini or lite0")
    parser.add_argument("--size", default="500x375", help="of generated JPEGs")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", help="of protoprune and of the forward; the plain loop is fp32")
    parser.add_argument("--batch-size", type=int)
    options = parser.parse_args()
    device = resolve_device(options.device)
    encoder = random_encoder(options.encoder)
    precision = resolve_precision(options.precision, device, encoder)
    batch = options.batch_size or (32 if device.type == "cpu" else 256)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.images or generate(Path(scratch) / "images", options.count, options.size)
        images = list_paths(list_folder(folder).paths[: options.count], folder)
        keep = images.paths
        modes = {
            "protoprune": lambda: ours(images, encoder, Path(scratch) / "f.h5", device, precision, batch),
            "plain": lambda: plain_loop(images, encoder, device, batch),
            "forward": lambda: forward_alone(encoder, device, precision, batch, len(keep)),
        }
        for mode in modes.values():
            mode()  # warm-up: file cache, thread pools, kernels
        rounds = [{name: len(keep) / timed(mode) for name, mode in modes.items()} for _ in range(options.rounds)]
    report(options.encoder, precision, device, len(keep), rounds)


def report(name: str, precision: str, device: torch.device, count: int, rounds: list[dict[str, float]]) -> None:
    median = {mode: statistics.median(one[mode] for one in rounds) for mode in rounds[0]}
    ratios = {mode: sorted(one["protoprune"] / one[mode] for one in rounds) for mode in ("plain", "forward")}
    middle = {mode: statistics.median(values) for mode, values in ratios.items()}
    columns = ("encoder", "device", "precision", "images", "protoprune", "plain loop, fp32", "forward alone")
    print("| " + " | ".join((*columns, "/ plain", "/ forward")) + " |")
    print("|---|---|---|---|---|---|---|---|---|")
    print(
        f"| {name} | {device} | {precision} | {count} x {len(rounds)} rounds | {median['protoprune']:.1f}/s "
        f"| {median['plain']:.1f}/s | {median['forward']:.1f}/s "
        f"| {middle['plain']:.2f} ({ratios['plain'][0]:.2f}-{ratios['plain'][-1]:.2f}) "
        f"| {middle['forward']:.2f} ({ratios['forward'][0]:.2f}-{ratios['forward'][-1]:.2f}) |"
    )


def timed(mode) -> float:
    started = time.perf_counter()
    mode()
    return time.perf_counter() - started


def random_encoder(name: str) -> Encoder:
    if name in ("mini", "lite0", "lite1", "lite2"):  # real weights that need no hub
        return load_encoder(name)
    model = timm.create_model(name, num_classes=0).eval().requires_grad_(False)
    preprocess = Preprocess.from_timm(timm.data.resolve_model_data_config(model))
    return Encoder(name, model, model.num_features, preprocess, digest(model))


def generate(folder: Path, count: int, size: str) -> Path:
    """JPEGs with detail at every scale, so that they take as long to decode as photographs of their size."""
    width, height = map(int, size.split("x"))
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(count):
        layers = [
            np.asarray(Image.fromarray(rng.integers(0, 256, (s, s, 3), np.uint8)).resize((width, height)), np.float32)
            for s in (4, 16, 64, 256)
        ]
        mixed = np.average(layers, axis=0, weights=(8, 4, 2, 1)).astype(np.uint8)
        Image.fromarray(mixed).save(folder / f"{i:05d}.jpg", quality=90)
    return folder


def ours(images, encoder: Encoder, out: Path, device, precision: str, batch: int) -> None:
    embed(images, encoder, out, device=str(device), precision=precision, batch_size=batch, overwrite=True)


class Files(torch.utils.data.Dataset):
    """What torchvision's ImageFolder does for a flat list: open, convert, transform."""

    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        with Image.open(Path(self.images.root) / self.images.paths[i]) as image:
            return self.transform(image.convert("RGB"))


def plain_loop(images, encoder: Encoder, device, batch: int) -> np.ndarray:
    """DataLoader with a worker a core, timm's transform, eager float32."""
    p = encoder.preprocess
    transform = timm.data.create_transform(
        (3, p.size, p.size), interpolation=p.interpolation, mean=p.mean, std=p.std, crop_pct=p.size / p.resize
    )
    model = encoder.model.to(device)
    loader = torch.utils.data.DataLoader(
        Files(images, transform), batch, num_workers=torch.get_num_threads(), pin_memory=device.type == "cuda"
    )
    with torch.inference_mode():
        return torch.cat([model(x.to(device, non_blocking=True)).cpu() for x in loader]).numpy()


def forward_alone(encoder: Encoder, device, precision: str, batch: int, count: int) -> None:
    """The ceiling: full batches of tensors that are on the device already, in the layout that protoprune uses."""
    import copy

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    model = copy.deepcopy(encoder.model).to(device=device, dtype=dtype, memory_format=torch.channels_last)
    size = encoder.preprocess.size
    x = torch.randn(batch, 3, size, size, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        for start in range(0, count, batch):
            model(x[: min(batch, count - start)])
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
