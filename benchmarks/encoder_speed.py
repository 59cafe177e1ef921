"""How many images a second does the bundled encoder take, and how many ViT-S/16 (timm, the size of DINO's smallest)?

python benchmarks/encoder_speed.py --threads 1

Forward pass only, float32, batches of 32 random images; the best of several rounds, taken in turns so that a busy
machine disturbs both alike.
"""

import argparse
import time

import timm
import torch

from protoprune.encoders.mini import MINI_INPUT_SIZE, load_mini

BATCH = 32


@torch.inference_mode()
def seconds(model: torch.nn.Module, images: torch.Tensor) -> float:
    begin = time.perf_counter()
    model(images)
    return time.perf_counter() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    models = {"mini": load_mini()[0], "vit_small_patch16_224": timm.create_model("vit_small_patch16_224").eval()}
    sizes = {"mini": MINI_INPUT_SIZE, "vit_small_patch16_224": 224}
    images = {name: torch.randn(BATCH, 3, size, size) for name, size in sizes.items()}
    best = dict.fromkeys(models, float("inf"))
    for _ in range(options.rounds + 1):  # the first round also warms up
        for name, model in models.items():
            best[name] = min(best[name], seconds(model, images[name]))
    for name in models:
        print(f"{name}: {BATCH / best[name]:.1f} images/s ({1000 * best[name] / BATCH:.2f} ms an image)")
    print(f"ratio: {best['vit_small_patch16_224'] / best['mini']:.1f}")


if __name__ == "__main__":
    main()
