"""eplb-offline as people call it: every subcommand, its files, its exit codes, and how fast it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from moeserve.eplb import Topology
from moeserve.eplb.cli import main
from moeserve.eplb.formats.placement import read_placement
from moeserve.eplb.formats.placements import Known, read_any_placement
from moeserve.eplb.formats.stats import write_stats
from moeserve.eplb.html import _ticks
from moeserve.eplb.load import ExpertLoad, Window
from moeserve.eplb.metrics import balance
from moeserve.eplb.synthetic import Traffic

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> str:
    traffic = Traffic.make(3, 32)
    steps = traffic.counts(traffic.mixes("drift", 120), 4000)
    load = steps.reshape(12, 10, 3, 32).sum(axis=1)
    windows = tuple(Window("prefill" if w % 2 else "decode", w * 10, 10, 5000) for w in range(12))
    path = tmp_path_factory.mktemp("stats") / "stats.json"
    write_stats(path, ExpertLoad(load, (1, 2, 3), windows, "toy", 8, 1, 4, 2))
    return str(path)


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_solve_writes_a_placement_and_reports(
    stats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "placement.json"
    code, table, _ = _run(capsys, stats, "-o", str(out))
    assert code == 0
    file = read_placement(out, ep_size=4, num_experts=32, layers=[1, 2, 3], model="toy")
    assert file.placement.num_slots == 36  # one redundant slot a rank
    assert file.predicted["imbalance_mean"] < 1.3
    assert "imbalance = max rank load / mean rank load" in table
    assert "DeepSeek greedy" in table and "held-out" in table
    assert "\x1b" not in table  # no colours in a pipe


def test_without_output_the_placement_goes_to_stdout(stats: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, stats)
    assert code == 0
    assert json.loads(out)["format"] == "moeserve.placement"
    assert "DeepSeek greedy" in err
    code, out, err = _run(capsys, stats, "--quiet")
    assert (code, err) == (0, "")
    assert json.loads(out)["num_slots"] == 36


def test_the_report_s_figures_are_true(
    stats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.json"
    _, text, _ = _run(capsys, stats, "-o", str(out), "--report", "json", "--redundant", "16")
    report = json.loads(text)
    line = next(x for x in report["lines"] if x["placement"].startswith("ours") and x["split"] == "shares")
    from moeserve.eplb.formats.detect import read_load

    load, placement = read_load(stats).load, read_placement(out).placement
    found = balance(load, placement, Topology.of(4, 48))
    assert line["in_sample"]["mean"] == pytest.approx(found.mean)
    assert line["in_sample"]["worst"] == pytest.approx(found.worst)
    assert len(line["in_sample"]["by_layer"]) == 3
    assert report["about"]["held_out"] == 3
    greedy, step = (
        next(x for x in report["lines"] if key in (x["placement"], x["split"]))
        for key in ("DeepSeek greedy", "step")
    )
    assert step["held_out"]["mean"] < greedy["held_out"]["mean"]


@pytest.mark.parametrize("policy", ["auto", "greedy", "robust", "connected"])
def test_policies_and_constraints(
    stats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: str
) -> None:
    out = tmp_path / "p.json"
    words = [
        stats,
        "-o",
        str(out),
        "--quiet",
        "--policy",
        policy,
        "--num-slots",
        "72",
        "--ep-size",
        "8",
        "--objective",
        "mean",
    ]
    if policy != "greedy":
        words.append("--survive-rank-loss")
    assert _run(capsys, *words)[0] == 0
    file = read_placement(out)
    assert file.solver["policy"] in (policy, "robust", "connected")
    if policy != "greedy":
        assert file.placement.survives_rank_loss(file.topology)


@pytest.mark.parametrize("name", ["trtllm", "sglang", "vllm", "ascend"])
def test_other_engines_formats_and_back(
    stats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    first, second = tmp_path / "first", tmp_path / "second.json"
    code, _, err = _run(
        capsys, stats, "-o", str(first), "--format", name, "--num-hidden-layers", "5", "--quiet"
    )
    assert (code, err) == (0, "")
    words = [
        "convert",
        str(first),
        "--to",
        "moeserve",
        "-o",
        str(second),
        "--ep-size",
        "4",
        "--num-experts",
        "32",
    ]
    if name != "trtllm":
        words += ["--layers", "1-3"]
    assert _run(capsys, *words) == (0, "", "")
    known = Known(4, 32, (1, 2, 3))
    assert (
        read_any_placement(first, known).placement.slot_to_expert
        == read_placement(second).placement.slot_to_expert
    ).all()


def test_convert_statistics(stats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "s.npz"
    assert _run(capsys, "convert", stats, "--to", "stats.npz", "-o", str(out))[0] == 0
    from moeserve.eplb.formats.detect import read_load

    assert (read_load(out).load == read_load(stats).load).all()
    code, _, err = _run(capsys, "convert", stats, "--to", "stats.npz", "-o", str(tmp_path / "s.json"))
    assert (code, "ends in .npz" in err) == (2, True)


def test_incremental(stats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    _run(capsys, stats, "-o", str(first), "--quiet", "--phase", "prefill")
    code, text, _ = _run(
        capsys, stats, "-o", str(second), "--phase", "decode", "--current", str(first), "--max-moves", "2"
    )
    assert code == 0
    a, b = read_placement(first).placement, read_placement(second).placement
    assert ((a.slot_to_expert != b.slot_to_expert).sum(axis=1) <= 2).all()
    assert b.generation == a.generation + 1
    assert "current" in text


class _Checked(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


@pytest.mark.parametrize("command", ["solve", "report", "sweep", "replay", "simulate"])
def test_html_is_self_contained_and_takes_no_name_for_markup(
    stats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    page, named = tmp_path / "r.html", tmp_path / "<i>.json"
    named.write_text(Path(stats).read_text().replace('"toy"', '"<script>&"'))
    words = [command, str(named), "--report", f"html={page}"]
    if command == "report":
        placement = tmp_path / "<u>.json"
        _run(capsys, str(named), "-o", str(placement), "--quiet")
        words += ["--placement", str(placement)]
    assert _run(capsys, *words)[0] == 0
    checked = _Checked()
    checked.feed(page.read_text())
    assert {"table", "h1"} <= set(checked.tags) and ("svg" in checked.tags or command == "simulate")
    assert not {"script", "i", "u"} & set(checked.tags)
    assert not checked.links
    assert "http" not in page.read_text()


def test_ticks_are_round_and_enclose_the_curves() -> None:
    for values, ticks in (
        ([1.53, 1.08], [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6]),
        ([1.001], [1.0, 1.005, 1.01, 1.015, 1.02]),
        ([9.0, 2.0], [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]),
    ):
        assert np.round(_ticks(values), 9).tolist() == ticks


@pytest.mark.parametrize("command", ["solve", "report", "sweep", "replay", "simulate"])
def test_tables_fit_80_columns(
    stats: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _run(capsys, stats, "-o", "p.json", "--quiet")[0] == 0
    words = {"solve": ["-o", "q.json"], "report": ["--placement", "p.json", "--expert-bytes", "44000000"]}
    code, text, _ = _run(capsys, command, stats, *words.get(command, []))
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80


def test_report(stats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.yaml"
    _run(capsys, stats, "-o", str(out), "--format", "trtllm", "--quiet")
    code, text, _ = _run(capsys, "report", stats, "--placement", str(out), "--expert-bytes", "1000000")
    assert code == 0
    assert "slots written;" in text and "MB" in text
    code, text, _ = _run(capsys, "report", stats, "--placement", str(out), "--report", "json")
    document = json.loads(text)
    assert document["placements"][str(out)]["mean"] < document["placements"]["identity"]["mean"]
    code, _, err = _run(capsys, "report", stats, "--placement", str(out), "--num-slots", "40")
    assert (code, "36 slots, the others have 40" in err) == (2, True)


def test_sweep_finds_a_knee(stats: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = _run(
        capsys, "sweep", stats, "--ep-sizes", "4,8", "--redundant", "0,8,16,32", "--report", "json"
    )
    assert code == 0
    points = json.loads(text)["points"]
    assert [(p["ep_size"], p["redundant"]) for p in points] == [
        (r, n) for r in (4, 8) for n in (0, 8, 16, 32)
    ]
    for ranks in (4, 8):
        row = [p for p in points if p["ep_size"] == ranks]
        assert row[-1]["step"] < row[0]["step"]
        assert sum(p["knee"] for p in row) == 1
    code, text, _ = _run(capsys, "sweep", stats, "--ep-sizes", "4", "--redundant", "0,3,8")
    assert "<- knee" in text
    assert "Left out, as slots do not divide among ranks: 3 on 4." in " ".join(text.split())


def test_replay(stats: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = _run(
        capsys, "replay", stats, "--policies", "never,greedy,auto", "--report", "json", "--routing", "step"
    )
    assert code == 0
    never, greedy, auto = json.loads(text)["outcomes"]
    assert (never["moves"], never["net_gain"]) == (0, 0)
    assert 0 < auto["moves"] < greedy["moves"]
    assert auto["imbalance"] < never["imbalance"]
    assert len(auto["by_window"]) == 12


def test_simulate(stats: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, text, _ = _run(capsys, "simulate", stats, "--report", "json", "--tokens-per-rank", "512")
    assert code == 0
    document = json.loads(text)
    assert all(c["source"] for c in document["constants"].values())
    times = {name: found["total"] for name, found in document["placements"].items()}
    ours = next(t for name, t in times.items() if name.startswith("ours"))
    assert ours < times["identity"]
    assert _run(capsys, "simulate", stats, "--hardware", "abacus")[0] == 2


def test_solve_for_how_replicas_will_share(
    stats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shares = {}
    for routing in ("even", "shares", "step"):
        out = tmp_path / f"{routing}.json"
        assert _run(capsys, stats, "--routing", routing, "-o", str(out), "--quiet")[0] == 0
        placement = read_placement(out).placement
        shares[routing] = np.allclose(placement.share, placement.even_share)
    assert shares == {"even": True, "shares": False, "step": False}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.json"], "nothing.json: No such file"),
        (
            ["STATS", "--ep-size", "5", "--num-slots", "36"],
            "num_slots = 36 is not divisible by ep_size = 5: give 40",
        ),
        (["STATS", "--num-slots", "16"], "16 slots are fewer than 32 experts"),
        (["STATS", "--redundant", "-1"], "31 slots are fewer than 32 experts"),
        (["STATS", "--ep-size", "0", "--redundant", "0"], "--ep-size 0"),
        (["STATS", "--survive-rank-loss"], "num_slots >= 64"),
        (["STATS", "--max-moves", "3"], "max_moves needs the current placement"),
        (["STATS", "--holdout", "2"], "holdout = 2.0"),
        (["STATS", "--format", "sglang"], "needs --num-hidden-layers"),
        (["STATS", "--policy", "hierarchical", "--expert-groups", "3"], "expert_groups = 3 does not divide"),
        (["STATS", "--current", "nothing.json"], "nothing.json: No such file"),
        (["STATS", "-o", "/nowhere/at/all.json"], "cannot write"),
        (["replay", "STATS", "--policies", "magic"], "--policies magic"),
        (["sweep", "STATS", "--ep-sizes", "7", "--redundant", "1"], "no size fits"),
        (["simulate", "STATS", "--tokens-per-rank", "0"], "tokens_per_rank = 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    stats: str, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    code, out, err = _run(capsys, *[stats if word == "STATS" else word for word in words])
    assert code == 2
    assert err.startswith("eplb-offline: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_window_that_is_short_is_named_as_the_contract_says(
    stats: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = json.loads(Path(stats).read_text())
    document["windows"][3]["load"][1].pop()
    path = tmp_path / "s.json"
    path.write_text(json.dumps(document))
    code, _, err = _run(capsys, str(path))
    assert code == 2
    assert err == f"eplb-offline: {path}: windows[3].load[1] has 31 entries, expected num_experts = 32\n"


def test_without_ep_size_it_must_be_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "r.npy", np.random.default_rng(0).integers(0, 8, (64, 2, 2)))
    code, _, err = _run(capsys, str(tmp_path / "r.npy"))
    assert (code, "give --ep-size" in err) == (2, True)
    assert _run(capsys, str(tmp_path / "r.npy"), "--ep-size", "2", "--quiet")[0] == 0


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("solve", "report", "sweep", "convert", "replay", "simulate"))


def test_it_starts_fast_and_without_torch() -> None:
    code = (
        "import sys\n"
        "from moeserve.eplb.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'scipy', 'numba', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = os.times().children_user
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment, timeout=60)
    assert os.times().children_user - start < 1.0


def test_plain_kernels_give_the_same_digest(stats: str, tmp_path: Path) -> None:
    digests = []
    for native in ("1", "0"):
        out = tmp_path / f"{native}.json"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "EPLB_NATIVE": native, "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            "-m",
            "moeserve.eplb.cli",
            stats,
            "-o",
            str(out),
            "--quiet",
            "--num-slots",
            "80",
        ]
        subprocess.run(command, check=True, env=environment, timeout=100)
        digests.append(read_placement(out).placement.digest)
    assert digests[0] == digests[1]
