"""Train the bundled encoder `mini` from folders of images; labels are read only for the k-NN monitor.

Three stages, each saved under --out by rename and skipped when its file is there: a killed run continues where it was.
1. dictionaries: spherical k-means over whitened patches, one dictionary per scale (protoprune/encoders/mini.py);
2. views: pooled codes of several augmented views per image, in the leading directions of their covariance;
3. projection: linear discriminant analysis where every image is its own class: the directions in which views of one
   image agree and different images differ, scaled so that the views of an image scatter by 1 in each. This is the
   closed form of a linear contrastive or VICReg-like objective; its value is the share of variance between images.
"""

import argparse
import hashlib
import math
import os
import shutil
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from protoprune.encoders.mini import (
    MINI_DIM,
    MINI_INPUT_SIZE,
    MINI_MEAN,
    MINI_STD,
    PATCH,
    RANK,
    MiniEncoder,
    PatchDictionary,
)
from protoprune.files import replacing

PART = 2000  # images per file of views
BATCH = 16  # images coded at a time: larger batches leave the cache on a CPU
START = time.monotonic()


def log(*words):
    print(f"[{time.monotonic() - START:7.1f} s]", *words, flush=True)


def kept(path: Path, make) -> dict[str, Tensor]:
    """The tensors of this file; when it is not there yet, make() is called and its result saved by rename."""
    if not path.exists():
        tensors = {name: tensor.contiguous().cpu() for name, tensor in make().items()}
        with replacing(os.fspath(path)) as temporary:
            save_file(tensors, temporary)
    return load_file(path)


# --- images


def list_images(root: Path, first_classes: int | None) -> tuple[list[Path], list[int]]:
    """Image files of the class folders of root, sorted, and the number of each one's folder."""
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir())[:first_classes]
    pairs = [
        (file, label) for label, folder in enumerate(folders) for file in sorted(folder.rglob("*")) if file.is_file()
    ]
    if not pairs:
        raise SystemExit(f"{root}: no class folders with images")
    return [file for file, _ in pairs], [label for _, label in pairs]


def decode(path: Path) -> np.ndarray:
    """uint8 (S, S, 3): short side resized to S, bicubic, and centre crop, as at inference."""
    with Image.open(path) as image:
        image = image.convert("RGB")
        scale = MINI_INPUT_SIZE / min(image.size)
        image = image.resize(
            [max(MINI_INPUT_SIZE, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC
        )
        left, top = ((side - MINI_INPUT_SIZE) // 2 for side in image.size)
        return np.asarray(image.crop((left, top, left + MINI_INPUT_SIZE, top + MINI_INPUT_SIZE)))


def load_images(root: Path, first_classes: int | None, threads: int) -> dict[str, Tensor]:
    """images uint8 (n, 3, S, S) and labels (n,) of one data folder."""
    files, labels = list_images(root, first_classes)
    with ThreadPoolExecutor(threads) as pool:
        images = np.stack(list(pool.map(decode, files)))
    log(f"{root}: {len(files)} images of {max(labels) + 1} folders")
    return {"images": torch.from_numpy(images).permute(0, 3, 1, 2), "labels": torch.tensor(labels)}


def normalise(images: Tensor) -> Tensor:
    """uint8 or 0..1 float (n, 3, S, S) -> normalised float32."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (MINI_MEAN, MINI_STD))
    return (images - mean) / std


def augment(images: Tensor, config: dict, generator: torch.Generator) -> Tensor:
    """0..1 (n, 3, S, S) -> one random view each: resized crop, mirror, brightness, contrast, saturation, hue, grey."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(len(images)).uniform_(low, high, generator=generator).view(-1, 1, 1, 1).to(images.device)

    views = random_crops(images, config["smallest_area"], generator)
    low, high = 1 - config["colour"], 1 + config["colour"]
    views = views * uniform(low, high)
    mean = views.mean((1, 2, 3), keepdim=True)
    views = (views - mean) * uniform(low, high) + mean
    luma = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)
    grey = (views * luma).sum(1, keepdim=True)
    chroma = (views - grey) * uniform(low, high) * (uniform(0, 1) > config["grey"])
    turned = (chroma.roll(-1, 1) - chroma.roll(-2, 1)) / math.sqrt(3)  # chroma at 90 degrees around the grey axis
    angle = uniform(-config["hue"], config["hue"])
    return (grey + chroma * angle.cos() + turned * angle.sin()).clamp(0, 1)


def random_crops(images: Tensor, smallest_area: float, generator: torch.Generator) -> Tensor:
    """(n, 3, S, S) -> random part of each image at S x S again, mirrored half of the time."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(len(images)).uniform_(low, high, generator=generator)

    side, aspect = uniform(smallest_area, 1).sqrt(), uniform(math.log(3 / 4), math.log(4 / 3)).exp().sqrt()
    width, height = (side * aspect).clamp(max=1), (side / aspect).clamp(max=1)
    transform = torch.zeros(len(images), 2, 3)
    transform[:, 0, 0] = width * uniform(-1, 1).sign()
    transform[:, 1, 1] = height
    transform[:, 0, 2] = uniform(-1, 1) * (1 - width)
    transform[:, 1, 2] = uniform(-1, 1) * (1 - height)
    grid = functional.affine_grid(transform.to(images.device), images.shape, align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


# --- stage 1: dictionaries


def learn_dictionary(layer: PatchDictionary, images: Tensor, config: dict, seed: int) -> dict[str, Tensor]:
    """Fill in the whitening, the atoms and the threshold of one scale from images uint8 (n, 3, S, S)."""
    generator = torch.Generator().manual_seed(seed)
    patches = sample_patches(layer, images, config["patches_per_image"], generator)  # (m, 108) contrast-normalised
    values, vectors = torch.linalg.eigh(torch.cov(patches.T).double())
    whitening = (vectors / (values + 0.1).sqrt()).flip(1)[:, :RANK].float()  # 0.1: Coates & Ng
    whitening -= whitening.mean(0)  # changes nothing, as patches have mean 0; as a filter it takes it off
    layer.whiten.weight.data = whitening.T.reshape(RANK, 3, PATCH, PATCH).contiguous()
    layer.offset.data = patches.mean(0) @ whitening
    points = functional.normalize(patches @ whitening - layer.offset.data, dim=1).numpy()
    clustering = faiss.Kmeans(
        RANK,
        layer.atoms.out_features,
        niter=config["iterations"],
        spherical=True,
        seed=seed,
        max_points_per_centroid=len(points),  # all of them: faiss would take 256 per centroid
    )
    clustering.train(points)
    layer.atoms.weight.data = torch.from_numpy(clustering.centroids)
    layer.atoms.bias.data.fill_(-config["threshold"])
    cosine = clustering.obj[-1] / len(points)
    log(f"{len(clustering.centroids)} atoms at 1/{layer.shrink} from {len(points)} patches: mean cosine {cosine:.4f}")
    return dict(layer.named_parameters())


def sample_patches(layer: PatchDictionary, images: Tensor, per_image: int, generator: torch.Generator) -> Tensor:
    parts = []
    for batch in images.split(200):
        small = functional.avg_pool2d(normalise(batch), layer.shrink)
        patches = functional.unfold(small, PATCH).transpose(1, 2)  # (200, positions, 108)
        patches = patches[:, torch.randperm(patches.shape[1], generator=generator)[:per_image]].flatten(0, 1)
        centred = patches - patches.mean(1, keepdim=True)
        parts.append(centred / (centred.var(1, keepdim=True) + 10 / (255 * MINI_STD[0]) ** 2).sqrt())
    return torch.cat(parts)


# --- stage 2: views


def pooled_views(encoder: MiniEncoder, images: Tensor, config: dict, generator: torch.Generator, device: str):
    """Yield (n, 4 * all atoms) pooled codes of one view of images, batch by batch."""
    for batch in images.split(BATCH):
        yield encoder.pooled(normalise(augment(batch.to(device).float() / 255, config, generator)))


def leading_directions(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(n, d) centred points -> (d, count) orthonormal, about the leading eigenvectors, by subspace iteration."""
    basis = torch.randn(points.shape[1], count, generator=generator).to(points)
    for _ in range(3):
        basis = torch.linalg.qr(points.T @ (points @ basis))[0]
    return basis


def make_basis(encoder: MiniEncoder, images: Tensor, config: dict, seed: int, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    points = torch.cat(list(pooled_views(encoder, images[: config["basis_images"]], config, generator, device)))
    mean = points.mean(0)
    points -= mean
    basis = leading_directions(points, config["basis"], generator)
    share = (points @ basis).square().sum() / points.square().sum()
    log(f"basis: {basis.shape[1]} of {basis.shape[0]} directions hold {share:.3f} of the variance")
    return {"mean": mean, "basis": basis}


def make_views(encoder: MiniEncoder, images: Tensor, basis: dict, config: dict, seed: int, device: str) -> dict:
    """views float16 (n, per_image, basis) of one part of the images."""
    generator = torch.Generator().manual_seed(seed)
    mean, axes = basis["mean"].to(device), basis["basis"].to(device)
    views = []
    for _ in range(config["per_image"]):
        batches = pooled_views(encoder, images, config, generator, device)
        views.append(torch.cat([((batch - mean) @ axes).half() for batch in batches]))
    return {"views": torch.stack(views, dim=1)}


# --- stage 3: projection


def discriminants(views: Tensor, shrinkage: float) -> tuple[Tensor, Tensor]:
    """views (n, v, d) -> directions (d, d), best first, and the ratio of between- to within-image variance along each.

    Directions are scaled to a within-image variance of 1.
    """
    count, per_image, dim = views.shape
    total, within = (torch.zeros(dim, dim, dtype=torch.float64) for _ in range(2))
    mean = views.float().mean((0, 1))
    for part in views.float().split(PART):
        flat, spread = (part - mean).reshape(-1, dim), (part - part.mean(1, keepdim=True)).reshape(-1, dim)
        total += (flat.T @ flat).double() / (count * per_image)
        within += (spread.T @ spread).double() / (count * (per_image - 1))
    values, vectors = torch.linalg.eigh(within + shrinkage * within.diag().mean() * torch.eye(dim))
    whitener = vectors / values.sqrt()
    ratios, rotation = torch.linalg.eigh(whitener.T @ (total - within) @ whitener)
    return (whitener @ rotation).flip(1).float(), ratios.flip(0).float()


def fit_projection(encoder: MiniEncoder, basis: dict[str, Tensor], views: Tensor, config: dict) -> None:
    directions, ratios = discriminants(views, config["shrinkage"])
    for dim in sorted({16, 64, MINI_DIM}):
        between = (ratios[:dim] / (1 + ratios[:dim])).mean()
        log(f"objective: {between:.4f} of the variance in the first {dim} directions is between images")
    matrix = basis["basis"] @ directions[:, :MINI_DIM]
    encoder.project.weight.data = matrix.T.contiguous()
    encoder.project.bias.data = -(basis["mean"] @ matrix)


# --- monitor


@torch.inference_mode()
def monitor(encoder: MiniEncoder, images: Tensor, labels: Tensor, gallery: int, device: str) -> float:
    """Percent of images[gallery:] named rightly by their 20 nearest of images[:gallery], votes exp(cosine / 0.07)."""
    features = torch.cat([encoder(normalise(batch.to(device))).cpu() for batch in images.split(BATCH)])
    features = functional.normalize(features, dim=1)
    similarity, index = (features[gallery:] @ features[:gallery].T).topk(20, dim=1)
    votes = torch.zeros(len(index), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[:gallery][index], (similarity / 0.07).exp())
    return 100 * (votes.argmax(1) == labels[gallery:]).float().mean().item()


def report(encoder: MiniEncoder, data: dict, config: dict, seed: int, device: str) -> None:
    for name, (images, labels) in data.items():
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
        chosen = chosen[: config["gallery"] + config["queries"]]
        gallery = len(chosen) * config["gallery"] // (config["gallery"] + config["queries"])
        accuracy = monitor(encoder, images[chosen], labels[chosen], gallery, device)
        log(f"k-NN monitor, {name}: {accuracy:.1f} % ({gallery} gallery, {len(chosen) - gallery} queries)")


# --- all of it


def train(config: dict, folders: dict[str, Path], out: Path, device: str, threads: int) -> Path:
    seed = config["seed"]
    classes = config["data"]["first_classes"]
    data = {}
    for name, root in folders.items():
        load = partial(load_images, root, classes.get(name), threads)
        tensors = kept(out / f"images-{name}.safetensors", load)
        data[name] = (tensors["images"], tensors["labels"])
    images = mixture(data, config["views"]["images"], seed)
    encoder = MiniEncoder().requires_grad_(False).eval()
    for number, layer in enumerate(encoder.scales):
        sample = images[: config["dictionary"]["images"]]
        learn = partial(learn_dictionary, layer, sample, config["dictionary"], seed + number)
        layer.load_state_dict(kept(out / f"dictionary-{number}.safetensors", learn))
    use_fast_precision(encoder.to(device), device)
    basis = kept(out / "basis.safetensors", lambda: make_basis(encoder, images, config["views"], seed, device))
    views = []
    for number, part in enumerate(images.split(PART)):
        make = partial(make_views, encoder, part, basis, config["views"], seed + 1000 + number, device)
        views.append(kept(out / f"views-{number:03d}.safetensors", make)["views"])
        log(f"views of {sum(len(part) for part in views)} / {len(images)} images")
    fit_projection(encoder, basis, torch.cat(views), config["projection"])
    report(encoder.to(device), data, config["monitor"], seed, device)
    return write_weights(encoder, out / "mini.safetensors")


def mixture(data: dict, count: int, seed: int) -> Tensor:
    """About count images, uint8 (n, 3, S, S), the same number from each data folder, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    share = count // len(data)
    chosen = [images[torch.randperm(len(images), generator=generator)[:share]] for images, _ in data.values()]
    together = torch.cat(chosen)
    return together[torch.randperm(len(together), generator=generator)]


def use_fast_precision(encoder: MiniEncoder, device: str) -> None:
    """bfloat16 codes where the hardware has them: the averages over a quadrant hide the rounding."""
    if device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        for layer in encoder.scales:
            layer.precision = torch.bfloat16


def write_weights(encoder: MiniEncoder, path: Path) -> Path:
    weights = {name: parameter.detach().cpu().half().contiguous() for name, parameter in encoder.named_parameters()}
    with replacing(os.fspath(path)) as temporary:
        save_file(weights, temporary)
    return path


def check_folder(out: Path, config_file: Path) -> None:
    """Refuse to mix the stages of two configurations."""
    out.mkdir(parents=True, exist_ok=True)
    copy = out / "config.toml"
    if copy.exists() and copy.read_bytes() != config_file.read_bytes():
        raise SystemExit(f"{out} holds stages of another configuration ({copy}): choose another --out or delete it")
    shutil.copyfile(config_file, copy)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument(
        "--data", action="append", required=True, metavar="NAME=DIR", help="a folder of class folders; repeatable"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    check_folder(options.out, options.config)
    folders = {name: Path(root) for name, _, root in (pair.partition("=") for pair in options.data)}
    config = tomllib.loads(options.config.read_text())
    path = train(config, folders, options.out, options.device, options.threads)
    log(f"{path}: {path.stat().st_size} bytes, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
