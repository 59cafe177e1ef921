"""A report of many images: seconds and bytes to write it, and how fast its slider answers in Chromium.

    python benchmarks/report_speed.py --n 1000000

Rows are made up (16 dimensions, 1,000 classes, names like ImageNet's, no images on the disk); the browser is real.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from protoprune import pruning
from protoprune.features.featurefile import PartialFile, create_partial
from protoprune.images.listing import ImageList, folder_labels
from protoprune.report import Options, page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        features = f"{folder}/features.h5"
        make(features, arguments.n)
        chosen = pruning.select(features, 0.7, k=1000, iterations=5, train_points=50_000)
        for title, options in (("hard", {}), ("balanced", {"balance": 0.5, "by": "class"})):
            rule = pruning.Rule(0.7, **options)
            started = time.perf_counter()
            html, told = page(pruning.prune(chosen.ranking, rule), Options(thumbnails=False))
            seconds = time.perf_counter() - started
            path = Path(folder, "report.html")
            path.write_bytes(html)
            line = {"rule": title, "n": arguments.n, "seconds": round(seconds, 1), "MB": round(len(html) / 1e6, 2)}
            print(json.dumps({**line, "saves": told["saves"], **answers(path)}))
        print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


def make(out: str, n: int) -> None:
    rng = np.random.default_rng(0)
    paths = sorted(f"n{i % 1000:08d}/n{i % 1000:08d}_{i // 1000}.JPEG" for i in range(n))
    labels, classes = folder_labels(paths)
    images = ImageList("/nowhere", paths, rng.integers(50_000, 200_000, n), np.arange(1, n + 1), labels, classes)
    names = ("encoder", "weights_sha256", "preprocess", "precision", "store")
    provenance = dict(zip(names, ("made-up", "0" * 64, "{}", "fp32", "float16"), strict=True))
    create_partial(out, images, 16, provenance, [])
    partial = PartialFile(out)
    centres = rng.standard_normal((1000, 16))
    for start in range(0, n, 100_000):
        rows = np.arange(start, min(n, start + 100_000))
        x = centres[labels[rows]] + 0.5 * rng.standard_normal((len(rows), 16))
        partial.commit(rows, x.astype(np.float16), np.ones(len(rows), np.uint8), [""] * len(rows))
    partial.finish()


def answers(path: Path) -> dict:
    """Seconds until the page is ready, and milliseconds that an answer of the slider takes, drawing included."""
    if not shutil.which("chromium"):
        return {"browser": "none here"}
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"):
        options.add_argument(flag)
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    browser.set_script_timeout(120)
    started = time.perf_counter()
    browser.get(path.as_uri())
    ready = "const d = arguments[0], w = () => document.documentElement.dataset.ready ? d(1) : setTimeout(w, 10); w()"
    browser.execute_async_script(ready)
    opened = time.perf_counter() - started
    times = browser.execute_async_script(
        """const done = arguments[0], slider = document.getElementById("keep"), times = [];
        const next = (stop) => {
          if (stop > 60) return done(times);
          const start = performance.now();
          slider.value = stop;
          slider.dispatchEvent(new Event("input"));
          requestAnimationFrame(() => { times.push(performance.now() - start); setTimeout(() => next(stop + 1), 0); });
        };
        next(20);"""
    )
    started = time.perf_counter()
    browser.execute_async_script("protoprune.listBytes().then((b) => arguments[0](b.length))")
    saved = time.perf_counter() - started
    browser.quit()
    return {"ready_s": round(opened, 2), "slider_median_ms": round(float(np.median(times)), 1),
            "slider_max_ms": round(max(times), 1), "list_s": round(saved, 2)}  # fmt: skip


if __name__ == "__main__":
    main()
