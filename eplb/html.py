"""The report as one self-contained page: figures, load map before and after, imbalance by layer. Plots are SVG made
here; the page loads nothing."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np

from moeserve.eplb.load import ExpertLoad
from moeserve.eplb.metrics import balance, imbalance, rank_load
from moeserve.eplb.report import Report
from moeserve.eplb.types import Floats, Placement, Topology

_STYLE = """
:root{--ink:#1d2330;--soft:#667085;--line:#dfe3ea;--paper:#fff;--a:#c2410c;--b:#1d6fb8;--c:#2e8b57}
@media(prefers-color-scheme:dark){
:root{--ink:#e6e9ef;--soft:#98a2b3;--line:#333b49;--paper:#151a22;--a:#fb923c;--b:#60a5fa;--c:#4ade80}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper)}
body{max-width:1100px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}p.note{color:var(--soft);max-width:75ch}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.3rem .8rem;border-bottom:1px solid var(--line);text-align:right}
td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}tr.best{font-weight:600}
svg{max-width:100%;height:auto}svg text{fill:var(--soft);font:11px system-ui,sans-serif}.axis{stroke:var(--line)}
.maps{display:flex;flex-wrap:wrap;gap:1.5rem}figure{margin:0}figcaption{color:var(--soft)}
"""

_COLOURS = ("var(--a)", "var(--b)", "var(--c)")


Curves = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def page(
    load: ExpertLoad,
    topology: Topology,
    placements: Mapping[str, Placement],
    report: Report,
    redundancy: Curves,
) -> str:
    """The page of a solve; placements in order, the first being what stands before; redundancy: held-out imbalance
    over redundant slots."""
    about = report.about
    body = [
        f"<h1>Expert load balance of {html.escape(str(about['model'] or 'an unnamed model'))}</h1>",
        f"<p>{about['layers']} MoE layers of {about['num_experts']} experts on {about['ep_size']} ranks with "
        f"{about['slots_per_rank']} slots each ({about['redundant']} redundant). Policy "
        f"<b>{html.escape(about['policy'])}</b>: {html.escape(about['reason'])}.</p>",
        f"<p class=note>Imbalance is {html.escape(report.formula)}; 1.0 is perfect. Held out: solved without the last "
        f"{about['held_out']} of {about['windows']} windows, measured on them.</p>",
        _table(report),
        *_plots(load, topology, placements),
        "<h2>Redundancy</h2><p class=note>Held-out imbalance by redundant slots on as many ranks: with replicas "
        "sharing equally, and with parts set anew for each window's load.</p>",
        lines(redundancy, "redundant slots", "max / mean"),
    ]
    return document(f"Expert load balance of {about['model'] or 'a model'}", body)


def placements_page(load: ExpertLoad, topology: Topology, placements: Mapping[str, Placement]) -> str:
    """The page of existing placements, without a solve."""
    title = f"Expert load of {load.model or 'an unnamed model'}"
    return document(title, [f"<h1>{html.escape(title)}</h1>", *_plots(load, topology, placements)])


def document(title: str, body: Sequence[str]) -> str:
    return (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><body>{''.join(body)}</body></html>\n"
    )


def _plots(load: ExpertLoad, topology: Topology, placements: Mapping[str, Placement]) -> list[str]:
    by_layer = {name: balance(load.load, p, topology).by_layer for name, p in placements.items()}
    maps = [
        f"<figure><figcaption>{html.escape(name)}</figcaption>{heat(relative_load(load, p, topology))}</figure>"
        for name, p in placements.items()
    ]
    over_time = {
        name: imbalance(rank_load(load.load, p, topology)).mean(axis=1) for name, p in placements.items()
    }
    parts = [
        "<h2>Imbalance by layer</h2>",
        lines({name: (list(load.layers), y.tolist()) for name, y in by_layer.items()}, "layer", "max / mean"),
        "<h2>Load map</h2><p class=note>Each row is a layer, each column a rank; colour is the rank's load over the "
        "layer's mean, blue below, orange above.</p>",
        f"<div class=maps>{''.join(maps)}</div>",
    ]
    if load.num_windows > 1:
        windows = list(range(load.num_windows))
        parts[2:2] = [
            "<h2>Imbalance over time</h2>",
            lines({name: (windows, y.tolist()) for name, y in over_time.items()}, "window", "max / mean"),
        ]
    return parts


def relative_load(load: ExpertLoad, placement: Placement, topology: Topology) -> Floats:
    """[L, G] load of each rank over the layer's mean, all windows together."""
    ranks = rank_load(load.load.sum(axis=0), placement, topology)
    mean = ranks.mean(axis=1, keepdims=True)
    result: Floats = np.where(mean > 0, ranks / np.where(mean > 0, mean, 1.0), 1.0)
    return result


def _table(report: Report) -> str:
    rows = ["<tr><th>placement<th>split<th>in-sample<th>worst layer<th>held out<th>worst layer<th>moves"]
    for i, line in enumerate(report.lines):
        held = line.held_out
        cells = [
            html.escape(line.placement),
            line.split,
            f"{line.in_sample.mean:.4f}",
            f"{line.in_sample.worst:.4f}",
            f"{held.mean:.4f}" if held else "-",
            f"{held.worst:.4f}" if held else "-",
            "-" if line.moves is None else str(line.moves),
        ]
        rows.append(
            f"<tr{' class=best' if i == len(report.lines) - 2 else ''}>" + "".join(f"<td>{c}" for c in cells)
        )
    return f"<table>{''.join(rows)}</table>"


def lines(curves: Curves, x_name: str, y_name: str) -> str:
    """An SVG line plot of named (x, y) curves."""
    width, height, left, bottom = 900, 260, 50, 34
    xs = [x for curve, _ in curves.values() for x in curve]
    ys = [y for _, curve in curves.values() for y in curve]
    x0, x1, y0, y1 = min(xs), max(xs), min([*ys, 1.0]), max([*ys, 1.02])
    y1 += 0.05 * (y1 - y0)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x0) / (x1 - x0) if x1 > x0 else 0.5
        return left + across * (width - left - 10), height - bottom - (y - y0) / (y1 - y0) * (
            height - bottom - 10
        )

    parts = []
    for i in range(5):
        y = y0 + (y1 - y0) * i / 4
        _, py = at(x0, y)
        parts.append(f"<line class=axis x1={left} x2={width - 10} y1={py:.1f} y2={py:.1f} />")
        parts.append(f"<text x={left - 6} y={py + 4:.1f} text-anchor=end>{y:.2f}</text>")
    for x in sorted({xs[int(i * (len(xs) - 1) / 8)] for i in range(9)} | {x0, x1}):
        px, _ = at(x, y0)
        parts.append(f"<text x={px:.1f} y={height - bottom + 16} text-anchor=middle>{x:g}</text>")
    for i, (name, (cx, cy)) in enumerate(curves.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        points = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(x, y) for x, y in zip(cx, cy, strict=True)))
        parts.append(f'<polyline points="{points}" fill=none stroke="{colour}" stroke-width=2 />')
        if len(cx) <= 40:
            parts += [
                f'<circle cx={px:.1f} cy={py:.1f} r=2.5 fill="{colour}"><title>{html.escape(name)} {x:g}: {y:.4f}'
                "</title></circle>"
                for x, y in zip(cx, cy, strict=True)
                for px, py in (at(x, y),)
            ]
        parts.append(f'<text x={left + 10 + 180 * i} y=12 style="fill:{colour}">{html.escape(name)}</text>')
    label = f"{y_name} against {x_name}"
    parts.append(
        f"<text x={(left + width) / 2} y={height - 4} text-anchor=middle>{html.escape(x_name)}</text>"
    )
    return f'<svg viewBox="0 0 {width} {height}" role=img aria-label="{html.escape(label)}">{"".join(parts)}</svg>'


def heat(values: Floats) -> str:
    """An SVG map of values around 1, a row a layer and a column a rank."""
    rows, columns = values.shape
    cell_w, cell_h = max(4.0, min(24.0, 460 / columns)), max(4.0, min(16.0, 500 / rows))
    scale = max(0.05, float(np.abs(values - 1).max()))
    parts = []
    for i in range(rows):
        for j in range(columns):
            x = float(values[i, j])
            part = min(abs(x - 1) / scale, 1.0)
            colour = "234,88,12" if x > 1 else "37,99,235"
            parts.append(
                f"<rect x={j * cell_w:.1f} y={i * cell_h:.1f} width={cell_w:.1f} height={cell_h:.1f} "
                f'fill="rgba({colour},{part:.2f})"><title>row {i}, rank {j}: {x:.3f}</title></rect>'
            )
    width, height = columns * cell_w, rows * cell_h
    return (
        f'<svg viewBox="0 0 {width:.0f} {height + 16:.0f}" width={width:.0f} role=img aria-label="load map">'
        f"{''.join(parts)}<text x=0 y={height + 13:.0f}>colour scale 1 ± {scale:.2f}</text></svg>"
    )
