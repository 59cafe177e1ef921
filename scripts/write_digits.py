"""Write scikit-learn's scanned digits (1,797 real images, on every machine) as PNG class folders, for the demo."""

import argparse
import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits


def main(folder: Path) -> None:
    digits = load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(label) / f"{number:04d}.png"
        if not path.exists():  # an unchanged file keeps its time, so that a second demo embeds nothing
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(path)
    print(f"{len(digits.target):,} scanned digits in {folder}/", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    main(parser.parse_args().folder)
