"""The papers' experiments by name.

    python scripts/reproduce NAME [--size small|full] [--dataset NAME] [--encoder NAME] [--data .data]

Settings come from configs/NAME.toml, results go to results/NAME/ (results.json, tables as CSV, figure.png), and the run
ends with the paper's claims beside what was found. What is finished is not done again.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

from protoprune.errors import ProtopruneError

NAMES = (
    "theory", "cifar10", "svhn", "metrics", "k", "balance", "transfer", "calibration", "dynamic", "imagenet", "choice",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--size", choices=("small", "full"), default="small", help="two cores, minutes; or a GPU")
    parser.add_argument("--dataset", help="this data set alone, such as cifar10")
    parser.add_argument("--encoder", help="features of this encoder alone, such as lite0")
    parser.add_argument("--data", type=Path, default=Path(".data"), help="folder that holds the data sets")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--configs", type=Path, default=Path("configs"))
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    options = parser.parse_args()
    try:
        from lab import Lab, report

        experiment = importlib.import_module(f"experiment_{options.name}")
        for lab in Lab.open(
            options.name,
            options.size,
            options.data,
            options.results,
            options.configs,
            options.device,
            options.dataset,
            options.encoder,
        ):
            report(lab, experiment.run(lab))
    except ProtopruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: finished trainings are kept, and the same command goes on from them", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
