"""A folder of recorded files is one load; files that do not belong together are named."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from moeserve.eplb import cli
from moeserve.eplb.formats.detect import read_load
from moeserve.eplb.formats.stats import format_stats
from moeserve.eplb.load import ExpertLoad, Window
from moeserve.eplb.types import Placement


def text(row: list[int], model: str = "m", placement: Placement | None = None) -> bytes:
    load = ExpertLoad(
        np.array([[row]]),
        (3,),
        (Window("decode", 5, 5, sum(row)),),
        model=model,
        ep_size=2,
        placement=placement,
    )
    return format_stats(load).encode()


def growing(row: list[int]) -> bytes:
    """As it stands on the disk before its end."""
    whole = text(row).decode()
    head, _, windows = whole.partition('"windows": [\n  ')
    return (head.replace(",\n ", ", ") + '"windows": [\n' + windows.removesuffix("]}\n") + "\n").encode()


def test_files_are_put_together_in_order(tmp_path: Path) -> None:
    placement = Placement(np.array([[2, 1, 0, 0]]), 3, generation=2)
    (tmp_path / "expert-load-1.json.gz").write_bytes(gzip.compress(text([1, 0, 0])))
    (tmp_path / "expert-load-2.json").write_bytes(text([0, 2, 0], placement=placement))
    (tmp_path / "expert-load-3.json.part").write_bytes(growing([0, 0, 3]) + b',{"phase":"dec')
    (tmp_path / "notes.txt").write_text("anything")
    load = read_load(tmp_path)
    assert load.load[:, 0].tolist() == [[1, 0, 0], [0, 2, 0], [0, 0, 3]]
    assert load.placement is None  # as the newest file says
    (tmp_path / "expert-load-3.json.part").unlink()
    assert read_load(tmp_path).placement == placement


def test_a_file_that_is_being_packed_counts_once(tmp_path: Path) -> None:
    (tmp_path / "expert-load-1.json.part").write_bytes(growing([1, 0, 0]))
    (tmp_path / "expert-load-1.json.gz").write_bytes(gzip.compress(text([1, 0, 0])))
    assert read_load(tmp_path).num_windows == 1


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (
            {"1.json": text([1, 0, 0], "a"), "2.json": text([1, 0, 0], "b")},
            "expert-load-1.json is of another model",
        ),
        ({"1.json": text([1, 0, 0]), "2.json": text([1, 0])}, "expert-load-1.json is of another model"),
        ({"1.json": b"{half"}, "expert-load-1.json: broken JSON"),
        ({"1.json.part": growing([1, 0, 0])[:40]}, "nothing was recorded yet"),
    ],
)
def test_what_does_not_fit_is_named(
    files: dict[str, bytes], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, data in files.items():
        (tmp_path / f"expert-load-{name}").write_bytes(data)
    assert cli.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
