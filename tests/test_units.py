"""Sizes and times as people read them, and the seeded hashes of ids."""

from __future__ import annotations

import numpy as np
import pytest

from protoprune.ids import hashes, shuffled
from protoprune.units import bytes_text, duration, many


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (3_149, "3.1 kB"), (150_528_000, "150.5 MB"),
     (4 << 30, "4.3 GB"), (2.5e12, "2.5 TB"), (1e16, "10,000.0 TB")],
)  # fmt: skip
def test_sizes_are_decimal(count, text):
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (8.44, "8.4 s"), (192, "3m12s"), (3599.6, "1h00m"), (7500, "2h05m")]
)
def test_times_are_short(seconds, text):
    assert duration(seconds) == text


def test_hashes_depend_on_id_seed_and_purpose_alone():
    ids = ["b/1.png", "a/2.png", "a/\udcff.png"]  # a name that is not UTF-8 too
    one = hashes(ids, 0)
    assert one.dtype == np.uint64
    assert hashes(ids[::-1], 0).tolist() == one[::-1].tolist()
    others = [hashes(ids, 1), hashes(ids, -1), hashes(ids, 0, b"cover"), hashes(ids, 0, b"split")]
    assert len({tuple(each.tolist()) for each in (one, *others)}) == 5
    # BLAKE2b of 8 bytes, keyed with the seed: lists of earlier versions stay what they are
    assert one[:2].tolist() == [0x7B33A15FC7773653, 0x8577397A44E4170F]


def test_a_shuffle_takes_the_rows_in_the_order_of_their_hashes():
    ids = [f"{number}.png" for number in range(200)]
    rows = np.arange(0, 200, 2)
    found = shuffled(rows, ids, 3, b"cover")
    assert sorted(found.tolist()) == rows.tolist() != found.tolist()
    keys = hashes(ids, 3, b"cover")[found]
    assert (keys[1:] >= keys[:-1]).all()
    assert shuffled(rows[::-1], ids, 3, b"cover").tolist() == found.tolist()


def test_one_is_one():
    assert [many(n, "image") for n in (0, 1, 2, 1234)] == ["0 images", "1 image", "2 images", "1,234 images"]
    assert [many(n, "class is", "classes are") for n in (1, 3)] == ["1 class is", "3 classes are"]
