// Line and bar charts as SVG, as wide as their place.

import { axisTicks, colour, times } from "./words.js";

const SVG = "http://www.w3.org/2000/svg";
const LEFT = 46, RIGHT = 12, TOP = 8, BOTTOM = 30;

/** Below 1280 pixels text must not shrink with the drawing: one unit is one pixel. */
function frame(place, height, label) {
  const width = Math.max(place.clientWidth, 200);
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label });
  return { svg, width, height };
}

export function element(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function axes(svg, width, height, low, high) {
  const y = (value) => height - BOTTOM - ((value - low) / (high - low)) * (height - BOTTOM - TOP);
  for (const tick of axisTicks(low, high, 5)) {
    svg.append(element("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick) }));
    svg.append(element("text", { x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, `${+tick.toFixed(4)}x`));
  }
  return y;
}

/**
 * series: [{kind: worst|median|mean|chosen|predicted, values}], one x for each value. names: of the x's. knee: an x
 * to mark. events: [{at, label}], lines before the x that is `at`.
 * onPoint(i) is told where the pointer is, null where it is not; onPick(i) of a click.
 */
export function lineChart(place, { series, names, label, xName, here, marks, knee, events = [], onPoint, onPick }) {
  const { svg, width, height } = frame(place, 220, label);
  const all = series.flatMap((one) => one.values).filter((value) => value !== null);
  const low = Math.min(1, ...all), high = Math.max(1.05, ...all) + (Math.max(1.05, ...all) - low) * 0.06;
  const y = axes(svg, width, height, low, high);
  const last = Math.max(names.length - 1, 1);
  const x = (i) => (names.length === 1 ? (LEFT + width - RIGHT) / 2 : LEFT + 6 + (i / last) * (width - LEFT - RIGHT - 12));
  const room = Math.max(1, Math.ceil(names.length / Math.max(1, Math.floor((width - LEFT) / 95))));
  names.forEach((name, i) => {
    if (i % room) return;
    const anchor = i === 0 && names.length > 1 ? "start" : i === names.length - 1 && names.length > 1 ? "end" : "middle";
    svg.append(element("text", { x: x(i), y: height - BOTTOM + 15, "text-anchor": anchor }, name));
  });
  if (xName) svg.append(element("text", { x: width - RIGHT, y: height - 2, "text-anchor": "end" }, xName));
  if (here !== null && here !== undefined) svg.append(element("line", { class: "here", x1: x(here), x2: x(here), y1: TOP, y2: height - BOTTOM }));
  let free = 0; // where the next label has room
  for (const { at, label: words } of events) {
    const place = Math.min(x(at - 0.5), width - RIGHT);
    svg.append(element("line", { class: "event", x1: place, x2: place, y1: TOP, y2: height - BOTTOM }));
    if (place < free) continue;
    const left = place > width - 110;
    svg.append(element("text", { class: "value", x: place + (left ? -4 : 4), y: TOP + 10, "text-anchor": left ? "end" : "start" }, words));
    free = place + 7 * words.length + 12;
  }
  for (const { kind, values } of series) {
    const points = values.map((value, i) => (value === null ? null : `${x(i).toFixed(1)},${y(value).toFixed(1)}`)).filter(Boolean);
    if (points.length > 1) svg.append(element("polyline", { class: `series ${kind}`, points: points.join(" ") }));
    if (marks || points.length === 1) {
      values.forEach((value, i) => value !== null && svg.append(element("circle", { class: `mark ${kind}`, cx: x(i), cy: y(value), r: 4 })));
    }
  }
  if (knee !== null && knee !== undefined) {
    const value = Math.min(...series.map((one) => one.values[knee]).filter((v) => v !== null));
    svg.append(element("text", { class: "knee", x: x(knee) + 6, y: y(value) - 8 }, "knee"));
  }
  const pointer = element("line", { class: "here", y1: TOP, y2: height - BOTTOM, visibility: "hidden" });
  svg.append(pointer);
  const nearest = (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * width;
    return Math.max(0, Math.min(names.length - 1, Math.round(((at - LEFT - 6) / (width - LEFT - RIGHT - 12)) * last)));
  };
  svg.addEventListener("pointermove", (event) => {
    const i = nearest(event);
    pointer.setAttribute("x1", x(i));
    pointer.setAttribute("x2", x(i));
    pointer.setAttribute("visibility", "visible");
    onPoint?.(i);
  });
  svg.addEventListener("pointerleave", () => {
    pointer.setAttribute("visibility", "hidden");
    onPoint?.(null);
  });
  if (onPick) svg.addEventListener("click", (event) => onPick(nearest(event)));
  place.replaceChildren(svg);
}

/** values: load over fair share by rank. ghosts: [{kind, values}], the same under other placements. */
export function rankBars(place, { values, ghosts, label, dark, onPoint }) {
  const { svg, width, height } = frame(place, 200, label);
  const high = Math.max(1.25, ...values, ...ghosts.flatMap((one) => one.values)) * 1.05;
  const y = axes(svg, width, height, 0, high);
  const step = (width - LEFT - RIGHT) / values.length;
  const bar = Math.min(60, step * 0.78);
  const room = Math.ceil(22 / step);
  values.forEach((value, i) => {
    const middle = LEFT + step * (i + 0.5);
    const area = element("rect", { x: middle - step / 2, width: step, y: TOP, height: height - BOTTOM - TOP, fill: "transparent" });
    svg.append(element("rect", { class: "bar", x: middle - bar / 2, width: bar, y: y(value), height: Math.max(0, y(0) - y(value)), fill: `rgb(${colour(value, dark)})` }));
    if (i % room === 0) svg.append(element("text", { x: middle, y: height - BOTTOM + 15, "text-anchor": "middle" }, i));
    for (const { kind, values: other } of ghosts) {
      svg.append(element("line", { class: kind, x1: middle - bar / 2 - 2, x2: middle + bar / 2 + 2, y1: y(other[i]), y2: y(other[i]) }));
    }
    if (step > 44) svg.append(element("text", { class: "value", x: middle, y: y(0) - 6, "text-anchor": "middle" }, times(value)));
    area.addEventListener("pointerenter", () => onPoint(i));
    svg.append(area);
  });
  svg.append(element("line", { class: "fair", x1: LEFT, x2: width - RIGHT, y1: y(1), y2: y(1) }));
  svg.append(element("text", { x: width - RIGHT, y: height - 2, "text-anchor": "end" }, "rank; dashed: fair share"));
  svg.addEventListener("pointerleave", () => onPoint(null));
  place.replaceChildren(svg);
}

/** values: [from][to]; nodes: ranks of one. onPoint(from, to) of the cell that is pointed at, of none null. */
export function matrix(place, { values, nodes, label, onPoint }) {
  const count = values.length, room = Math.max(place.clientWidth, 200) - LEFT - RIGHT;
  const cell = Math.max(3, Math.min(26, 420 / count, room / count)), size = cell * count;
  const { svg } = frame(place, size + TOP + BOTTOM, label);
  const most = Math.max(1, ...values.flat());
  const every = Math.ceil(18 / cell);
  values.forEach((row, from) => {
    const y = TOP + from * cell;
    if (from % every === 0) {
      svg.append(element("text", { x: LEFT - 6, y: y + cell / 2 + 4, "text-anchor": "end" }, from));
      svg.append(element("text", { x: LEFT + (from + 0.5) * cell, y: TOP + size + 14, "text-anchor": "middle" }, from));
    }
    row.forEach((value, to) => {
      const shown = element("rect", { class: "cell", x: LEFT + to * cell, y, width: cell, height: cell, "fill-opacity": value ? 0.15 + 0.85 * (value / most) : 0 });
      shown.addEventListener("pointerenter", () => onPoint(from, to));
      svg.append(shown);
    });
  });
  for (let edge = nodes; nodes < count && edge < count; edge += nodes) {
    const at = edge * cell;
    svg.append(element("line", { class: "border", x1: LEFT + at, x2: LEFT + at, y1: TOP, y2: TOP + size }));
    svg.append(element("line", { class: "border", x1: LEFT, x2: LEFT + size, y1: TOP + at, y2: TOP + at }));
  }
  svg.addEventListener("pointerleave", () => onPoint(null));
  place.replaceChildren(svg);
}

/** A line of keys: [[kind, words]]. */
export function keys(entries) {
  const row = document.createElement("div");
  row.className = "keys";
  for (const [kind, words] of entries) {
    const item = document.createElement("span");
    const svg = element("svg", { viewBox: "0 0 26 10", "aria-hidden": "true" });
    svg.append(element("line", { class: kind, x1: 0, x2: 26, y1: 5, y2: 5, "stroke-width": 2.5, fill: "none" }));
    item.append(svg, words);
    row.append(item);
  }
  return row;
}
