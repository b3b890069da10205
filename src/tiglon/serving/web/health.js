// Health: rates, latencies and sources, from readings of /metrics, a minute apart at most.

import * as api from "./api.js";
import { bar, count, el, find, percent, short, svg, trouble } from "./page.js";

const EVERY = 2000; // milliseconds between readings
const WINDOW = 30; // readings: rates and quantiles are those of the last minute
const HISTORY = 90; // readings in the chart
const readings = []; // {at, series: Map(name → [{labels, value}])}
const rates = [];
let timer = null;

export function open() {
  if (!timer) tick();
}

export function close() {
  clearTimeout(timer);
  timer = null;
}

async function tick() {
  timer = setTimeout(() => !find("#health").hidden && tick(), EVERY);
  if (document.hidden && readings.length) return;
  try {
    const [ready, text] = await Promise.all([api.ready(), api.metrics()]);
    readings.push({ at: performance.now() / 1000, series: parse(text) });
    if (readings.length > WINDOW) readings.shift();
    find("#health-trouble").replaceChildren(...(ready.trouble ? [trouble(new Error(ready.trouble))] : []));
    draw(ready);
  } catch (error) {
    if (find("#health-trouble").textContent !== error.message) find("#health-trouble").replaceChildren(trouble(error));
  }
}

/** Prometheus' text: name{label="value",…} number. */
export function parse(text) {
  const series = new Map();
  for (const line of text.split("\n")) {
    const found = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!found) continue;
    const labels = {};
    for (const [, name, value] of (found[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) labels[name] = value.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
    if (!series.has(found[1])) series.set(found[1], []);
    series.get(found[1]).push({ labels, value: Number(found[3].replace("+Inf", "Infinity")) });
  }
  return series;
}

const sum = (list) => list.reduce((total, each) => total + each, 0);

/** How much a counter grew since an older reading, by a label: Map(label → growth). */
function growth(name, label, older, newer) {
  const by = new Map();
  const of = ({ labels }) => (label ? labels[label] : "");
  for (const each of newer.get(name) ?? []) by.set(of(each), (by.get(of(each)) ?? 0) + each.value);
  for (const each of older?.get(name) ?? []) by.set(of(each), (by.get(of(each)) ?? 0) - each.value);
  return by;
}

/** The q-quantile of a histogram's growth in seconds, even within a bucket; null where nothing happened. */
export function quantile(buckets, q) {
  const sorted = [...buckets].map(([le, n]) => [le === "+Inf" ? Infinity : Number(le), n]).sort((a, b) => a[0] - b[0]);
  const all = sorted.at(-1)?.[1] ?? 0;
  if (all <= 0) return null;
  let [below, passed] = [0, 0];
  for (const [le, n] of sorted) {
    if (n >= q * all) return le === Infinity ? below : below + ((le - below) * (q * all - passed)) / Math.max(n - passed, 1e-12);
    [below, passed] = [le, n];
  }
  return below;
}

function histogram(name, label, older, newer) {
  const only = (series, value) => new Map([[name, (series?.get(name) ?? []).filter(({ labels }) => !label || labels[label] === value)]]);
  const values = new Set((newer.get(name) ?? []).map(({ labels }) => (label ? labels[label] : "")));
  return new Map([...values].map((value) => [value, growth(name, "le", only(older, value), only(newer, value))]));
}

const milliseconds = (seconds) => (seconds === null ? "–" : `${short(seconds * 1000)} ms`);

function draw(ready) {
  const newest = readings.at(-1);
  const newer = newest.series;
  const asked = (series) => new Map([...series].map(([name, list]) => [name, list.filter(({ labels }) => labels.route === undefined || labels.route.startsWith("/v1/"))]));
  const after = asked(newer);
  // A quiet minute says nothing of latencies and sources: then all since the start does.
  const answered = (series) => sum([...growth("tiglon_requests_total", "", null, asked(series)).values()]);
  const oldest = readings.length > 1 && answered(newer) > answered(readings[0].series) ? readings[0] : null;
  const older = oldest?.series ?? null;
  const seconds = oldest ? newest.at - oldest.at : null;
  const before = older && asked(older);
  const requests = growth("tiglon_requests_total", "route", before, after);
  const status = growth("tiglon_requests_total", "status", before, after);
  const failed = sum([...status].filter(([code]) => code.startsWith("5")).map(([, n]) => n));
  const total = sum([...requests.values()]);
  const times = histogram("tiglon_request_seconds_bucket", "", before, after).get("") ?? new Map();
  const inside = sum((newer.get("tiglon_requests_inside") ?? []).map(({ value }) => value));

  if (readings.length > 1) {
    const previous = readings.at(-2);
    rates.push(sum([...growth("tiglon_requests_total", "", asked(previous.series), after).values()]) / (newest.at - previous.at));
    if (rates.length > HISTORY) rates.shift();
  }
  find("#health-now").replaceChildren(
    seconds ? figure("Requests", short(total / seconds), "a second") : figure("Requests", count(total), "in all"),
    figure("Median", milliseconds(quantile(times, 0.5)), "from arrival to answer"),
    figure("99 of 100", milliseconds(quantile(times, 0.99)), "answered within"),
    figure("Failed", total ? percent(failed / total) : "–", "5xx", failed > 0),
    figure("Inside", count(inside), "running or waiting"),
    figure("Refused", count(sum([...growth("tiglon_refused_total", "", null, newer).values()])), "since the start"),
  );
  find("#health-bundle").textContent = `Bundle ${ready.bundle || "unsaved"}, ${count(ready.items)} items, ${count(ready.users)} users`;
  find("#health-window").textContent = seconds ? `of the last ${Math.round(seconds)} s` : "since the start";
  find("#rates").replaceChildren(chart());

  const routes = histogram("tiglon_request_seconds_bucket", "route", before, after);
  rows("#by-route", [...requests].filter(([, n]) => n > 0).sort((a, b) => b[1] - a[1]).map(([route, n]) => [route, count(n), milliseconds(quantile(routes.get(route) ?? [], 0.5)), milliseconds(quantile(routes.get(route) ?? [], 0.99))]));
  const stages = histogram("tiglon_stage_seconds_bucket", "stage", older, newer);
  rows("#by-stage", [...stages].map(([stage, buckets]) => [stage, milliseconds(quantile(buckets, 0.5)), milliseconds(quantile(buckets, 0.99))]));
  const items = growth("tiglon_items_total", "source", older, newer);
  shares("#by-source", items);
  shares("#by-degraded", growth("tiglon_degraded_total", "why", older, newer));
}

const figure = (name, value, unit, bad = false) => el("div", { class: bad ? "figure bad" : "figure" }, el("dt", {}, name), el("dd", {}, value, el("span", { class: "id" }, ` ${unit}`)));

function rows(selector, list) {
  const body = find(`${selector} tbody`);
  const width = find(`${selector} thead tr`).childElementCount;
  const cells = list.map((row) => el("tr", {}, row.map((value, at) => el("td", { class: at ? "number" : "" }, value))));
  body.replaceChildren(...(cells.length ? cells : [el("tr", {}, el("td", { colspan: width, class: "note" }, "nothing yet"))]));
}

function shares(selector, counts) {
  const entries = [...counts].filter(([, n]) => n > 0).sort((a, b) => b[1] - a[1]);
  const all = sum(entries.map(([, n]) => n));
  const lines = entries.map(([name, n]) => el("li", {}, el("span", {}, name), bar(n / all), el("span", { class: "number" }, percent(n / all))));
  find(selector).replaceChildren(...(lines.length ? lines : [el("li", { class: "note" }, "nothing in this time")]));
}

/** Requests a second over the last minutes; its numbers stand above it. */
function chart() {
  const [width, height] = [600, 80];
  const most = Math.max(1, ...rates);
  const x = (at) => width - (rates.length - 1 - at) * (width / (HISTORY - 1));
  const y = (value) => height - 2 - (value / most) * (height - 8);
  const line = rates.map((value, at) => `${at ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  return svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", class: "chart", role: "img", "aria-label": `Requests a second, at most ${short(most)} in the last three minutes` },
    rates.length > 1 ? svg("path", { d: `${line}L${width} ${height}L${x(0).toFixed(1)} ${height}Z`, class: "area" }) : null,
    rates.length > 1 ? svg("path", { d: line, class: "curve" }) : null,
  );
}
