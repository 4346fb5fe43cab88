"""The report as one self-contained page: figures, load map before and after, imbalance by layer. Plots are SVG made
here; the page loads nothing."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np

from moeserve.eplb.load import ExpertLoad
from moeserve.eplb.metrics import FORMULA, balance, imbalance, rank_load
from moeserve.eplb.report import Report
from moeserve.eplb.types import Floats, Placement, Topology

_STYLE = """
:root{--ink:#1d2330;--soft:#667085;--line:#dfe3ea;--paper:#fff;--a:#c2410c;--b:#1d6fb8;--c:#2e8b57;--d:#8b3fb0;--e:#8a6d00;--f:#0e7f8f}
@media(prefers-color-scheme:dark){
:root{--ink:#e6e9ef;--soft:#98a2b3;--line:#333b49;--paper:#151a22;--a:#fb923c;--b:#60a5fa;--c:#4ade80;--d:#d8a0f5;--e:#e3c34c;--f:#5fd3e2}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper)}
body{max-width:1100px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}p.note{color:var(--soft);max-width:75ch}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;white-space:nowrap}
td,th{padding:.3rem .8rem;border-bottom:1px solid var(--line);text-align:right}
td:first-child,th:first-child{text-align:left}tr.best{font-weight:600}
svg{max-width:100%;height:auto}svg.plot{min-width:560px}svg text{fill:var(--soft);font:12px system-ui,sans-serif}
.axis{stroke:var(--line)}.legend{display:flex;margin-top:1rem;flex-wrap:wrap;gap:.2rem 1.2rem}
.maps{display:flex;flex-wrap:wrap;gap:1.5rem}figure{margin:0}figcaption{color:var(--soft)}
"""

_COLOURS = tuple(f"var(--{letter})" for letter in "abcdef")


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
        f"<p>{about['layers']} MoE layers of {about['num_experts']} experts on {about['ep_size']} ranks with "
        f"{about['slots_per_rank']} slots each ({about['redundant']} redundant). Policy "
        f"<b>{html.escape(about['policy'])}</b>: {html.escape(about['reason'])}.</p>",
        f"<p class=note>Imbalance is {html.escape(report.formula)}; 1.0 is perfect. Held out: solved without the last "
        f"{about['held_out']} of {about['windows']} windows, measured on them.</p>",
        report_table(report),
        *_plots(load, topology, placements),
        "<h2>Redundancy</h2><p class=note>Held-out imbalance by redundant slots on as many ranks: with replicas "
        "sharing equally, and with parts set anew for each window's load.</p>",
        lines(redundancy, "redundant slots", "max / mean"),
    ]
    return document(f"Expert load balance of {about['model'] or 'an unnamed model'}", body)


def placements_page(
    load: ExpertLoad, topology: Topology, placements: Mapping[str, Placement], moves: str
) -> str:
    """The page of existing placements, without a solve; moves: the table of what lies between them."""
    about = (
        f"<p>{load.num_layers} MoE layers of {load.num_experts} experts on {topology.num_ranks} ranks with "
        f"{topology.slots_per_rank} slots each, {load.num_windows} windows.</p>"
        f"<p class=note>Imbalance is {html.escape(FORMULA)}; 1.0 is perfect.</p>"
    )
    found = {name: balance(load.load, p, topology) for name, p in placements.items()}
    rows = [[name, f"{b.mean:.4f}", f"{b.worst:.4f}", f"{b.peak:.4f}"] for name, b in found.items()]
    body = [about, table(["placement", "imbalance", "worst layer", "worst window"], rows), moves]
    return document(
        f"Expert load of {load.model or 'an unnamed model'}", [*body, *_plots(load, topology, placements)]
    )


def document(title: str, body: Sequence[str]) -> str:
    title = html.escape(title)
    return (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style><body><h1>{title}</h1>{''.join(body)}</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], best: int = -1) -> str:
    """The first column to the left, the others to the right; row `best` stands out."""
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}" for cell in head)]
    for i, row in enumerate(rows):
        mark = " class=best" if i == best else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{html.escape(cell)}" for cell in row))
    return f"<div class=wide><table>{''.join(lines)}</table></div>"


def _plots(load: ExpertLoad, topology: Topology, placements: Mapping[str, Placement]) -> list[str]:
    by_layer = {name: balance(load.load, p, topology).by_layer for name, p in placements.items()}
    loads = {name: relative_load(load, p, topology) for name, p in placements.items()}
    off = np.abs(np.stack(list(loads.values())) - 1)
    scale = max(0.05, float(np.quantile(off, 0.99)))  # one for all maps, so that they can be compared
    maps = [
        f"<figure><figcaption>{html.escape(name)}</figcaption>{heat(x, load.layers, scale)}</figure>"
        for name, x in loads.items()
    ]
    over_time = {
        name: imbalance(rank_load(load.load, p, topology)).mean(axis=1) for name, p in placements.items()
    }
    parts = [
        "<h2>Imbalance by layer</h2>",
        lines({name: (list(load.layers), y.tolist()) for name, y in by_layer.items()}, "layer", "max / mean"),
        "<h2>Load map</h2><p class=note>Each row is a layer, each column a rank; colour is its load over the "
        f"layer's mean: full blue {max(0.0, 1 - scale):.2f} or less, none 1, full orange {1 + scale:.2f} or more.</p>",
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


def report_table(report: Report) -> str:
    head = ["placement", "split", "in-sample", "worst layer", "held out", "worst layer", "moves"]
    rows = [
        [
            line.placement,
            line.split,
            *(f"{x:.4f}" for x in (line.in_sample.mean, line.in_sample.worst)),
            *((f"{line.held_out.mean:.4f}", f"{line.held_out.worst:.4f}") if line.held_out else ("-", "-")),
            "-" if line.moves is None else str(line.moves),
        ]
        for line in report.lines
    ]
    return table(head, rows, best=len(rows) - 2)


def lines(curves: Curves, x_name: str, y_name: str) -> str:
    """An SVG line plot of named (x, y) curves, with a legend."""
    width, height, left, bottom = 900, 260, 50, 40
    xs = sorted({x for curve, _ in curves.values() for x in curve})
    ticks = _ticks([y for _, curve in curves.values() for y in curve])
    x0, x1, y0, y1 = xs[0], xs[-1], ticks[0], ticks[-1]

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x0) / (x1 - x0) if x1 > x0 else 0.5
        up = (y - y0) / (y1 - y0)
        return left + across * (width - left - 20), height - bottom - up * (height - bottom - 10)

    parts = []
    for y in ticks:
        _, py = at(x0, y)
        parts.append(f"<line class=axis x1={left} x2={width - 20} y1={py:.1f} y2={py:.1f} />")
        parts.append(f"<text x={left - 6} y={py + 4:.1f} text-anchor=end>{y:.{_digits(ticks)}f}</text>")
    for x in sorted({xs[i * (len(xs) - 1) // 8] for i in range(9)}):
        px, _ = at(x, y0)
        parts.append(f"<text x={px:.1f} y={height - bottom + 16} text-anchor=middle>{x:g}</text>")
    legend = []
    for i, (name, (cx, cy)) in enumerate(curves.items()):
        colour, label = _COLOURS[i % len(_COLOURS)], html.escape(name)
        dash = " stroke-dasharray='6 4'" if i // len(_COLOURS) % 2 else ""
        points = [at(x, y) for x, y in zip(cx, cy, strict=True)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline points="{path}" fill=none stroke="{colour}" stroke-width=2{dash} />')
        if len(cx) <= 80:
            parts += [
                f'<circle cx={px:.1f} cy={py:.1f} r=2.5 fill="{colour}"><title>{label}, {x_name} {x:g}: {y:.4f}'
                "</title></circle>"
                for x, y, (px, py) in zip(cx, cy, points, strict=True)
            ]
        legend.append(f'<span style="color:{colour}">{"╌" if dash else "━"} {label}</span>')
    parts.append(
        f"<text x={(left + width) / 2} y={height - 4} text-anchor=middle>{html.escape(x_name)}</text>"
    )
    about = html.escape(f"{y_name} against {x_name}")
    return (
        f"<div class=legend>{''.join(legend)}</div><div class=wide>"
        f'<svg class=plot viewBox="0 0 {width} {height}" role=img aria-label="{about}">{"".join(parts)}</svg></div>'
    )


def _ticks(values: Sequence[float]) -> list[float]:
    """Four to nine round numbers that enclose the values and 1."""
    low, high = min([*values, 1.0]), max([*values, 1.02])
    power = 10.0 ** np.floor(np.log10((high - low) / 4))
    step = power * max(f for f in (1, 2, 5) if f * power <= (high - low) / 4)
    return [float(k * step) for k in range(int(np.floor(low / step)), int(np.ceil(high / step - 1e-9)) + 1)]


def _digits(ticks: Sequence[float]) -> int:
    return max(0, -int(np.floor(np.log10(ticks[1] - ticks[0]) + 1e-9)))


def heat(values: Floats, layers: Sequence[int], scale: float) -> str:
    """An SVG map of values around 1, a row a layer and a column a rank; colour is full at 1 - scale and 1 + scale."""
    rows, columns = values.shape
    cell_w, cell_h = max(4.0, min(24.0, 340 / columns)), max(4.0, min(16.0, 500 / rows))
    parts = []
    for i in range(rows):
        for j in range(columns):
            x = float(values[i, j])
            part = min(abs(x - 1) / scale, 1.0)
            colour = "234,88,12" if x > 1 else "37,99,235"
            parts.append(
                f"<rect x={j * cell_w:.1f} y={i * cell_h:.1f} width={cell_w:.1f} height={cell_h:.1f} "
                f'fill="rgba({colour},{part:.2f})"><title>layer {layers[i]}, rank {j}: {x:.3f}</title></rect>'
            )
    width, height = columns * cell_w, rows * cell_h
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width={width:.0f} role=img aria-label="load map">'
        f"<rect width={width:.0f} height={height:.0f} fill=none stroke=var(--line) />{''.join(parts)}</svg>"
    )
