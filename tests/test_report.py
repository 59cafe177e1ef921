"""The report: what the page is told, and, where Chromium is installed, what it shows there."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import encoded, picture, write_image
from typer.testing import CliRunner

from protoprune import pruning
from protoprune.cli import app
from protoprune.errors import UsageError
from protoprune.images.decode import Status
from protoprune.pruning import Rule
from protoprune.report import Options, maps, page, stops, thumbnails

RULES = {
    "hard": {},
    "easy": {"order": "easy", "drop_hardest": 0.13},
    "stratified": {"order": "stratified", "drop_hardest": 0.1},
    "class": {"balance": 0.7, "by": "class"},
    "cluster": {"balance": 0.5, "by": "cluster", "quota": "dbp"},
    "calibrated": {"calibrate": 0.4, "balance": 0.5},
}
FRACTIONS = ("0.01", "0.07", "0.29", "0.5", "0.735", "1.0")


def options_of(rule: dict) -> list[str]:
    return [part for name, value in rule.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture
def many(feature_file, tmp_path):
    """A feature file of 150 images in three uneven classes, some failed, some near-duplicates."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((150, 8))
    x[::10] = x[1::10] + 0.001
    names = [f"{'abc'[min(2, i // 70)]}/{i:03d}.png" for i in range(150)]
    return feature_file(tmp_path / "f.h5", x, paths=names, failed={3: Status.CORRUPT, 77: Status.EMPTY})


# --- what the page is told -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dedup", [None, 0.05])
def test_stops_are_the_kept_sets_of_select(many, name, dedup):
    rule = Rule(0.735, **RULES[name])
    chosen = pruning.select(many, rule, k=5, dedup=dedup)
    found = stops.find(chosen.ranking, rule)
    assert found.fractions[found.initial] == 0.735
    assert len(found.fractions) == 101
    for stop in (0, 6, 28, found.initial, 100):
        if not found.counts[stop]:
            assert not found.kept(stop).any()
            continue
        expected = pruning.prune(chosen.ranking, replace(rule, keep=found.fractions[stop])).keep
        assert (found.kept(stop) == expected).all()
    assert (found.kept(found.initial) == chosen.keep).all()


def test_a_fraction_that_keeps_nothing_keeps_nothing(feature_file, tmp_path):
    path = feature_file(tmp_path / "f.h5", np.eye(20))
    ranking = pruning.rank(path, k=2)
    found = stops.find(ranking, Rule(0.7))
    assert found.counts[:3] == [0, 0, 1]  # round(0.01 * 20), round(0.02 * 20), round(0.03 * 20)
    assert [int(found.kept(stop).sum()) for stop in range(5)] == found.counts[:5]


def test_table_counts_what_each_group_keeps():
    first = np.array([0, 2, stops.NEVER, 1, 0], np.uint8)
    groups = np.array([1, 0, 0, 1, -1])
    assert stops.table(first, groups, 2, 3).tolist() == [[0, 1], [0, 2], [1, 2]]


def test_pca_is_that_of_the_svd():
    x = np.random.default_rng(0).standard_normal((40, 6)) * [5, 3, 1, 1, 1, 1]
    found, how = maps.project(x)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    u, s, _ = np.linalg.svd(unit - unit.mean(axis=0), full_matrices=False)
    for axis in range(2):
        assert abs(np.corrcoef(found[:, axis], u[:, axis])[0, 1]) > 0.9999
    assert f"{100 * (s[:2] ** 2).sum() / (s**2).sum():.0f} %" in how
    assert found.min() == 0
    assert found.max() == 1


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_map_of_hardly_any_images(n):
    found, _ = maps.project(np.ones((n, 4), np.float32))
    assert found.shape == (n, 2)
    assert np.isfinite(found).all()


def test_thumbnails_stay_within_their_budget_and_drop_the_last():
    noise = [encoded(picture(90, 90, seed=i), "PNG") for i in range(300)]
    missing = {5}

    def read(row: int) -> bytes:
        if row in missing:
            raise FileNotFoundError
        return noise[row]

    sprites = thumbnails.make(range(300), read, 10_000_000)
    assert len(sprites.images) == 3  # 299 of them, 144 a sprite
    assert sprites.place[5] == thumbnails.MISSING
    assert sorted(place for place in sprites.place.values() if place >= 0) == list(range(299))
    budget = len(sprites.images[0]) + 100
    fewer = thumbnails.make(range(300), read, budget)
    assert sum(map(len, fewer.images)) <= budget
    assert 0 < max(fewer.place.values()) < 299
    assert 0 in fewer.place


def test_a_thumbnail_shows_its_image():
    from io import BytesIO

    from PIL import Image

    sprites = thumbnails.make(
        [7, 8],
        lambda row: encoded(Image.new("RGB", (50, 30), (255, 0, 0) if row == 7 else (0, 0, 255)), "PNG"),
        100_000,
    )
    sheet = np.asarray(Image.open(BytesIO(sprites.images[0])).convert("RGB")).astype(int)
    for row, colour in ((7, 0), (8, 2)):
        x = sprites.place[row] * thumbnails.SIDE
        assert sheet[: thumbnails.SIDE, x : x + thumbnails.SIDE].mean(axis=(0, 1)).argmax() == colour


def test_a_page_without_thumbnails_reads_no_image_and_holds_none(many):
    html, told = page(pruning.select(many, 0.7), Options(thumbnails=False))
    assert told["thumbnails"] == told["missing"] == 0
    assert b"webp" not in html.split(b"<script")[0]
    assert b'class="sprite"' not in html
    assert b"This page holds no copies of images" in html


def test_missing_images_are_counted(many):
    html, told = page(pruning.select(many, 0.7))
    assert told["missing"] == 148
    assert b"148 images could not be read any more" in html


def test_the_page_is_small_and_has_a_strict_policy(many):
    html, told = page(pruning.select(many, 0.7))
    assert len(html) == told["bytes"] < 100_000
    policy = html.split(b'Content-Security-Policy" content="')[1].split(b'"')[0].decode()
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert b" on" + b"click=" not in html
    assert b" style=" not in html


def test_options_that_do_not_fit_are_refused(many):
    chosen = pruning.select(many, 0.7)
    with pytest.raises(UsageError, match="--map sne: expected one of pca, umap, tsne"):
        page(chosen, Options(map="sne"))
    with pytest.raises(UsageError, match="--duplicates 2"):
        page(chosen, Options(duplicates=2))
    with pytest.raises(UsageError, match="--evaluation nowhere: no such folder"):
        page(chosen, Options(evaluation="nowhere"))


# --- the command -----------------------------------------------------------------------------------------------------


def test_command(many, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(app, ["report", "f.h5", "--keep", "0.3", "--balance", "0.5", "--k", "4", "-o", "r.html"])
    assert run.exit_code == 0, run.output
    assert run.stdout == ""
    assert "kB, 0 thumbnails; open it in any browser" in run.stderr
    assert "148 images could not be read any more, or changed since; --root says where" in run.stderr
    data = json.loads(Path("r.html").read_text().split('id="data">')[1].split("</script>")[0])
    assert data["command"] == ["protoprune select f.h5 --keep ", " --balance 0.5 --k 4 > kept.txt"]
    idle = ["--scores", "s.csv", "--duplicates", "0.1"]  # which makes no clusters to look for them in
    for wrong in (["-o", "-"], ["-o", "f.h5"], ["--keep", "70"], idle):
        run = CliRunner().invoke(app, ["report", "f.h5", *wrong])
        assert run.exit_code == 2
        assert len(run.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(("option", "said"), [("--scores", "scores: "), ("--compare", "t.csv: ")])
def test_how_a_table_was_read_is_said(many, tmp_path, monkeypatch, option, said):
    """What direction was assumed, and rows that name no image: `select` said them, and `report` did not."""
    monkeypatch.chdir(tmp_path)
    names = "".join(f"{path},{row}\n" for row, path in enumerate(pruning.select(many, 1.0).kept_paths))
    Path("t.csv").write_text(f"path,score\n{names}gone.png,1\n")
    run = CliRunner().invoke(app, ["report", "f.h5", option, "t.csv", "--no-thumbnails", "-o", "r.html"])
    assert run.exit_code == 0, run.output
    assert f"{said}a higher score is taken as harder, since the table does not say" in run.stderr
    assert "1 table row names no image, first gone.png" in run.stderr


def test_weights_are_in_the_list_that_the_page_names(many, tmp_path, monkeypatch):
    """The saved list has none, and nothing said so."""
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(app, ["report", "f.h5", "--calibrate", "0.5", "--no-thumbnails", "-o", "r.html"])
    assert run.exit_code == 0, run.output
    html = Path("r.html").read_text()
    assert "The list that this page saves holds no weights; the command's does." in html
    assert '"command":["protoprune select f.h5 --keep "," --calibrate 0.5 -o kept.csv"]' in html


def test_a_page_made_in_python_names_no_command_that_would_make_another_list(many):
    html, _ = page(pruning.select(many, 0.3, order="easy"))
    assert b"The command that makes this list" not in html
    assert b'"command":null' in html


def test_names_that_are_no_utf8_are_escaped_wherever_they_come_from(many, tmp_path):
    """Class names in the results of `evaluate`, and what an import calls its encoder, ended in a UnicodeEncodeError."""
    method = {
        "name": "k\udcff", "kept": 75, "fraction": 0.5, "accuracy": {"mean": 0.9}, "worst_class": "c\udcfe\u202e",
        "worst_class_accuracy": 0.71,
    }  # fmt: skip
    (tmp_path / "results.json").write_text(json.dumps({"methods": [method]}))
    chosen = pruning.select(many, 0.5)
    chosen.ranking.source.provenance["encoder"] = "e\udcfd<"
    html, _ = page(chosen, Options(thumbnails=False, evaluation=os.fspath(tmp_path)))
    for name in (b"k\\udcff", b"c\\udcfe\\u202e", b"e\\udcfd&lt;"):
        assert name in html


def test_results_of_evaluate_stand_on_the_page(many, tmp_path):
    from protoprune.errors import ProtopruneError

    comparison = {"difference": 0.012, "low": 0.004, "high": 0.02, "seeds_low": 0.006, "seeds_high": 0.018, "p": 0.01}
    method = {
        "name": "kept<.txt", "kept": 75, "fraction": 0.5, "accuracy": {"mean": 0.9, "low": 0.89, "high": 0.91},
        "to_random": {**comparison, "n": 5, "verdict": "better"},
        "to_everything": {"mean": -0.0002, "low": -0.01, "high": 0.0004},
        "to_classes": {**comparison, "difference": -0.01, "n": 5, "verdict": "worse"},
        "worst_class": "b", "worst_class_accuracy": 0.71,
    }  # fmt: skip
    folder = tmp_path / "pays"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps({"methods": [method]}))
    html, _ = page(pruning.select(many, 0.5), Options(thumbnails=False, evaluation=os.fspath(folder)))
    assert b"kept&lt;.txt: better than random by 1.2 points (0.4 to 2.0, 5 seeds)" in html
    assert b"5 seeds); worse than random images of the same class counts by 1.0 points" in html
    assert b'<td class="number">+1.2 (+0.4 to +2.0)</td>' in html
    assert b'<td class="number">+0.0 (-1.0 to +0.0)</td>' in html  # as `evaluate` prints it, and no minus before a zero
    for other in ({}, [], {"methods": 3}, {"methods": ["x"]}, {"methods": [{**method, "to_random": [1]}]},
                  {"methods": [{**method, "kept": "many"}]}, {"methods": [{**method, "accuracy": None}]}):  # fmt: skip
        (folder / "results.json").write_text(json.dumps(other))
        with pytest.raises(ProtopruneError, match="not results of `evaluate`"):
            page(pruning.select(many, 0.5), Options(evaluation=os.fspath(folder)))
    (folder / "results.json").write_text(json.dumps({"answer": "keep 30%", "environment": {}}))  # of tune
    with pytest.raises(ProtopruneError, match="results of another command"):
        page(pruning.select(many, 0.5), Options(evaluation=os.fspath(folder)))


# --- in a browser ----------------------------------------------------------------------------------------------------

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1300,1000"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium here (Debian's packages chromium and chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*_FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    found.set_script_timeout(60)
    yield found
    found.quit()


def show(browser, path: Path) -> None:
    """Open a page and wait until it is ready; what was logged before is thrown away."""
    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(path.resolve().as_uri())
    assert browser.execute_async_script(
        "const done = arguments[0]; const wait = () => document.documentElement.dataset.ready ? done(true) : "
        "setTimeout(wait, 20); wait();"
    )


def kept_in(browser, fraction: str) -> bytes:
    """What the page saves with its slider at a fraction."""
    hexed = browser.execute_async_script(
        """const [fraction, done] = arguments, slider = document.getElementById("keep");
        const stops = JSON.parse(document.getElementById("data").textContent).stops.map(Number);
        slider.value = stops.indexOf(Number(fraction));
        slider.dispatchEvent(new Event("input"));
        const hex = (b) => b.toString(16).padStart(2, "0");
        protoprune.listBytes().then((bytes) => done(Array.from(bytes, hex).join("")));
        """,
        fraction,
    )
    return bytes.fromhex(hexed)


def quiet(browser) -> None:
    """No error on the console, and nothing asked for but the page itself and what is in it."""
    assert [one for one in browser.get_log("browser") if one["level"] in ("SEVERE", "WARNING")] == []
    asked = [json.loads(one["message"])["message"] for one in browser.get_log("performance")]
    urls = [one["params"]["request"]["url"] for one in asked if one["method"] == "Network.requestWillBeSent"]
    assert len([url for url in urls if url.startswith("file:")]) == 1
    assert [url for url in urls if not url.startswith(("file:", "data:", "blob:", "about:"))] == []


@pytest.mark.parametrize("name", RULES)
def test_the_browser_keeps_what_select_writes(browser, many, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rule = [*options_of(RULES[name]), "--k", "5"] + (["--dedup", "0.05"] if name in ("class", "calibrated") else [])
    made = CliRunner().invoke(app, ["report", "f.h5", "--keep", "0.735", *rule, "--no-thumbnails", "-o", "r.html"])
    assert made.exit_code == 0, made.output
    show(browser, tmp_path / "r.html")
    end = "-o kept.csv" if "calibrate" in RULES[name] else "> kept.txt"
    for fraction in FRACTIONS:
        written = CliRunner().invoke(app, ["select", "f.h5", "--keep", fraction, *rule])
        assert written.exit_code == 0, written.output
        assert kept_in(browser, fraction) == written.stdout_bytes
        number = len(written.stdout_bytes.splitlines())
        assert browser.find_element("id", "card-kept").text == f"{number:,}"
        assert browser.find_element("id", "command").text == " ".join(
            ["protoprune select f.h5 --keep", fraction, *_in_order(rule), end]
        )
        shares = browser.execute_script(
            "return [...document.querySelectorAll('#class-table tbody tr')]"
            ".map(row => [row.cells[0].textContent, row.cells[2].textContent])"
        )
        by_class = {c: sum(line.startswith(c.encode()) for line in written.stdout_bytes.splitlines()) for c in "abc"}
        assert dict(shares) == {c: f"{count:,}" for c, count in by_class.items()}
    quiet(browser)


def _in_order(rule: list[str]) -> list[str]:
    """Options in the order in which the command has them."""
    names = ["--order", "--drop-hardest", "--quota", "--balance", "--by", "--calibrate", "--dedup", "--k"]
    pairs = dict(zip(rule[::2], rule[1::2], strict=True))
    return [part for name in names if name in pairs for part in (name, pairs[name])]


def test_saving_writes_the_list(browser, many, tmp_path):
    html, _ = page(pruning.select(many, 0.5))
    (tmp_path / "r.html").write_bytes(html)
    folder = tmp_path / "downloads"
    browser.execute_cdp_cmd("Page.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    show(browser, tmp_path / "r.html")
    browser.find_element("id", "save").click()
    for _ in range(200):
        if (folder / "kept.txt").exists():
            break
        browser.execute_async_script("setTimeout(arguments[0], 50)")
    expected = pruning.select(many, 0.5).kept_paths
    assert (folder / "kept.txt").read_text() == "".join(f"{path}\n" for path in expected)


def test_hostile_names_are_inert(browser, tmp_path, monkeypatch):
    from protoprune import embed, list_folder, load_encoder

    names = [
        "<img src=x onerror=window.hurt=1>",
        "a<",
        '"><svg onload=window.hurt=1>',
        "'quoted' & {{ 7 * 7 }}",
        "line\nbreak",
        os.fsdecode(b"latin-\xe9"),
    ]
    for number, name in enumerate(names):
        for i in range(3):
            inside = "script><script>window.hurt=1<" if name == "a<" else "x"
            folder = tmp_path / "images" / name
            write_image(folder / (inside if i == 0 else f"{i}") / f"<b>{i}</b>.png", seed=10 * number + i, format="PNG")
    (tmp_path / "images" / "a<" / "script>broken<.png").write_bytes(b"")
    features = os.fspath(tmp_path / "f.h5")
    embed(list_folder(tmp_path / "images"), load_encoder("mini"), features, device="cpu")
    html, told = page(pruning.select(features, 0.5, k=3))
    assert told["why"].startswith("3 file names hold a line break")
    (tmp_path / "r.html").write_bytes(html)
    show(browser, tmp_path / "r.html")
    assert browser.execute_script("return window.hurt") is None
    assert len(browser.find_elements("css selector", "b, svg, img")) == 0
    text = browser.find_element("tag name", "body").text
    for shown in (names[0], names[2], names[3], "line\\nbreak", "broken<.png"):
        assert shown in text
    quiet(browser)


def test_keyboard_and_accessibility(browser, image_tree, tmp_path):
    axe = pytest.importorskip("axe_core_python")
    from selenium.webdriver.common.keys import Keys

    from protoprune import embed, list_folder, load_encoder

    features = os.fspath(tmp_path / "f.h5")
    root = image_tree({"ant": 12, "bee": 12, "cow": 12})
    (root / "ant" / "none.png").write_bytes(b"not an image")
    embed(list_folder(root), load_encoder("mini"), features, device="cpu")
    table = tmp_path / "other.csv"
    scored = [f"{path.relative_to(root)},{i}" for i, path in enumerate(sorted(root.rglob("0*.png")))]
    table.write_text("\n".join(["path,score", *scored, ""]))
    html, _ = page(pruning.select(features, 0.5, dedup=0.2), Options(tables=[os.fspath(table)]))
    (tmp_path / "r.html").write_bytes(html)
    show(browser, tmp_path / "r.html")
    slider = browser.find_element("id", "keep")
    slider.send_keys(Keys.ARROW_LEFT)
    assert browser.find_element("id", "percent").text == "49 %"
    slider.send_keys(Keys.HOME)
    assert browser.find_element("id", "percent").text == "1 %"
    assert not browser.find_element("id", "save").is_enabled()  # 1 % of 36 is none, which select refuses too
    slider.send_keys(Keys.END)
    assert browser.find_element("id", "percent").text == "100 %"
    browser.execute_script((Path(axe.__file__).parent / "axe.min.js").read_text())
    for theme in ("light", "dark"):
        browser.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
        found = browser.execute_async_script("axe.run().then(arguments[0])")["violations"]
        assert [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")] == []
    for width in (360, 1600):
        browser.set_window_size(width, 1000)
        wide = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert wide[0] <= wide[1]
    browser.set_window_size(1300, 1000)
    quiet(browser)


def test_colours_of_the_map_follow_the_slider(browser, many, tmp_path):
    html, _ = page(pruning.select(many, 0.5), Options(thumbnails=False))
    (tmp_path / "r.html").write_bytes(html)
    show(browser, tmp_path / "r.html")
    count = """const c = document.getElementById("map");
        const d = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
        let blue = 0;
        for (let i = 0; i < d.length; i += 4) if (d[i + 3] && d[i + 2] > d[i] + 60) blue++;
        return blue;"""
    browser.execute_script("document.getElementById('map').scrollIntoView()")
    wait = "setTimeout(() => requestAnimationFrame(() => requestAnimationFrame(arguments[0])), 200)"
    seen = {}
    for fraction in ("0.1", "0.5", "1.0"):
        kept_in(browser, fraction)
        browser.execute_async_script(wait)
        seen[fraction] = browser.execute_script(count)
    assert 0 < seen["0.1"] < 0.4 * seen["0.5"] < 0.4 * seen["1.0"]
