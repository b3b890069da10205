// An answer as a list with reasons, and two answers side by side.

import * as api from "./api.js";
import { bar, count, el, percent, plural, short, table, when } from "./page.js";
import { codeOf, nameOf } from "./names.js";

/** What differs: [{item, was, is}] with places from 1, null where the item is not in the list. */
export function difference(before, after) {
  const was = new Map(before.items.map((item, at) => [api.same(item.item_id), at + 1]));
  const is = new Map(after.items.map((item, at) => [api.same(item.item_id), at + 1]));
  const left = before.items.map((item, at) => ({ item, was: at + 1, is: is.get(api.same(item.item_id)) ?? null }));
  const right = after.items.map((item, at) => ({ item, was: was.get(api.same(item.item_id)) ?? null, is: at + 1 }));
  return {
    left,
    right,
    gone: left.filter((row) => row.is === null).length,
    fresh: right.filter((row) => row.was === null).length,
    moved: right.filter((row) => row.was !== null && row.was !== row.is).length,
  };
}

export function summary({ fresh, gone, moved }) {
  return fresh + gone + moved ? `${fresh} new, ${gone} gone, ${moved} moved` : "Nothing changed";
}

/** One list. tools: {attempt(item_id), show(attended)}, each may be missing. */
export function list(answer, tools = {}) {
  if (!answer.items.length) return el("p", { class: "note" }, "No items: nothing is left that the rules allow.");
  return el("ol", { class: "answer" }, answer.items.map((item, at) => row(item, at + 1, null, tools)));
}

/** Two lists side by side, what changed marked in words and colour. */
export function sideBySide(before, after, titles, tools = {}) {
  const changes = difference(before, after);
  const side = (title, rows, mark) =>
    el(
      "section",
      { class: "side", "aria-label": title },
      el("h4", {}, title),
      rows.length
        ? el("ol", { class: "answer" }, rows.map((each, at) => row(each.item, at + 1, mark(each), tools)))
        : el("p", { class: "note" }, "No items."),
    );
  return el(
    "div",
    { class: "sides" },
    side(titles[0], changes.left, ({ is }) => (is === null ? ["gone", "gone"] : null)),
    side(titles[1], changes.right, ({ was, is }) => {
      if (was === null) return ["new", "new"];
      if (was === is) return null;
      return was > is ? ["up", `▲ ${was - is}`, `up ${was - is}`] : ["down", `▼ ${is - was}`, `down ${is - was}`];
    }),
  );
}

function row(item, place, mark, tools) {
  const name = nameOf(item.item_id);
  const code = codeOf(item.item_id);
  const head = el(
    "div",
    { class: "item" },
    el("span", { class: "place", "aria-hidden": "true" }, String(place)),
    el(
      "div",
      { class: "what" },
      el("span", { class: "name" }, name),
      el("span", { class: "id" }, api.typed(item.item_id), code ? ` · ${code.join("–")}` : ""),
    ),
    el(
      "div",
      { class: "facts" },
      mark ? el("span", { class: `mark ${mark[0]}`, "aria-label": mark[2] ?? null, role: mark[2] ? "img" : null }, mark[1]) : null,
      el("span", { class: "source" }, item.source),
      el("span", { class: "score", title: "score" }, short(item.score)),
      tools.attempt
        ? el("button", { type: "button", class: "quiet", "aria-label": `Try: they take ${name}`, title: "What if they take it?", click: () => tools.attempt(item.item_id) }, "Try")
        : null,
    ),
  );
  const entry = el("li", { class: mark ? `is-${mark[0]}` : "" }, head);
  if (item.reasons) entry.append(reasons(item, tools));
  return entry;
}

/** Who found it, what each feature gave, which past behaviours were read. Filled when opened. */
function reasons(item, tools) {
  const { sources, features, attended } = item.reasons;
  const words = sources.map((source) => `${source.name} #${source.rank}`).join(" · ");
  const box = el("details", {}, el("summary", {}, el("span", { class: "hidden" }, `Why ${nameOf(item.item_id)}: `), words || "why"));
  box.addEventListener("toggle", () => {
    if (box.open && box.childElementCount === 1) {
      box.append(
        el(
          "div",
          { class: "why" },
          el("div", {}, el("h5", {}, "Found by"), table("Who found it", ["retriever", "rank", "score"], sources.map((s) => [s.name, s.rank, short(s.score)]))),
          Object.keys(features).length ? el("div", {}, el("h5", {}, "What gave the score"), weights(features)) : null,
          attended.length ? el("div", { class: "read" }, el("h5", {}, "Behaviours read"), reading(attended)) : null,
        ),
      );
    }
    tools.show?.(box.open ? attended : []);
  });
  return box;
}

function weights(features) {
  const entries = Object.entries(features).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
  const most = Math.max(...entries.map(([, value]) => Math.abs(value)), 1e-9);
  return el(
    "ul",
    { class: "bars" },
    entries.map(([name, value]) =>
      el("li", {}, el("span", {}, name.replaceAll("_", " ")), bar(Math.abs(value) / most, value < 0 ? "minus" : ""), el("span", { class: "number" }, (value > 0 ? "+" : "") + short(value))),
    ),
  );
}

function reading(attended) {
  const most = Math.max(...attended.map((read) => read.weight), 1e-9);
  return el(
    "ul",
    { class: "bars" },
    attended
      .toSorted((a, b) => b.weight - a.weight)
      .slice(0, 8)
      .map((read) => el("li", {}, el("span", { class: "one-line" }, nameOf(read.item_id)), el("span", { class: "id" }, when(read.timestamp)), bar(read.weight / most), el("span", { class: "number" }, percent(read.weight)))),
  );
}

/** The line above a list: which bundle, who gave candidates, what is missing. */
export function provenance(answer) {
  const given = Object.entries(answer.sources).map(([name, n]) => `${name} ${count(n)}`);
  const filtered = new Map();
  for (const { rule } of answer.filtered ?? []) filtered.set(rule, (filtered.get(rule) ?? 0) + 1);
  return el(
    "div",
    { class: "provenance" },
    el("span", {}, `bundle ${answer.bundle || "unsaved"}`),
    given.length ? el("span", {}, `candidates: ${given.join(", ")}`) : null,
    filtered.size ? el("span", {}, `kept out: ${[...filtered].map(([rule, n]) => `${plural(n, "item")} (${rule})`).join(", ")}`) : null,
    (answer.degraded ?? []).map((why) => el("strong", { class: "degraded" }, why)),
  );
}

/** Every item id that an answer names. */
export const itemsOf = (answer) => [
  ...answer.items.map((item) => item.item_id),
  ...answer.items.flatMap((item) => item.reasons?.attended.map((read) => read.item_id) ?? []),
];
