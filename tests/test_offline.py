"""`eplb-offline report --report html=FILE` writes the dashboard: one file that asks nobody for anything."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moeserve import offline
from moeserve.eplb.formats.placement import PlacementFile, format_placement
from moeserve.eplb.formats.stats import write_stats
from moeserve.eplb.load import ExpertLoad, Window
from moeserve.eplb.types import Placement


@pytest.fixture
def stats(tmp_path: Path) -> Path:
    counts = np.array([[[9, 1, 1, 1], [1, 1, 1, 9]], [[8, 2, 1, 1], [1, 2, 1, 8]]])
    windows = (Window("decode", 0, 10, 12), Window("decode", 10, 10, 12))
    write_stats(tmp_path / "stats.json", ExpertLoad(counts, (1, 2), windows, model="m", top_k=1, ep_size=2))
    return tmp_path / "stats.json"


def write_placement(stats: Path) -> Path:
    placement = Placement(np.array([[0, 1, 3, 2], [0, 1, 3, 2]]), 4, generation=1)
    path = stats.with_name("placement.json")
    path.write_text(format_placement(PlacementFile(placement, 2, (1, 2), "m")))
    return path


def test_the_page_is_one_file_that_asks_nobody(stats: Path) -> None:
    page = stats.with_name("page.html")
    given = ["report", str(stats), "--placement", str(write_placement(stats)), "--report", f"html={page}"]
    assert offline.main([*given, "--expert-bytes", "1000"]) == 0
    text = page.read_text()
    assert "default-src 'none'" in text
    assert not re.search(r'(?:src|href)="(?!data:|api/|prometheus/)', text)
    assert set(re.findall(r"https?://[^\s\"'`<>$]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "Would another placement help?" in text and len(text) < 150_000


def test_no_torch_no_server_and_at_once(stats: Path) -> None:
    page = stats.with_name("page.html")
    program = (
        "import sys; from moeserve.offline import main; code = main(sys.argv[1:]);"
        "print(code, sorted({'torch', 'msgspec', 'fastapi', 'uvicorn', 'prometheus_client'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, "report", str(stats), "--report", f"html={page}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.stdout == "0 []\n" and page.exists(), run.stderr


def test_report_is_of_the_slots_that_were_recorded(stats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert offline.main(["report", str(stats), "--report", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["placements"]["identity"]
    # four experts in four slots on two ranks: 10 against 2 of 12, and 2 against 10
    assert found["mean"] == pytest.approx((10 / 6 + 10 / 6 + 10 / 6 + 9 / 6) / 4)


def test_too_much_for_a_browser_is_refused(
    stats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("moeserve.dashboard.page.MAX_COUNTS", 15)
    assert offline.main(["report", str(stats), "--report", f"html={stats.with_name('page.html')}"]) == 2
    assert "2 windows are too many for a page: give a part of them" in capsys.readouterr().err
    assert not stats.with_name("page.html").exists()
