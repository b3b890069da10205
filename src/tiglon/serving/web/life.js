// A life of behaviours on a time line: a lane for each kind of item, time from left to right.

import { clock, day, el, plural, svg, when } from "./page.js";
import { lanes, nameOf } from "./names.js";

const LANE = 22; // height in pixels
const AXIS = 20;
const MOST = 3000; // dots; older ones are left out, and that is said

/**
 * Draw events into `place`. events: [{item_id, timestamp}], oldest first; added: item ids of events that are tried.
 * removed: Set of indices. column: what the lanes are. pick(index): called when somebody chooses an event.
 * Returns {choose(index), attend(list of {item_id, timestamp, weight})}.
 */
export function timeLine(place, { events, removed, added, column, pick }) {
  const from = Math.max(0, events.length - MOST);
  const shown = events.slice(from);
  const by = lanes([...shown.map((event) => event.item_id), ...added], column);
  const width = Math.max(280, place.clientWidth);
  const label = Math.min(150, width * 0.28);
  const height = by.names.length * LANE + AXIS;
  const first = Number(shown[0]?.timestamp ?? 0);
  const last = Number(shown.at(-1)?.timestamp ?? 1);
  const right = width - 14 - (added.length ? 18 : 0);
  const x = (time) => label + 8 + ((right - label - 8) * (Number(time) - first)) / Math.max(1, last - first);
  const y = (item) => by.of(item) * LANE + LANE / 2;

  const drawing = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  by.names.forEach((name, lane) => {
    const words = svg("text", { x: label, y: lane * LANE + LANE / 2, class: "lane-name" }, clipped(name, label));
    drawing.append(
      svg("line", { x1: label + 8, x2: width, y1: lane * LANE + LANE / 2, y2: lane * LANE + LANE / 2, class: "lane" }),
      svg("g", {}, svg("title", {}, name), words),
    );
  });
  for (const time of ticks(first, last, Math.max(1, Math.floor((right - label) / 110)))) {
    drawing.append(
      svg("line", { x1: x(time), x2: x(time), y1: 0, y2: height - AXIS, class: "tick" }),
      svg("text", { x: x(time), y: height - 6, class: "tick-name" }, day(time)),
    );
  }
  const rings = svg("g", { class: "rings" });
  drawing.append(rings);
  shown.forEach((event, at) => {
    const gone = removed.has(from + at);
    const dot = svg("circle", { cx: x(event.timestamp), cy: y(event.item_id), r: 4.5, class: `dot k${by.of(event.item_id)}${gone ? " gone" : ""}` });
    dot.addEventListener("click", () => choose(from + at));
    dot.append(svg("title", {}, `${nameOf(event.item_id)} · ${when(event.timestamp)}`));
    drawing.append(dot);
  });
  added.forEach((item, at) => {
    const [cx, cy] = [right + 14, y(item) + (at % 3) * 3];
    drawing.append(svg("path", { d: `M${cx} ${cy - 6}l6 6l-6 6l-6-6z`, class: `dot k${by.of(item)} tried` }, svg("title", {}, `tried: ${nameOf(item)}`)));
  });
  const cursor = svg("circle", { r: 8, class: "cursor", visibility: "hidden" });
  drawing.append(cursor);

  // To the keyboard and to screen readers the line is a slider over events.
  const slider = el(
    "div",
    {
      class: "line",
      role: "slider",
      tabindex: 0,
      "aria-label": `Time line of ${plural(events.length, "behaviour")}`,
      "aria-valuemin": 1,
      "aria-valuemax": events.length,
      keydown,
    },
    drawing,
  );
  let chosen = events.length - 1;
  valued();

  function choose(index, silent = false) {
    chosen = Math.max(from, Math.min(events.length - 1, index));
    valued();
    const event = events[chosen];
    cursor.setAttribute("cx", x(event.timestamp));
    cursor.setAttribute("cy", y(event.item_id));
    cursor.setAttribute("visibility", "visible");
    if (!silent) pick(chosen);
  }

  function valued() {
    const event = events[chosen];
    if (!event) return;
    slider.setAttribute("aria-valuenow", chosen + 1);
    slider.setAttribute("aria-valuetext", `${nameOf(event.item_id)}, ${when(event.timestamp)}`);
  }

  function keydown(pressed) {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowDown: -1, ArrowUp: 1, PageDown: -10, PageUp: 10, Home: -Infinity, End: Infinity }[pressed.key];
    if (step === undefined || !events.length) return;
    pressed.preventDefault();
    choose(chosen + step);
  }

  /** Ring the behaviours that a ranker read: the larger, the more. */
  function attend(attended) {
    const most = Math.max(...attended.map((read) => read.weight), 1e-9);
    rings.replaceChildren(
      ...attended
        .filter((read) => Number(read.timestamp) >= first)
        .map((read) => svg("circle", { cx: x(read.timestamp), cy: y(read.item_id), r: 6 + (7 * read.weight) / most, class: "ring" })),
    );
  }

  place.replaceChildren(slider);
  if (from) place.append(el("p", { class: "note" }, `The newest ${MOST} of ${plural(events.length, "behaviour")}.`));
  return { choose, attend };
}

const clipped = (name, width) => (name.length * 7 > width ? name.slice(0, Math.floor(width / 7) - 1) + "…" : name);

/** Times at even steps, on days where times are dates. */
function ticks(first, last, most) {
  if (!(last > first)) return [first];
  const read = clock(last);
  const scale = read ? read(last) / last : 1; // to milliseconds
  const DAY = 864e5;
  const steps = read ? [1, 2, 7, 14, 30.4375, 61, 91.3, 182.6, 365.25, 1826].map((days) => (days * DAY) / scale) : [];
  const step = steps.find((each) => (last - first) / each <= most) ?? (last - first) / most;
  const found = [];
  for (let time = first + step / 2; time < last - step / 3; time += step) found.push(time);
  return found.length ? found : [first + (last - first) / 2];
}
