// The panels about what the balancer did: its decisions, the bytes they moved, shares of replicas, changed slots.

import { matrix } from "./chart.js";
import { at, fillTable, make } from "./views.js";
import { bytes, changeWords, count, ms, percent, plural, rebalancesSentence, seconds, times } from "./words.js";

const HEAD = ["when", "trigger", "outcome", "imbalance", "reason", "moved", "in node", "across", "solve", "transfer", "stall", "net gain"];
const MOST_EXPERTS = 12, MOST_CHANGES = 10;

let chosen = null; // the time of the rebalance whose bytes are shown, null for the newest that moved something

/** onTable(rows) is given the table twin of the matrix. */
export function showRebalances(data, onTable) {
  at("rebalances-text").textContent = rebalancesSentence(data);
  const list = data.rebalances, moved = list.filter((one) => one.rank_bytes && one.bytes);
  at("rebalances").hidden = at("rebalances-note").hidden = !list.length;
  at("bytes").hidden = !moved.length;
  const shown = moved.find((one) => one.time === chosen) ?? moved[0];
  fillTable(at("rebalances"), HEAD, list.map((one) => cells(one)));
  [...at("rebalances").querySelectorAll("tbody tr")].forEach((row, i) => {
    row.className = list[i].result;
    if (!moved.includes(list[i])) return;
    const button = make("button", { type: "button", "aria-pressed": String(list[i] === shown) }, row.cells[0].textContent);
    button.addEventListener("click", () => {
      chosen = list[i].time;
      showRebalances(data, onTable);
    });
    row.cells[0].replaceChildren(button);
  });
  if (shown) showBytes(shown, data.ranks_per_node, onTable);
}

function cells(one) {
  const links = one.bytes_by_link ?? {};
  const acted = one.result !== "skipped", timed = acted && one.result !== "planned";
  return [
    one.time ? new Date(one.time * 1000).toLocaleTimeString("en-GB") : "-", one.trigger + (one.phase ? `, ${one.phase}` : ""),
    one.result === "applied" ? `generation ${one.generation}` : one.result, changeWords(one), one.reason, acted ? count(one.moves) : "-",
    acted ? bytes(links.intra_node ?? 0) : "-", acted ? bytes(links.inter_node ?? 0) : "-", one.result === "planned" ? "-" : ms(one.solve_seconds), timed ? ms(one.migration_seconds) : "-",
    timed ? ms(one.stall_seconds) : "-", one.net_seconds === null || one.net_seconds === undefined || !acted ? "-" : seconds(one.net_seconds),
  ];
}

function showBytes(one, nodes, onTable) {
  const table = one.rank_bytes, total = table.flat().reduce((a, b) => a + b, 0);
  at("bytes-title").textContent = `Bytes from rank to rank, generation ${one.generation}`;
  const say = (from, to) => {
    at("bytes-text").textContent = from === null ? `${bytes(total)} in all. A row is the rank that sends, a column the one that receives.`
      : `Rank ${from} to rank ${to}: ${bytes(table[from][to])}`;
  };
  matrix(at("matrix"), { values: table, nodes, label: "Bytes from each rank to each other", onPoint: say });
  say(null);
  onTable(() => [["from", ...table.map((_, to) => `to ${to}`)], table.map((row, from) => [from, ...row.map(bytes)])]);
}

/** How the replicas of the layer's busiest experts share its tokens. */
export function showShares(detail, summary) {
  const perRank = detail.slot_to_expert.length / summary.ep_size, held = {};
  detail.slot_to_expert.forEach((expert, slot) => (held[expert] ??= []).push(slot));
  const many = Object.entries(held).filter(([, slots]) => slots.length > 1).sort((a, b) => detail.experts[b[0]] - detail.experts[a[0]]);
  at("shares-panel").hidden = !many.length;
  at("shares").replaceChildren(...many.slice(0, MOST_EXPERTS).map(([expert, slots]) => {
    const bar = make("div", { class: "parts" }, ...slots.map((slot) => {
      const words = `rank ${Math.floor(slot / perRank)}: ${percent(detail.share[slot])}`;
      const part = make("span", { title: `slot ${slot}, ${words}` }, words);
      part.style.flexGrow = Math.max(detail.share[slot], 0.001);
      return part;
    }));
    return make("div", { class: "share" }, make("span", {}, `expert ${expert}, ${times(detail.experts[expert])}`), bar);
  }));
  const rest = many.length - MOST_EXPERTS;
  at("shares-text").textContent = `${summary.routing === "step" ? "Levelled anew at each step; these are the shares that it starts from. " : ""}${rest > 0 ? `${plural(rest, "more expert")} with replicas: see the table below.` : ""}`;
}

/** What the last change of placement changed in the layer. */
export function showChanges(detail, summary) {
  const before = detail.previous;
  at("changes").hidden = !before;
  if (!before) return;
  const perRank = detail.slot_to_expert.length / summary.ep_size;
  const changed = detail.slot_to_expert.flatMap((expert, slot) => (expert === before.slot_to_expert[slot] ? [] : [slot]));
  for (const cell of at("slots").querySelectorAll("[data-slot]")) cell.classList.toggle("changed", changed.includes(Number(cell.dataset.slot)));
  const names = changed.slice(0, MOST_CHANGES).map((slot) => `slot ${slot} on rank ${Math.floor(slot / perRank)}: ${before.slot_to_expert[slot]} \u2192 ${detail.slot_to_expert[slot]}`);
  const more = changed.length - names.length;
  const effect = `The same load there: ${times(before.imbalance)}, now ${times(detail.imbalance)}.`;
  at("changes").textContent = `Since generation ${before.generation}: ${changed.length ? `${names.join("; ")}${more > 0 ? ` and ${more} more` : ""}` : "the same experts in the same slots"}. ${effect}`;
}
