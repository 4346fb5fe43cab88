// The panels' figures worked out here, from the counts that a page in a file carries: the same as the server's.

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const overFair = (values) => {
  const fair = mean(values);
  return values.map((value) => (fair > 0 ? value / fair : 1));
};
const imbalance = (ranks) => (ranks.some((load) => load > 0) ? Math.max(...ranks) / mean(ranks) : 1);
const median = (values) => {
  const sorted = [...values].sort((a, b) => a - b), half = sorted.length / 2;
  return sorted.length % 2 ? sorted[Math.floor(half)] : (sorted[half - 1] + sorted[half]) / 2;
};

export class Recorded {
  /** text: base64 of gzip of the JSON that the page was written with. */
  static async open(text) {
    const packed = Uint8Array.from(atob(text.trim()), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Recorded(JSON.parse(await new Response(stream).text()));
  }

  constructor(found) {
    Object.assign(this, found);
    this.windows = {};
    for (const window of JSON.parse(this.stats).windows) (this.windows[window.phase ?? "mixed"] ??= []).push(window.load);
  }

  answer(name, given) {
    const { phase, layer, window } = given;
    if (name === "summary") return this.summary;
    if (name === "rebalances") return this.rebalances;
    if (name === "verdict") return this.verdict[phase];
    if (name === "map") return this.map(phase, given.by, window);
    if (name === "history") return this.history(phase, layer);
    if (name === "layer") return this.layer(phase, layer, window);
    return this.whatIf(given);
  }

  /** [L][E] of a window, or of all. */
  counts(phase, window) {
    const windows = this.windows[phase];
    if (window !== null) return windows[window];
    return windows[0].map((row, l) => row.map((_, e) => windows.reduce((sum, load) => sum + load[l][e], 0)));
  }

  slots(placement, l, row) {
    return placement.slot_to_expert[l].map((expert, slot) => row[expert] * placement.share[l][slot]);
  }

  ranks(placement, l, row) {
    const loads = this.slots(placement, l, row), width = loads.length / this.summary.ep_size;
    return Array.from({ length: this.summary.ep_size }, (_, rank) => loads.slice(rank * width, (rank + 1) * width).reduce((a, b) => a + b, 0));
  }

  map(phase, by, window) {
    const counts = this.counts(phase, window);
    const columns = { rank: (row, l) => this.ranks(this.placement, l, row), expert: (row) => row, slot: (row, l) => this.slots(this.placement, l, row) };
    return {
      phase, by, window, layers: this.summary.layers,
      loads: counts.map((row) => row.reduce((a, b) => a + b, 0)), values: counts.map((row, l) => overFair(columns[by](row, l))),
    };
  }

  history(phase, layer) {
    this.inForce ??= {};
    const inForce = this.inForce[phase] ??= this.windows[phase].map((load) => load.map((row, l) => imbalance(this.ranks(this.placement, l, row))));
    const { measured, ...past } = this.past[phase], each = measured ?? inForce;
    return {
      ...past, phase, layer: this.summary.layers[layer], basis: measured ? "measured" : "placement", in_force: inForce.map(mean),
      worst: each.map((row) => Math.max(...row)), median: each.map(median), mean: each.map(mean), chosen: each.map((row) => row[layer]),
    };
  }

  layer(phase, layer, window) {
    const row = this.counts(phase, window)[layer], { placement, previous } = this;
    const ranks = this.ranks(placement, layer, row), before = previous && this.ranks(previous, layer, row);
    return {
      phase, window, layer: this.summary.layers[layer], imbalance: imbalance(ranks), load: row.reduce((a, b) => a + b, 0),
      ranks: overFair(ranks), slot_to_expert: placement.slot_to_expert[layer], slots: overFair(this.slots(placement, layer, row)),
      share: placement.share[layer], experts: overFair(row), counts: row,
      previous: previous && {
        generation: previous.generation, slot_to_expert: previous.slot_to_expert[layer], ranks: overFair(before), imbalance: imbalance(before),
      },
    };
  }

  /** Solved before the page was written, for its ranks and the default policy. */
  whatIf({ phase, extra, layer }) {
    const { ranks, ...found } = this.what_if[phase];
    const chosen = Math.min(extra, found.points.length - 1);
    return { ...found, chosen, layer: this.summary.layers[layer], ranks: ranks[chosen][layer] };
  }
}
