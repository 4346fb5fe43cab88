"""Recorded expert loads through the online balancer, window after window, with other traffic every so many of them.

Each window is judged under the placement that was in force before it, as it is served. Decisions take effect by the
next window; up to three follow one another, as migrations take a small part of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moeserve.eplb import solve
from moeserve.eplb.commands.replay import served
from moeserve.eplb.metrics import moves_between
from moeserve.eplb.rebalancer import Rebalancer, Settings
from moeserve.eplb.simulate import hardware, model, step_time
from moeserve.eplb.synthetic import Traffic
from moeserve.eplb.types import Placement, Topology

Windows = npt.NDArray[np.int64]  # [W, L, E]
CHANGES, LENGTH = 6, 12  # spells of one domain's traffic, and windows of each
DECISIONS = 3  # in a window
TOKENS = 50 * 32  # tokens a rank in a window: 50 steps of 32 sequences


@dataclass(frozen=True)
class Trace:
    """shapes: (ranks, slots). expert_bytes: weights of one expert. hardware, model: where steps can be simulated."""

    name: str
    shapes: tuple[tuple[int, int], ...]
    expert_bytes: int
    windows: Callable[[int], Windows]  # of so many tokens
    top_k: int
    simulated: tuple[str, str] | None = None


def traces(folder: Path) -> Iterator[Trace]:
    """What of the known recordings lies in the folder."""
    esft = [folder / f"esft_dsv2lite_{name}.npz" for name in ("intent", "law")]
    if all(map(Path.exists, esft)):
        chosen = [np.load(file)["expert_ids"] for file in esft]
        yield Trace(
            "DeepSeek-V2-Lite, intent / law",
            ((8, 72), (16, 96), (32, 128)),
            3 * 2048 * 1408 * 2,
            lambda tokens: _from_tokens(chosen, tokens, 64),
            6,
        )
    if (tiny := folder / "tiny_moe_domains.npz").exists():
        data = np.load(tiny)
        spans = zip(data["phase_start"][:6] * 1024, data["phase_end"][:6] * 1024, strict=True)
        domains = [data["topk_ids"][begin:end] for begin, end in spans]
        yield Trace(
            "embedded model, six domains",
            ((4, 40), (8, 48)),
            3 * 128 * 64 * 4,
            lambda tokens: _from_tokens(domains, tokens, 32),
            4,
        )
    if (profiles := folder / "dsr1_rank_profiles_58x256.npy").exists():
        made = Traffic.make(58, 256, profiles=np.load(profiles), seed=1)
        yield Trace(
            "DeepSeek-R1 profile, made-up domains",
            ((32, 288), (64, 320), (72, 360)),
            44_040_192,
            lambda tokens: _from_profile(made, tokens * 8),
            8,
            ("gb200-nvl72", "deepseek-v3"),
        )


def _from_tokens(domains: list[npt.NDArray[np.uint8]], tokens: int, experts: int) -> Windows:
    """Windows of `tokens` tokens in runs of 32 that followed one another, CHANGES times another domain's."""
    rng = np.random.default_rng(0)
    windows = []
    for spell in range(CHANGES):
        pool = domains[spell % len(domains)]  # [tokens, L, K]
        for _ in range(LENGTH):
            starts = rng.integers(0, len(pool) - 32, max(1, tokens // 32))
            chosen = pool[(starts[:, None] + np.arange(32)).ravel()]
            layers = chosen.shape[1]
            flat = chosen.astype(np.int64) + np.arange(layers)[None, :, None] * experts
            windows.append(np.bincount(flat.ravel(), minlength=layers * experts).reshape(layers, experts))
    return np.stack(windows)


def _from_profile(traffic: Traffic, assignments: int) -> Windows:
    domains = traffic.popularity.shape[0]
    mixes = np.repeat(np.eye(domains)[np.arange(CHANGES) % domains] * 0.7 + 0.3 / domains, LENGTH, axis=0)
    return traffic.counts(mixes, assignments)


@dataclass
class Outcome:
    """by_window: imbalance. moves: slots written, over all layers and windows; seconds: of deciding, in the median."""

    mode: str
    by_window: list[float]
    moves: int
    step_ms: float | None


def replay(trace: Trace, ranks: int, slots: int) -> list[Outcome]:
    topology = Topology.of(ranks, slots)
    windows = trace.windows(TOKENS * ranks)
    layers, experts = windows.shape[1:]
    start = Placement.identity(layers, experts, slots)
    offline = solve(windows[: LENGTH * 2], topology)
    return [
        _drive("in order", trace, windows, start, topology, None),
        _drive("offline placement", trace, windows, offline, topology, None),
        _drive("online routes", trace, windows, start, topology, Settings(max_moves_per_layer=0)),
        _drive("online + moves", trace, windows, start, topology, Settings()),
        _drive("online, step routing", trace, windows, start, topology, Settings(routing="step")),
        _greedy(trace, windows, start, topology),
    ]


def _drive(
    mode: str, trace: Trace, windows: Windows, start: Placement, topology: Topology, settings: Settings | None
) -> Outcome:
    balancer = Rebalancer(start, topology, settings or Settings())
    routing = balancer.settings.routing
    by_window, moves, steps = [], 0, []
    for window in windows:
        by_window.append(served(window, balancer.placement, topology, routing))
        steps.append(_step_ms(trace, window, balancer.placement, topology))
        balancer.observe(window)
        for _ in range(DECISIONS if settings is not None else 0):
            decision = balancer.decide()
            if decision.plan is None:
                break
            moves += decision.moves
            balancer.applied(decision.plan.new)
    simulated = None if routing == "step" else steps[0] and float(np.mean(steps[LENGTH:]))  # type: ignore[arg-type]
    return Outcome(mode, by_window, moves, simulated)


def _greedy(trace: Trace, windows: Windows, start: Placement, topology: Topology) -> Outcome:
    """DeepSeek's greedy, from scratch for each window's load, replicas sharing evenly."""
    placement, by_window, moves, steps = start, [], 0, []
    for window in windows:
        by_window.append(served(window, placement, topology, "even"))
        steps.append(_step_ms(trace, window, placement, topology))
        fresh = solve(window, topology, policy="greedy", routing="even")
        moves += int(moves_between(placement, fresh, topology).sum())
        placement = fresh
    simulated = steps[0] and float(np.mean(steps[LENGTH:]))  # type: ignore[arg-type]
    return Outcome("greedy each window", by_window, moves, simulated)


def _step_ms(trace: Trace, window: Windows, placement: Placement, topology: Topology) -> float | None:
    if trace.simulated is None:
        return None
    machine, shape = hardware(trace.simulated[0]), model(trace.simulated[1])
    return step_time(window[None], placement, topology, machine, shape, tokens_per_rank=128).total * 1e3


def _spells(outcome: Outcome) -> npt.NDArray[np.float64]:
    """[spells, LENGTH] imbalance; without the first, which begins with nothing known."""
    return np.array(outcome.by_window).reshape(CHANGES, LENGTH)[1:]


def settled(outcome: Outcome) -> float:
    return float(np.median(_spells(outcome)[:, 4:]))


def figures_of(outcome: Outcome, level: float, windows: int, layers: int) -> dict[str, Any]:
    spells = _spells(outcome)
    reached = [int(np.argmax(spell <= level)) + 1 if (spell <= level).any() else None for spell in spells]
    times = [n for n in reached if n is not None]
    return {
        "windows": [float(np.mean(spells[:, n])) for n in range(3)],
        "settled": settled(outcome),
        "level": level,
        "back": float(np.median(times)) if times else None,
        "back_of": f"{len(times)}/{len(reached)}",
        "moves": outcome.moves,
        "moves_per_layer_window": outcome.moves / layers / windows,
        "step_ms": outcome.step_ms,
    }


def replay_table(folder: Path, target: float, note: Callable[[str], None]) -> tuple[str, dict[str, Any]]:
    """The table of all recordings in the folder, and its figures."""
    names = ("window 1", "2", "3", "later", "back at", "moves/l/w", "fewer", "GB moved", "step ms")
    lines = [
        f"windows of {TOKENS} tokens a rank, {CHANGES} spells of {LENGTH} windows each of other traffic; imbalance "
        "max/mean, mean over layers, of windows under what was in force before them",
        f"fewer: moves of greedy each window / moves; back at: windows until {target:g}, or 2 % above what greedy "
        "settles at where that is more; step: simulated, MoE layers alone",
    ]
    figures: dict[str, Any] = {}
    for trace in traces(folder):
        for ranks, slots in trace.shapes:
            note(f"{trace.name}: {ranks} ranks, {slots} slots")
            outcomes = replay(trace, ranks, slots)
            windows, layers = CHANGES * LENGTH, trace.windows(32).shape[1]
            level = max(target, 1.02 * settled(outcomes[-1]))
            found = {o.mode: figures_of(o, level, windows, layers) for o in outcomes}
            figures[f"{trace.name}, {ranks} ranks, {slots} slots"] = found
            lines += ["", f"{trace.name}, {ranks} ranks, {slots} slots"]
            lines.append(" " * 22 + "".join(f"{name:>10}" for name in names))
            most = found["greedy each window"]["moves"]
            lines += [_line(mode, f, most, trace.expert_bytes) for mode, f in found.items()]
    if not figures:
        raise SystemExit(f"--traces {folder}: holds none of the known recordings")
    return "\n".join(lines), figures


def _line(mode: str, f: dict[str, Any], most: int, expert_bytes: int) -> str:
    back = "-" if f["back"] is None else f"{f['back']:.0f} ({f['back_of']})"
    fewer = f"{most / f['moves']:.0f}x" if f["moves"] and mode != "greedy each window" else "-"
    step = "-" if f["step_ms"] is None else f"{f['step_ms']:.2f}"
    return (
        f"{mode:<22}" + "".join(f"{value:>10.3f}" for value in (*f["windows"], f["settled"])) + f"{back:>10}"
        f"{f['moves_per_layer_window']:>10.2f}{fewer:>10}{f['moves'] * expert_bytes / 1e9:>10.2f}{step:>10}"
    )
