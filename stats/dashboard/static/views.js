// The panels that are text and tables. They are given figures and draw them; they fetch nothing.

import { basisSentence, bytes, colour, count, inkOn, percent, plural, times, tokens, verdictSentence } from "./words.js";

export const at = (id) => document.getElementById(id);

export function make(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** A <dl> of [name, value, small print or nothing]. */
export function describe(list, entries) {
  list.replaceChildren(...entries.map(([name, value, small]) => {
    const shown = make("dd", {}, value);
    if (small) shown.append(make("small", {}, small));
    return make("div", {}, make("dt", {}, name), shown);
  }));
}

/** Buttons of which one is on. options: [[value, words]]. */
export function choice(place, options, chosen, onChoose) {
  if (place.dataset.options !== JSON.stringify(options)) {
    place.dataset.options = JSON.stringify(options);
    place.replaceChildren(...options.map(([value, words]) => {
      const button = make("button", { type: "button", role: "radio", "data-value": value }, words);
      button.addEventListener("click", () => onChoose(value));
      return button;
    }));
    place.onkeydown = (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      const buttons = [...place.children];
      if (!step) return;
      const next = buttons[(buttons.indexOf(document.activeElement) + step + buttons.length) % buttons.length];
      next.focus();
      onChoose(next.dataset.value);
      event.preventDefault();
    };
  }
  for (const button of place.children) {
    button.setAttribute("aria-checked", String(button.dataset.value === String(chosen)));
    button.tabIndex = button.dataset.value === String(chosen) ? 0 : -1;
  }
}

/** Fills a <select> once for its options, and chooses. */
export function select(place, options, chosen) {
  if (place.dataset.options !== JSON.stringify(options)) {
    place.dataset.options = JSON.stringify(options);
    place.replaceChildren(...options.map(([value, words]) => make("option", { value }, words)));
  }
  place.value = String(chosen);
}

export function showFacts(summary) {
  const nodes = summary.num_nodes > 1 ? ` on ${summary.num_nodes} nodes` : "";
  const entries = [["Model", summary.model || "not named"]];
  if (summary.file) entries.push(["File", summary.file]);
  if (summary.state === "ready") {
    entries.push(
      ["EP", `${summary.ep_size} rank${summary.ep_size === 1 ? "" : "s"}${nodes}`],
      ["MoE layers", count(summary.layers.length)],
      ["Experts in slots", `${summary.num_experts} in ${summary.num_slots}`],
      ["Placement", `generation ${summary.generation}, ${summary.digest.slice(0, 8)}`],
      ["Replicas", summary.num_slots === summary.num_experts ? "none" : { even: "share evenly", shares: "by fixed shares", step: "levelled each step" }[summary.routing]],
    );
  }
  if (summary.lost?.length) entries.push(["Lost", `rank ${summary.lost.join(", ")}; the others are counted from 0 again`]);
  if (summary.balancer) entries.push(["Balancer", summary.balancer]);
  describe(at("facts"), entries);
}

export function showVerdict(verdict, summary) {
  at("verdict").textContent = verdictSentence(verdict);
  const was = verdict.as_it_was ?? null;
  const numbers = was === null ? [] : [["As it was", times(was), "measured, each window under the placement that it met"]];
  numbers.push(
    [was === null ? "Imbalance" : "With today's placement", times(verdict.mean), `window by window, mean of ${plural(summary.layers.length, "layer")}, ${plural(verdict.windows, "window")}${tokens(verdict.tokens)}`],
    ["Worst layer", times(verdict.worst), `layer ${verdict.worst_layer}`],
  );
  if (verdict.recent) {
    const { mean, worst, measured_mean: given } = verdict.recent;
    const name = summary.balancer && summary.balancer !== "off" ? "Newest window" : "Last 30 s, summed";
    const measured = (given ?? null) === null ? "" : `, ${times(given)} of what the ranks were really given`;
    numbers.push([name, times(mean), `worst layer ${times(worst)}${measured}; as in /eplb/status`]);
  }
  numbers.push(["Waiting", percent(verdict.waiting), "of the ranks' expert time"]);
  verdict.proposals.forEach((proposal) => {
    const cost = proposal.moves === null ? "" : `; ${count(proposal.moves)} experts change their rank${proposal.bytes ? `, ${bytes(proposal.bytes)}` : ""}`;
    numbers.push([
      proposal.redundant ? `Solved, +${proposal.redundant} slots` : "Solved, same slots",
      times(proposal.held_out_after ?? proposal.after),
      `${basisSentence(proposal, verdict.windows)}${cost}`,
    ]);
  });
  numbers.push(["Survives a lost rank", summary.survives_rank_loss ? "yes" : "no", summary.survives_rank_loss ? "every expert stands on two ranks at least" : `${count(summary.on_one_rank)} of ${count(summary.num_experts * summary.layers.length)} experts stand on one rank only`]);
  describe(at("numbers"), numbers);
}

export function showLegend(dark) {
  const steps = [[0.25, "a quarter of fair share or less"], [0.5, "half"], [1, "fair share"], [2, "twice"], [4, "4 times or more"]];
  at("legend").replaceChildren(
    ...steps.map(([ratio, words]) => {
      const swatch = make("i");
      swatch.style.backgroundColor = `rgb(${colour(ratio, dark)})`;
      return make("span", {}, swatch, words);
    }),
    make("span", {}, make("i", { class: "none" }), "no load"),
  );
}

/** The chosen layer's slots, in boxes by rank. */
export function showSlots(detail, summary, dark, onExpert) {
  const perRank = detail.slot_to_expert.length / summary.ep_size;
  const copies = {};
  detail.slot_to_expert.forEach((expert) => { copies[expert] = (copies[expert] ?? 0) + 1; });
  const boxes = [];
  for (let rank = 0; rank < summary.ep_size; rank++) {
    if (summary.num_nodes > 1 && rank % summary.ranks_per_node === 0) {
      boxes.push(make("div", { class: "node" }, `node ${rank / summary.ranks_per_node}`));
    }
    const cells = make("div", { class: "cells" });
    for (let slot = rank * perRank; slot < (rank + 1) * perRank; slot++) {
      const expert = detail.slot_to_expert[slot];
      const cell = make("span", { "data-expert": expert, "data-slot": slot }, String(expert));
      const shade = colour(detail.slots[slot], dark);
      cell.style.backgroundColor = `rgb(${shade})`;
      cell.style.color = inkOn(shade);
      if (copies[expert] > 1) cell.classList.add("many");
      cells.append(cell);
    }
    boxes.push(make("div", {}, make("div", { class: "rank" }, `rank ${rank}: ${times(detail.ranks[rank])}`), cells));
  }
  const place = at("slots");
  place.replaceChildren(...boxes);
  place.onpointerover = (event) => {
    const expert = event.target.dataset?.expert;
    for (const cell of place.querySelectorAll("[data-expert]")) cell.classList.toggle("shown", cell.dataset.expert === expert);
    onExpert(expert === undefined ? null : Number(expert));
  };
  place.onpointerleave = () => place.onpointerover({ target: {} });
}

export function expertSentence(detail, summary, expert) {
  const perRank = detail.slot_to_expert.length / summary.ep_size;
  const places = detail.slot_to_expert.flatMap((held, slot) => (held === expert ? [slot] : []));
  const where = places.map((slot) => `slot ${slot} on rank ${Math.floor(slot / perRank)}${places.length > 1 ? ` (${percent(detail.share[slot])} of its tokens)` : ""}`);
  return `Expert ${expert}: ${times(detail.experts[expert])} the fair share of an expert, ${count(detail.counts[expert])} choices; ${where.join(", ")}`;
}

/** rows: arrays of text, the first cell of each its name. */
export function fillTable(place, head, rows) {
  place.replaceChildren(make("table", {},
    make("thead", {}, make("tr", {}, ...head.map((words) => make("th", { scope: "col" }, String(words))))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, String(cell)))))),
  ));
}
