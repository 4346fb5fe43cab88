// The page: what is chosen, when figures are fetched, and which panel shows them.

import { showChanges, showRebalances, showShares } from "./balancer.js";
import { keys, lineChart, rankBars } from "./chart.js";
import { NoContact, ask, isFile, statsAddress } from "./data.js";
import { LoadMap } from "./map.js";
import { at, choice, expertSentence, fillTable, select, showFacts, showLegend, showSlots, showVerdict } from "./views.js";
import { ago, bytes, count, plural, times, tokens, whatIfSentence, windowName } from "./words.js";

const REFRESH_MS = 2000, SOLVE_MS = 10000, LOST_MS = 3000;
const COLUMNS = [["rank", "Ranks"], ["expert", "Experts"], ["slot", "Slots"]];
const POLICIES = ["auto", "greedy", "fast", "robust", "connected", "hierarchical"];

const chosen = { phase: null, by: "rank", layer: null, window: null, epSize: null, extra: 1, policy: "auto" };
const got = { summary: null, map: null, history: null, layer: null, rebalances: null, verdict: null, whatIf: null };
const clock = { tick: 0, version: null, refreshed: 0, solved: 0, skew: 0 };
const night = matchMedia("(prefers-color-scheme: dark)");

const windowsNow = () => got.summary.windows[chosen.phase];

/** The window that is looked at, null for all. A server merges windows when they get many: the one with its step. */
function windowIndex() {
  if (chosen.window === null) return null;
  if (got.summary.file) return Math.min(chosen.window.index, windowsNow().length - 1);
  return Math.max(0, windowsNow().findLastIndex((window) => window.start_step <= chosen.window.step));
}

// --- fetching: one refresh at a time, and one more if something was chosen meanwhile

function serial(work) {
  let running = false, again = false;
  return async function run() {
    if (running) {
      again = true;
      return;
    }
    running = true;
    do {
      again = false;
      try {
        await work();
        at("failure").hidden = true;
      } catch (error) {
        if (error instanceof NoContact) continue; // no contact: the dot says so
        at("failure").textContent = error.message;
        at("failure").hidden = false;
      }
    } while (again);
    running = false;
  };
}

const refresh = serial(async () => {
  clock.refreshed = Date.now();
  const summary = await ask("summary");
  got.summary = summary;
  clock.version = summary.version;
  showFacts(summary);
  showContact();
  const ready = summary.state === "ready";
  at("panels").hidden = !ready;
  at("waiting").hidden = summary.state !== "waiting";
  at("no-experts").hidden = summary.state !== "no_experts";
  if (!ready) {
    at("phases").hidden = true;
    if (summary.state === "waiting") showTry(summary);
    return;
  }
  settle(summary);
  const index = windowIndex();
  const where = { phase: chosen.phase, layer: chosen.layer, window: index };
  const [map, history, layer, rebalances] = await Promise.all([
    ask("map", { phase: chosen.phase, by: chosen.by, window: index }),
    ask("history", { phase: chosen.phase, layer: chosen.layer }),
    ask("layer", where),
    ask("rebalances"),
  ]);
  Object.assign(got, { map, history, layer, rebalances });
  showAll();
  if (isFile ? !got.whatIf || !clock.solved : Date.now() - clock.solved >= SOLVE_MS) solve();
});

const solve = serial(async () => {
  clock.solved = Date.now();
  const { phase, policy, extra, layer, epSize } = chosen;
  if (got.verdict?.phase !== phase || got.verdict.version !== clock.version) {
    const version = clock.version;
    got.verdict = { ...(await ask("verdict", { phase })), version };
    if (phase === chosen.phase) showVerdict(got.verdict, got.summary);
  }
  at("what-if-text").classList.add("busy");
  try {
    got.whatIf = await ask("what-if", { phase, policy, extra, layer, ep_size: epSize });
    got.whatIf.failure = null;
  } catch (error) {
    if (error instanceof NoContact) throw error;
    got.whatIf = { failure: error.message };
  } finally {
    at("what-if-text").classList.remove("busy");
  }
  showWhatIf();
  showLayer();
});

/** Choices that fit what there is. */
function settle(summary) {
  const phases = Object.keys(summary.windows);
  if (!phases.includes(chosen.phase)) chosen.phase = phases.includes("decode") ? "decode" : phases[0];
  chosen.layer = Math.min(chosen.layer ?? 0, summary.layers.length - 1);
  chosen.epSize ??= summary.ep_size;
  const sizes = [...new Set([2, 4, 8, 16, 32, 64, 128, 256, summary.ep_size])].filter((size) => size <= summary.num_experts).sort((a, b) => a - b);
  select(at("ep-size"), (isFile ? [summary.ep_size] : sizes).map((size) => [size, size]), chosen.epSize);
  const policies = isFile ? ["auto"] : POLICIES.filter((name) => name !== "hierarchical" || summary.num_nodes > 1);
  select(at("policy"), policies.map((name) => [name, name]), chosen.policy);
  select(at("layer"), summary.layers.map((layer, index) => [index, layer]), chosen.layer);
  choice(at("phases"), phases.map((phase) => [phase, phase[0].toUpperCase() + phase.slice(1)]), chosen.phase, (phase) => {
    Object.assign(chosen, { phase, window: null });
    clock.solved = 0;
    refresh();
  });
  at("phases").hidden = false;
  choice(at("columns"), COLUMNS, chosen.by, (by) => {
    chosen.by = by;
    refresh();
  });
}

// --- showing

function showTry(summary) {
  at("try").textContent = `curl ${location.origin}/v1/completions -H 'Content-Type: application/json' \\\n  -d '{"model": "${summary.model}", "prompt": "Once upon a time", "max_tokens": 60}'`;
}

function showAll() {
  showWindows();
  showMap();
  showHistory();
  showLayer();
  showRebalances(got.rebalances, (rows) => table("bytes", rows));
  showExport();
  const { phase, by, layer } = chosen;
  at("link-verdict").href = `api/verdict?phase=${phase}`;
  at("link-map").href = `api/map?phase=${phase}&by=${by}`;
  at("link-history").href = `api/history?phase=${phase}&layer=${layer}`;
  at("link-layer").href = `api/layer?phase=${phase}&layer=${layer}`;
  at("link-what-if").href = `api/what-if?phase=${phase}&layer=${layer}`;
}

function showWindows() {
  const windows = windowsNow(), index = windowIndex(), range = at("window");
  range.max = windows.length - 1;
  range.value = index ?? windows.length - 1;
  range.disabled = windows.length < 2;
  const name = index === null ? `all ${windows.length}${tokens(windows.reduce((sum, w) => sum + w.tokens, 0))}`
    : `${index + 1} of ${windows.length}: ${windowName(windows[index], index)}${tokens(windows[index].tokens)}`;
  at("window-text").textContent = name;
  range.setAttribute("aria-valuetext", name);
  at("all-windows").disabled = index === null;
}

const map = new LoadMap(at("map"), (row, column) => {
  at("map-text").textContent = row === null ? selectedSentence() : cellSentence(row, column);
}, (row) => pickLayer(row));

function cellSentence(row, column) {
  const { map: data, summary } = got, value = data.values[row][column];
  const start = `Layer ${data.layers[row]}, ${data.by} ${column}`;
  if (!data.loads[row]) return `${start}: no load`;
  const perRank = summary.num_slots / summary.ep_size;
  const where = data.by === "slot" ? ` on rank ${Math.floor(column / perRank)}` : "";
  const load = (value * data.loads[row]) / data.values[row].length;
  return `${start}${where}: ${times(value)} the fair share of a ${data.by}, ${count(load)} of ${count(data.loads[row])} choices`;
}

function selectedSentence() {
  const { map: data } = got, line = data.values[chosen.layer], most = Math.max(...line);
  const when = data.window === null ? ", all windows together" : "";
  return data.loads[chosen.layer] ? `Layer ${data.layers[chosen.layer]}${when}: at most ${times(most)}, on ${data.by} ${line.indexOf(most)}` : `Layer ${data.layers[chosen.layer]}: no load`;
}

function separators() {
  const { summary } = got, found = {};
  if (chosen.by === "expert") return found;
  const perRank = chosen.by === "slot" ? summary.num_slots / summary.ep_size : 1;
  for (let rank = 1; rank < summary.ep_size; rank++) {
    const node = summary.num_nodes > 1 && rank % summary.ranks_per_node === 0;
    if (node || chosen.by === "slot") found[rank * perRank] = node ? "node" : "rank";
  }
  return found;
}

function showMap() {
  showLegend(night.matches);
  map.show(got.map, { selected: chosen.layer, separators: separators(), dark: night.matches });
  at("map-text").textContent = map.cursor ? cellSentence(...map.cursor) : selectedSentence();
  table("map", () => [["layer", ...got.map.values[0].map((_, i) => `${got.map.by} ${i}`)],
    got.map.values.map((line, row) => [got.map.layers[row], ...line.map((value) => value.toFixed(2))])]);
}

function showHistory() {
  const { history } = got, names = windowsNow().map((window, i) => windowName(window, i)), place = at("history");
  if (history.worst.length !== names.length) return; // windows have come in between: the next refresh has both
  const measured = history.basis === "measured", promised = history.predicted.some((value) => value !== null);
  const against = (i) => (promised && history.predicted[i] !== null ? `; promised ${times(history.predicted[i])}, mean ${times(history.mean[i])}` : "");
  const sentence = (i) => `${names[i]}: worst layer ${times(history.worst[i])}, median ${times(history.median[i])}, layer ${history.layer} ${times(history.chosen[i])}${against(i)}${tokens(windowsNow()[i].tokens)}`;
  const series = [["worst", history.worst, "worst layer"], ["median", history.median, "median layer"], ["chosen", history.chosen, `layer ${history.layer}`]];
  if (promised) series.push(["mean", history.mean, "mean of the layers"], ["predicted", history.predicted, "mean that the balancer promised"]);
  at("history-note").textContent = measured ? "Of what the ranks were really given, each window under the placement that it met."
    : "Each window as the placement in force would spread it.";
  lineChart(place, {
    series: series.map(([kind, values]) => ({ kind, values })), names, here: windowIndex(),
    label: "Imbalance of the worst layer, of the median layer and of the chosen layer, by window",
    events: history.rebalances.map((one) => ({ at: one.at, label: `gen ${one.generation}` })),
    onPoint: (i) => { at("history-text").textContent = sentence(i ?? windowIndex() ?? names.length - 1); },
    onPick: (i) => pickWindow(i),
  });
  const entries = series.map(([kind, , words]) => [kind, words]);
  if (history.rebalances.length) entries.push(["event", "a new generation of the placement"]);
  place.append(keys(entries));
  at("history-text").textContent = sentence(windowIndex() ?? names.length - 1);
  const columns = [["mean", history.mean], ["placement in force", history.in_force], ["promised", history.predicted]];
  table("history", () => [["window", "tokens", "worst layer", "median", `layer ${history.layer}`, ...columns.map(([name]) => name)],
    names.map((name, i) => [name, count(windowsNow()[i].tokens), ...[history.worst, history.median, history.chosen, ...columns.map(([, line]) => line)].map((line) => line[i]?.toFixed(3) ?? "-")])]);
}

function showLayer() {
  const { layer, summary, whatIf } = got;
  if (!layer) return;
  const comparable = whatIf?.points && whatIf.layer === layer.layer && whatIf.phase === layer.phase && whatIf.ranks.length === layer.ranks.length;
  const busiest = layer.ranks.indexOf(Math.max(...layer.ranks));
  at("layer-title").textContent = `Layer ${layer.layer}`;
  at("layer-sentence").textContent = layer.load ? `${layer.window === null ? "All windows together: rank" : "Rank"} ${busiest} carries ${times(layer.ranks[busiest])} its fair share, rank ${layer.ranks.indexOf(Math.min(...layer.ranks))} ${times(Math.min(...layer.ranks))}, of ${count(layer.load)} choices.` : "No load in this window.";
  const ghosts = [], before = layer.previous;
  if (before) ghosts.push({ kind: "before", values: before.ranks, words: `before the last rebalance (generation ${before.generation})` });
  if (comparable) ghosts.push({ kind: "ghost", values: whatIf.ranks, words: `all windows with the placement of the what-if panel (${whatIf.points[whatIf.chosen].redundant} redundant slots)` });
  const say = (i) => { at("ranks-text").textContent = [`Rank ${i ?? busiest}: ${times(layer.ranks[i ?? busiest])} its fair share`, ...ghosts.map((one) => `${times(one.values[i ?? busiest])} ${one.words}`)].join("; "); };
  rankBars(at("ranks"), { values: layer.ranks, ghosts, label: `Load of each rank in layer ${layer.layer} over fair share`, dark: night.matches, onPoint: say });
  say(null);
  if (ghosts.length) at("ranks").append(keys(ghosts.map((one) => [one.kind, one.words])));
  const most = layer.experts.indexOf(Math.max(...layer.experts));
  const tell = (expert) => { at("slots-text").textContent = expertSentence(layer, summary, expert ?? most); };
  showSlots(layer, summary, night.matches, tell);
  tell(null);
  showShares(layer, summary);
  showChanges(layer, summary);
  const perRank = layer.slot_to_expert.length / summary.ep_size;
  const was = (expert) => before.slot_to_expert.flatMap((held, slot) => (held === expert ? [slot] : [])).join(", ");
  table("layer", () => [["expert", "choices", "over fair share", "slots", "ranks", "shares", ...(before ? ["slots before"] : [])], layer.counts.map((number, expert) => {
    const slots = layer.slot_to_expert.flatMap((held, slot) => (held === expert ? [slot] : []));
    return [expert, count(number), layer.experts[expert].toFixed(2), slots.join(", "), slots.map((slot) => Math.floor(slot / perRank)).join(", "), slots.map((slot) => layer.share[slot].toFixed(2)).join(", "), ...(before ? [was(expert)] : [])];
  })]);
}

function showWhatIf() {
  const { whatIf, summary } = got;
  at("extra-text").textContent = chosen.extra;
  at("curve").hidden = at("curve-text").hidden = Boolean(whatIf.failure);
  if (whatIf.failure) {
    at("what-if-text").textContent = whatIf.failure;
    return;
  }
  const point = whatIf.points[whatIf.chosen];
  at("what-if-text").textContent = whatIfSentence(point, whatIf.knee === whatIf.chosen, point.ep_size === summary.ep_size);
  const held = whatIf.points[0].held_out_after !== null;
  const series = [{ kind: "chosen", values: whatIf.points.map((p) => p.after) }];
  if (held) series.push({ kind: "median", values: whatIf.points.map((p) => p.held_out_after) });
  const say = (i) => {
    const p = whatIf.points[i ?? whatIf.chosen];
    at("curve-text").textContent = `${p.slots_per_rank} slots a rank: ${held ? `${times(p.held_out_after)} on windows not solved with, ` : ""}${times(p.after)} on all`;
  };
  say(null);
  lineChart(at("curve"), {
    series, marks: true, knee: whatIf.knee, here: whatIf.chosen, xName: `slots a rank (redundant in all)${point.rank_bytes ? ", experts' weights on a rank" : ""}`,
    names: whatIf.points.map((p) => `${p.slots_per_rank} (${p.redundant})${p.rank_bytes ? `, ${bytes(p.rank_bytes)}` : ""}`),
    label: "Imbalance by number of slots a rank", onPoint: say,
    onPick: (i) => { at("extra").value = i; at("extra").dispatchEvent(new Event("change")); },
  });
  const names = [["chosen", "all windows, solved on them"]];
  if (held) names.unshift(["median", `last ${plural(point.held_out_windows, "window")}, solved without them`]);
  at("curve").append(keys(names));
  table("what-if", () => [["slots a rank", "redundant", "before", "after, all windows", "before, held out", "after, held out", "worst layer", "experts to load", "bytes to load", "weights a rank", "survives a lost rank", "policy"],
    whatIf.points.map((p, i) => [`${p.slots_per_rank}${i === whatIf.knee ? " (knee)" : ""}`, p.redundant, p.before.toFixed(4), p.after.toFixed(4), p.held_out_before?.toFixed(4) ?? "-", p.held_out_after?.toFixed(4) ?? "-", p.after_worst.toFixed(4), p.moves ?? "-", p.bytes === null ? "-" : bytes(p.bytes), p.rank_bytes === null ? "-" : bytes(p.rank_bytes), p.survives_rank_loss ? "yes" : "no", p.policy])]);
  showExport();
}

function showExport() {
  const { summary, whatIf } = got, point = whatIf?.points?.[whatIf.chosen];
  const file = summary.file ?? "stats.json", live = !summary.file && !isFile;
  at("live-files").hidden = !live;
  at("page-link").hidden = isFile;
  const flags = [`--phase ${chosen.phase === "mixed" ? "all" : chosen.phase}`, `--ep-size ${point?.ep_size ?? summary.ep_size}`];
  flags.push(`--num-slots ${point ? point.ep_size * point.slots_per_rank : summary.num_slots}`);
  if (summary.num_nodes > 1) flags.push(`--ranks-per-node ${summary.ranks_per_node}`);
  if (chosen.policy !== "auto") flags.push(`--policy ${chosen.policy}`);
  const lines = [`eplb-offline ${file} ${flags.join(" ")} -o placement.json`, "moeserve serve ... --moe-config.load-balancer.placement placement.json"];
  if (live) lines.unshift(`curl -f ${location.origin}/eplb/stats.json -o stats.json`);
  at("command").textContent = lines.join("\n");
}

/** The table twin of a chart, made while it is open. */
function table(name, rows) {
  const details = document.querySelector(`[data-table="${name}"]`);
  const fill = () => { if (details.open) fillTable(details.querySelector(".scroll"), ...rows()); };
  details.ontoggle = fill;
  fill();
}

// --- choosing

function pickLayer(index) {
  chosen.layer = index;
  clock.solved = 0;
  refresh();
}

function pickWindow(index) {
  chosen.window = index === null ? null : { index, step: windowsNow()[index].start_step };
  refresh();
}

at("layer").addEventListener("change", (event) => pickLayer(Number(event.target.value)));
at("window").addEventListener("input", (event) => pickWindow(Number(event.target.value)));
at("all-windows").addEventListener("click", () => pickWindow(null));
at("what-if").addEventListener("submit", (event) => event.preventDefault());
at("extra").addEventListener("input", (event) => { at("extra-text").textContent = event.target.value; });
at("what-if").addEventListener("change", () => {
  Object.assign(chosen, { epSize: Number(at("ep-size").value), extra: Number(at("extra").value), policy: at("policy").value });
  solve();
});
for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const text = at(button.dataset.copy);
    getSelection().selectAllChildren(text);
    await navigator.clipboard?.writeText(text.textContent); // without it, what is selected can be copied by hand
    button.textContent = navigator.clipboard ? "Copied" : "Selected";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
}

function redraw() {
  if (got.summary?.state !== "ready" || !got.map) return;
  showAll();
  if (got.whatIf) showWhatIf();
}
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== width) requestAnimationFrame(redraw);
  width = innerWidth;
});
night.addEventListener("change", redraw);

// --- contact: events say each second which version there is; none while nobody looks

let events = null, later = 0;

function listen() {
  events?.close();
  events = new EventSource("events");
  events.onmessage = (event) => {
    const { version, time } = JSON.parse(event.data);
    clock.tick = Date.now();
    clock.skew = clock.tick - time * 1000;
    showContact();
    if (version !== clock.version && Date.now() - clock.refreshed >= REFRESH_MS) refresh();
  };
  events.onerror = () => {
    events.close();
    clearTimeout(later);
    later = setTimeout(() => document.hidden || listen(), 1000);
  };
}

function showContact() {
  if (isFile) return;
  const place = at("contact"), silent = Date.now() - clock.tick, lost = silent > LOST_MS;
  const last = got.summary?.last_time;
  let words = "live";
  if (got.summary?.file) words = "recorded file";
  else if (last) words = `live, counted ${ago((Date.now() - clock.skew) / 1000 - last)}`;
  if (lost) words = clock.tick ? `no contact for ${Math.round(silent / 1000)} s` : "connecting";
  at("contact-text").textContent = words;
  place.className = `contact ${lost ? (clock.tick ? "lost" : "") : got.summary?.file ? "" : "live"}`;
}

document.addEventListener("visibilitychange", () => {
  if (isFile) return;
  if (document.hidden) {
    events?.close();
    clearTimeout(later);
  } else {
    listen();
  }
});
refresh();
statsAddress().then((address) => { at("download").href = address; });
if (isFile) {
  at("contact-text").textContent = "written to a file";
  document.querySelector("footer").hidden = true;
} else {
  setInterval(showContact, 1000);
  listen();
}
