"""`protoprune metrics` and `protoprune score` as a user runs them."""

from __future__ import annotations

import csv
import errno
import io
import logging

import numpy as np
import pytest
from test_metrics import FakeFeatures, planted_features, small_record, write_record
from typer.testing import CliRunner

from protoprune import scores
from protoprune.cli import app
from protoprune.features.featurefile import FeatureFile
from protoprune.images.decode import Status
from protoprune.metrics import catalogue
from protoprune.metrics.catalogue import METRICS, score

PATHS = [f"{'ab'[i % 2]}/{i:03d}.png" for i in range(60)]


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def rows_of(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return list(csv.reader(io.StringIO("\n".join(lines))))


@pytest.fixture
def here(tmp_path, monkeypatch, feature_file):
    """features.h5 of 60 images in two classes, of which the sixth could not be read."""
    monkeypatch.chdir(tmp_path)
    feature_file(tmp_path / "features.h5", planted_features(60)[0], paths=PATHS, failed={5: Status.TRUNCATED})
    return tmp_path


@pytest.fixture
def recorded(here, monkeypatch):
    """A record named record.h5, and what it holds."""
    record = small_record()
    (here / "record.h5").touch()
    opened = []
    monkeypatch.setattr(catalogue, "open_source", lambda _, path, is_record: opened.append(is_record) or record)
    record.opened = opened
    return record


def score_module_of():
    import sys

    return sys.modules["protoprune.cli.score"]  # `protoprune.cli.score` is the command


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_lists_every_metric_on_stdout():
    result = run("metrics")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split()[:4] == ["metric", "needs", "labels", "training"]
    assert [line.split()[0] for line in lines[1:]] == list(METRICS)
    for line, metric in zip(lines[1:], METRICS.values(), strict=True):
        assert metric.source in line
        assert metric.summary in line
        assert line.split()[1:4] == [
            metric.needs,
            *("yes" if one else "no" for one in (metric.labels, metric.training)),
        ]
    assert "protoprune score METRIC" in result.stderr


def test_metrics_on_a_terminal_is_a_table(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    score_module_of().metrics()
    shown = capsys.readouterr().out
    assert "┃" in shown
    assert all(name in shown for name in METRICS)


# --- score -----------------------------------------------------------------------------------------------------------


def test_a_score_table_from_a_feature_file(here):
    result = run("score", "supervised-prototypes", "--features", "features.h5", "-o", "scores.csv")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    with FeatureFile("features.h5") as file:
        paths, expected, uuid = file.paths, score("supervised_prototypes", file).values, file.provenance["uuid"]
    table = scores.read_table("scores.csv")
    read = scores.read_scores("scores.csv", paths)
    np.testing.assert_array_equal(read.scores.astype(np.float32), expected)
    assert read.missing == 1
    header = (here / "scores.csv").read_text().splitlines()[0]
    for part in (
        '"metric": "supervised_prototypes"',
        '"higher": "harder"',
        uuid,
        '"from": "features.h5"',
        '"classes": 2',
    ):
        assert part in header
    assert table.scores.dtype.kind == "f"
    assert "supervised_prototypes of 60 images from features.h5" in result.stderr
    values = expected[~np.isnan(expected)]
    assert f"quartiles {np.quantile(values, 0.25):.4g}, {np.median(values):.4g}" in result.stderr
    assert (
        "without a score: 1 image (unreadable, without a class, or with features that are all zeros)," in result.stderr
    )


def test_without_out_the_table_is_on_stdout(here, monkeypatch):
    """Also where nothing can be written, as in a container with a read-only root."""

    def none(*_, **__):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/var/tmp']")

    run("score", "random", "--seed", 4, "-o", "scores.csv")
    monkeypatch.setattr("tempfile._get_default_tempdir", none)
    monkeypatch.setattr("tempfile.tempdir", None)
    result = run("score", "random", "--seed", 4)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == (here / "scores.csv").read_text()
    assert run("score", "random", "--seed", 4, "-o", "-").stdout == result.stdout
    rows = rows_of(result.stdout)
    assert rows[0] == ["path", "score"]
    assert [path for path, _ in rows[1:]] == sorted(PATHS)
    assert not logging.getLogger("matplotlib").isEnabledFor(logging.WARNING)  # of a home that is not writable
    monkeypatch.setattr("protoprune.metrics.catalogue.score", none)
    result = run("score", "random")
    assert (result.exit_code, "; make room, or name a folder in $TMPDIR" in result.stderr) == (1, True)
    assert rows_of(run("score", "random", "--seed", 5).stdout) != rows


def test_select_takes_the_table(here):
    run("score", "k_center", "--budget", 0.2, "-o", "scores.csv")
    result = run("select", "--keep", 0.2, "--scores", "scores.csv")
    assert result.exit_code == 0, result.stderr
    with FeatureFile("features.h5") as file:
        values = score("k_center", file, budget=0.2).values
        hardest = {file.paths[row] for row in np.argsort(-np.nan_to_num(values, nan=-1))[:12]}
    assert set(result.stdout.splitlines()) == hardest


def test_a_score_from_a_record_says_what_it_used(recorded, here):
    result = run("score", "el2n", "--record", "record.h5", "--epoch", 3, "--models", "all", "-o", "el2n.csv")
    assert result.exit_code == 0, result.stderr
    assert recorded.opened == [True]
    expected = recorded.tables["error_norm"][:, 2].mean(axis=0)
    np.testing.assert_allclose(scores.read_scores("el2n.csv", recorded.paths).scores, expected, rtol=1e-6)
    assert "models 6, epochs 3, averaged over all" in result.stderr
    assert "without a score" not in result.stderr


def test_record_h5_is_the_default(here):
    record = small_record(n=9)
    write_record(here / "record.h5", record)
    result = run("score", "aum")
    assert result.exit_code == 0, result.stderr
    assert [path for path, _ in rows_of(result.stdout)[1:]] == record.paths
    given = [float(number) for _, number in rows_of(result.stdout)[1:]]
    np.testing.assert_allclose(given, score("aum", record).values, atol=2e-3)
    assert len(rows_of(run("score", "random", "--record", "record.h5").stdout)) == 10


def test_from_features_to_a_kept_set_by_every_metric_of_a_record(here):
    """`record` and `score` as a user joins them, with heads on 60 images of which some lie far off."""
    pytest.importorskip("torch")
    pytest.importorskip("cleanlab")  # label_issues is theirs
    options = [
        "--models",
        8,
        "--subset",
        0.7,
        "--epochs",
        4,
        "--gradients",
        "--probabilities",
        "--test",
        "features.h5",
        "--device",
        "cpu",
    ]
    result = run("record", "features.h5", "-o", "record.h5", *options)
    assert result.exit_code == 0, result.stderr
    for metric in METRICS:
        if METRICS[metric].needs == "record":
            result = run("score", metric, "-o", "scores.csv")
            assert result.exit_code == 0, result.stderr
            kept = run("select", "--keep", 0.5, "--scores", "scores.csv")
            assert kept.exit_code == 0, kept.stderr
            assert len(kept.stdout.splitlines()) >= 25, metric


def test_images_without_a_score_are_counted(recorded):
    recorded.subset[:, 2] = False
    result = run("score", "aum", "--record", "record.h5")
    assert result.exit_code == 0, result.stderr
    assert "without a score: 1 image (no model was trained on them), which" in result.stderr
    assert [row[0] for row in rows_of(result.stdout) if row[1] == ""] == [recorded.paths[2]]


def test_equal_scores_are_warned_about(recorded):
    recorded.tables["margin"][:] = 1
    result = run("score", "aum", "--record", "record.h5")
    assert "warning: all scores are equal" in result.stderr


def test_memorization_of_models_that_do_not_fit_is_warned_about(recorded):
    said = run("score", "memorization", "--record", "record.h5").stderr
    assert "% of their training images; what a model cannot fit it cannot memorize" in said
    for model, trained in enumerate(recorded.subset):
        recorded.tables["prediction"][model][:, trained] = recorded.labels[trained]
    assert "cannot memorize" not in run("score", "memorization", "--record", "record.h5").stderr


def test_a_score_that_most_images_share_is_warned_about(recorded):
    recorded.tables["prediction"][:] = recorded.labels
    recorded.tables["prediction"][:, :, 0] = (recorded.labels[0] + 1) % 3
    result = run("score", "forgetting", "--record", "record.h5")
    assert "warning: 86 % of the images share the score 0; which of them are kept is chosen at random" in result.stderr
    assert "share the score" not in run("score", "el2n", "--record", "record.h5").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["el2m"], "no metric is called 'el2m'; did you mean el2n?"),
        (["el2n"], "record.h5: no such training record"),
        (["el2n", "--features", "features.h5"], "el2n needs --record FILE"),
        (["k_center", "--record", "features.h5"], "k_center needs --features FILE"),
        (["el2n", "--record", "features.h5"], "an HDF5 file, but not a training record"),
        (["random", "--record", "features.h5"], "an HDF5 file, but not a training record"),
        (["el2n", "--record", "list.txt"], "list.txt: not a readable HDF5 file"),
        (["k_center", "--features", "list.txt"], "list.txt: not a readable HDF5 file"),
        (["el2n", "--record", "."], ".: a folder, not a training record; `protoprune record IMAGES` makes one"),
        (["random", "--record", "a.h5", "--features", "b.h5"], "give the one that the metric needs"),
        (["random", "--epoch", "3"], "--epoch does not go with random; it goes with aum, ddd"),
        (["random", "-o", "features.h5"], "score tables are written as"),
        (["random", "-o", "nowhere/scores.csv"], "its folder does not exist"),
        (["k_center", "--budget", "2"], "--budget 2: expected a number above 0 to 1, the share"),
        (["random", "--features", "none.h5"], "none.h5: no such feature file"),
        (["self_supervised_prototypes", "--k", "999"], "--k 999: more clusters than usable images"),
    ],
)
def test_what_cannot_be_done_is_one_line(here, arguments, message):
    before = (here / "features.h5").read_bytes()
    (here / "list.txt").write_text("a.png\n")
    result = run("score", *arguments)
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""
    assert (here / "features.h5").read_bytes() == before


def test_the_input_is_not_overwritten(here):
    (here / "link.csv").symlink_to("features.h5")
    result = run("score", "random", "-o", "link.csv")
    assert result.exit_code == 2
    assert "is one of the inputs" in result.stderr


def test_classes_are_asked_for_where_they_are_needed(tmp_path, feature_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    feature_file(tmp_path / "features.h5", np.random.default_rng(0).normal(size=(12, 3)))
    result = run("score", "moderate")
    assert result.exit_code == 2
    assert "its images have no classes" in result.stderr
    assert run("score", "k_center").exit_code == 0


def test_scoring_features_loads_no_torch(run_program, here):
    program = """
import sys
from protoprune.cli import main
try:
    main()
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""
    result = run_program("score", "random", "-o", "x.csv", cwd=here, python=("-c", program))
    assert result.stderr.decode().splitlines()[-1] == "False"
    assert (here / "x.csv").is_file()


def test_fakes_have_what_the_real_ones_have(here):
    """The fakes of these tests answer like a real feature file."""
    with FeatureFile("features.h5") as file:
        fake = FakeFeatures(file.features[:], file.labels, file.paths, file.usable)
        for metric in ("supervised_prototypes", "moderate", "k_center", "random"):
            np.testing.assert_array_equal(score(metric, fake).values, score(metric, file).values)


def test_the_help_names_the_metrics_that_average_over_other_models():
    """label_issues asks models that did not see an image, as ddd does."""
    defaults = {name: metric.options["models"] for name, metric in METRICS.items() if "models" in metric.options}
    held_out = [name for name, default in defaults.items() if default is None]
    every = [name for name, default in defaults.items() if default == "all"]
    expected = f"[default: trained; {' and '.join(held_out)}: held-out; {' and '.join(every)}: all]"
    assert expected in " ".join(run("score", "--help").stdout.split())
