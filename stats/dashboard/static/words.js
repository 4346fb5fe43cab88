// Figures as words and colours. No document here: these functions run anywhere.

const LIGHT = { low: [33, 102, 172], fair: [250, 250, 250], high: [178, 24, 43] };
const DARK = { low: [90, 160, 220], fair: [40, 46, 56], high: [240, 100, 90] };

/** Place of load over fair share on the colour scale: -1 at a quarter or less, 0 at fair share, 1 at 4 times or more. */
export function scale(ratio) {
  if (!(ratio > 0)) return -1;
  return Math.max(-1, Math.min(1, Math.log2(ratio) / 2));
}

/** [red, green, blue] of load over fair share. */
export function colour(ratio, dark) {
  const { low, fair, high } = dark ? DARK : LIGHT;
  const at = scale(ratio);
  const end = at < 0 ? low : high;
  const part = Math.abs(at) ** 0.8; // small differences are the usual ones
  return fair.map((c, i) => Math.round(c + (end[i] - c) * part));
}

/** Black or white, whichever is read better on a colour. */
export function inkOn([r, g, b]) {
  return 0.299 * r + 0.587 * g + 0.114 * b > 140 ? "#111" : "#fff";
}

export const times = (ratio) => `${ratio.toFixed(2)}x`;
export const percent = (part) => `${Math.round(part * 100)} %`;
export const count = (number) => Math.round(number).toLocaleString("en-US");
/** Other engines' files do not say how many tokens a window had. */
export const tokens = (number) => (number ? `, ${count(number)} tokens` : "");
export const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;

/** Bytes with a binary unit. */
export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = Math.min(units.length - 1, Math.max(0, Math.floor(Math.log2(Math.max(number, 1)) / 10)));
  return `${(number / 1024 ** power).toFixed(power ? 1 : 0)} ${units[power]}`;
}

export const ms = (seconds) => `${(seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0)} ms`;

/** The sentence about a verdict of the server. */
export function verdictSentence(verdict) {
  if (verdict.state === "one_rank") return "There is one rank only: nobody waits for another, nothing to balance.";
  const phase = verdict.phase === "mixed" ? "this recording" : verdict.phase;
  const was = verdict.as_it_was, newest = verdict.recent ? `, ${times(verdict.recent.mean)} in the newest window` : "";
  const now = was === null || was === undefined ? `In ${phase} the busiest rank carries ${times(verdict.mean)} its fair share`
    : `In ${phase} the busiest rank carried ${times(was)} its fair share while the balancer followed the traffic${newest}`;
  const waiting = `about ${percent(verdict.waiting)} of expert time is waiting`;
  if (verdict.state === "balanced") {
    const why = (was ?? verdict.mean) < 1.02 ? "" : ", and no placement that was tried would lower that by 2 % or more";
    return `Balanced, nothing to gain: ${now[0].toLowerCase()}${now.slice(1)}${why}.`;
  }
  if (was !== null && was !== undefined) {
    return `${now}; ${waiting}. One placement for all these windows would have had ${times(Math.min(...verdict.proposals.map((one) => one.after)))}.`;
  }
  return `${now}; ${waiting}. ${worthNaming(verdict.proposals).map(proposalSentence).join(" ")}${costSentence(verdict)}`;
}

const expected = (proposal) => proposal.held_out_after ?? proposal.after;

/** The first, and a larger one if its slots buy something. */
function worthNaming(proposals) {
  return proposals.filter((proposal, i) => i === 0 || expected(proposal) < 0.98 * expected(proposals[0]));
}

function proposalSentence(proposal, index) {
  const slots = proposal.redundant ? ` with ${plural(proposal.redundant, "redundant slot")}` : " in the same slots";
  const start = index ? "One" : "A new placement";
  return `${start}${slots} would bring it to ${times(expected(proposal))}.`;
}

/** What the first proposal would cost, as far as that is known. */
function costSentence(verdict) {
  const moved = verdict.proposals[0].bytes;
  if (!moved) return "";
  const rate = verdict.bytes_per_second;
  return ` It would move ${bytes(moved)}${rate ? `, about ${seconds(moved / rate)} as moves went so far` : ""}.`;
}

export const seconds = (number) => (Math.abs(number) < 1 ? ms(number) : `${number.toFixed(1)} s`);

/** What the balancer did, in a sentence. */
export function rebalancesSentence({ state, rebalances, applied, net_seconds: net }) {
  const doing = {
    off: "Online balancing is off: the placement stays as it was given.", idle: "The balancer watches.",
    solving: "The balancer looks for a better placement.", migrating: "Experts are on their way.",
    paused: "The balancer is paused.", dead: "The balancer has failed; the placement in force stays.",
  }[state] ?? "A recorded file has no balancer.";
  if (!rebalances.length) return state === "off" || !state ? doing : `${doing} It has decided nothing yet.`;
  const others = rebalances.filter((one) => ["skipped", "failed"].includes(one.result)).length;
  const planned = rebalances.length - applied - others;
  if (planned) return `Nothing was moved: ${plural(planned, "step")} from the placement that stands to the last one given.`;
  const worth = net === null ? "" : `, expected to save ${seconds(net)} of the engine's time beyond the stalls that they cost`;
  return `${doing} ${plural(applied, "rebalance")} applied${worth}${others ? `; ${others} skipped or failed` : ""}.`;
}

/** The imbalance before a rebalance, what was promised and what came. */
export function changeWords({ before, predicted, after }) {
  if (before === null) return "";
  const promised = predicted === null ? "" : ` \u2192 ${times(predicted)} promised`;
  return `${times(before)}${promised}${after === null ? "" : `, ${times(after)} came`}`;
}

/** What a proposal was measured on. */
export function basisSentence(proposal, windows) {
  if (proposal.held_out_after === null) return "on the windows that the solver knew: there are none to hold out";
  const which = proposal.held_out_windows === 1 ? `the last of ${windows} windows, solved without it` : `the last ${proposal.held_out_windows} of ${windows} windows, solved without them`;
  return `from ${times(proposal.held_out_before)}, on ${which}`;
}

/** What a point of the what-if panel says. */
export function whatIfSentence(point, knee, known) {
  const seen = point.held_out_after === null
    ? `${times(point.after)} on the windows that it was solved on`
    : `${times(point.held_out_after)} on the last ${plural(point.held_out_windows, "window")}, solved without them `
      + `(${times(point.after)} on all)`;
  const before = point.held_out_before ?? point.before;
  const much = point.bytes ? ` (${bytes(point.bytes)})` : "";
  const moves = point.moves === null ? "" : ` ${plural(point.moves, "expert")} would have to be loaded by another rank${much}.`;
  return `${plural(point.ep_size, "rank")} with ${plural(point.slots_per_rank, "slot")} each (${point.redundant} redundant): ${seen}. `
    + (point.rank_bytes ? `The experts take ${bytes(point.rank_bytes)} on a rank. ` : "")
    + `${known ? "The placement in force" : "Experts in order"}: ${times(before)}.${moves} `
    + `Survives the loss of any rank: ${point.survives_rank_loss ? "yes" : "no"}. `
    + `Policy ${point.policy}: ${point.reason}; solved in ${point.seconds.toFixed(3)} s.`
    + (knee ? " This is the knee: another slot a rank brings less than a tenth of all there is to gain." : "");
}

/** A window of the list, by its time, its steps or, where neither was recorded, its place. */
export function windowName(window, index) {
  const time = new Date(window.start_time ?? NaN);
  if (!Number.isNaN(time.getTime())) return time.toLocaleTimeString("en-GB");
  if (window.steps <= 1) return `window ${index + 1}`;
  return `steps ${window.start_step} to ${window.start_step + window.steps - 1}`;
}

export function ago(seconds) {
  if (seconds < 90) return `${Math.max(0, Math.round(seconds))} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return `${Math.round(seconds / 3600)} h ago`;
}

/** Round values from `low` to `high` for an axis, about `wanted` of them. */
export function axisTicks(low, high, wanted) {
  const rough = (high - low) / wanted;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step; value <= high + step * 1e-9; value += step) found.push(value);
  return found;
}
