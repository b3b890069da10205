// Semantic IDs: the tree of codes, walked column by column, and the way that a beam took through it.

import * as api from "./api.js";
import { learn } from "./names.js";
import { lookedAt } from "./person.js";
import { bar, count, el, find, plural, say, short, svg, trouble } from "./page.js";

const ROW = 30; // height in pixels of a prefix in the beam's picture
const MOST = 15; // prefixes of a depth that are asked for

let path = []; // codes walked so far
let beam = null; // a BeamResponse
let opened = false;

export function start() {
  find("#beam-form").addEventListener("submit", (event) => {
    event.preventDefault();
    showBeam(find("#beam-user").value.trim());
  });
  find("#columns").addEventListener("keydown", keys);
}

/** The view is opened: the root, and the user that is looked at elsewhere. */
export function open() {
  if (!find("#beam-user").value) find("#beam-user").value = lookedAt();
  if (!opened) walk([]);
  opened = true;
}

// -- the tree ----------------------------------------------------------------------------------------------

/** Show the node at a prefix, with a column for each node on the way. */
async function walk(prefix, focus = false) {
  path = prefix;
  const place = find("#columns");
  try {
    // What the columns so far show stays; only what is new is asked for.
    const kept = [...place.children].filter((column) => isBegin(prefixOf(column), prefix));
    const nodes = await Promise.all(prefixes(prefix).slice(kept.length).map((each) => api.tree(each)));
    if (path !== prefix) return;
    for (const node of nodes) for (const child of node.children) learn(child.items);
    const columns = [...kept, ...nodes.map(column)];
    if (nodes.length) place.replaceChildren(...columns);
    else place.replaceChildren(...kept);
    mark();
    crumbs();
    const last = columns.at(-1);
    last.scrollIntoView({ block: "nearest", inline: "end" });
    if (focus) find("button", last)?.focus();
    if (prefix.length) say(last.dataset.said);
  } catch (error) {
    find("#tree-trouble").replaceChildren(trouble(error));
  }
}

const prefixes = (prefix) => Array.from({ length: prefix.length + 1 }, (_, depth) => prefix.slice(0, depth));
const prefixOf = (column) => (column.dataset.prefix ? column.dataset.prefix.split(",").map(Number) : []);
const isBegin = (begin, prefix) => begin.length <= prefix.length && begin.every((code, at) => code === prefix[at]);

function column(node) {
  const whole = node.prefix.length + 1 >= node.depth; // its children are IDs
  const title = node.prefix.length ? node.prefix.join("–") : "All items";
  const said = `${title}: ${plural(node.count, "item")}, ${plural(node.children.length, whole ? "ID" : "branch", whole ? "IDs" : "branches")}`;
  const most = Math.max(...node.children.map((child) => child.count), 1);
  return el(
    "section",
    { class: "column", "data-prefix": node.prefix.join(","), "data-said": said, "aria-label": said },
    el("h4", {}, title, el("span", { class: "id" }, ` ${plural(node.count, "item")}`)),
    el("ul", {}, node.children.map((child) => el("li", {}, whole ? leaf(node, child) : branch(node, child, most)))),
  );
}

function branch(node, child, most) {
  const prefix = [...node.prefix, child.code];
  return el(
    "button",
    { type: "button", class: "node", "data-at": prefix.join(","), "aria-expanded": "false", click: () => walk(prefix) },
    el("span", { class: "code" }, String(child.code)),
    el("span", { class: "texts" }, child.items.slice(0, 3).map((item) => el("span", {}, item.text || api.typed(item.item_id)))),
    el("span", { class: "kept" }),
    bar(child.count / most),
    el("span", { class: "number" }, count(child.count), el("span", { class: "hidden" }, " items")),
  );
}

function leaf(node, child) {
  return el(
    "div",
    { class: "node leaf", "data-at": [...node.prefix, child.code].join(","), tabindex: 0, role: "group" },
    el("span", { class: "code" }, String(child.code)),
    el("span", { class: "texts" }, child.items.map((item) => el("span", {}, item.text || "no words", el("span", { class: "id" }, ` ${api.typed(item.item_id)}`)))),
    el("span", { class: "kept" }),
  );
}

/** Show in the columns what is open, and what the beam kept. */
function mark() {
  const kept = new Map((beam?.depths ?? []).flatMap((depth) => depth.map((each, at) => [each.prefix.join(","), [at + 1, each.score]])));
  for (const node of document.querySelectorAll("#columns .node")) {
    const at = node.dataset.at;
    const open = isBegin(at.split(",").map(Number), path);
    if (node.hasAttribute("aria-expanded")) node.setAttribute("aria-expanded", open);
    const [place, score] = kept.get(at) ?? [];
    find(".kept", node).textContent = place ? `beam ${place} · ${short(score)}` : "";
  }
}

function crumbs() {
  const step = (words, prefix) => el("li", {}, el("button", { type: "button", class: "quiet", "aria-current": prefix.length === path.length ? "true" : null, click: () => walk(prefix) }, words));
  find("#crumbs").replaceChildren(step("All items", []), ...path.map((code, at) => step(String(code), path.slice(0, at + 1))));
}

/** Up and down within a column, right into a branch, left out of it. */
function keys(event) {
  const node = event.target.closest(".node");
  if (!node) return;
  const at = node.dataset.at.split(",").map(Number);
  const nodes = [...node.closest(".column").querySelectorAll(".node")];
  const move = (to) => {
    event.preventDefault();
    to?.focus();
  };
  if (event.key === "ArrowDown") move(nodes[nodes.indexOf(node) + 1]);
  else if (event.key === "ArrowUp") move(nodes[nodes.indexOf(node) - 1]);
  else if (event.key === "Home") move(nodes[0]);
  else if (event.key === "End") move(nodes.at(-1));
  else if (event.key === "ArrowLeft") move(find(`#columns .node[data-at="${at.slice(0, -1).join(",")}"]`));
  else if (event.key === "ArrowRight" && !node.classList.contains("leaf")) {
    event.preventDefault();
    walk(at, true);
  }
}

// -- the beam ----------------------------------------------------------------------------------------------

async function showBeam(text) {
  const place = find("#beam");
  find("#tree-trouble").replaceChildren();
  if (!text) {
    beam = null;
    place.replaceChildren();
    return mark();
  }
  try {
    const { user_id } = await api.user(text);
    beam = await api.beam({ user_id, k: MOST });
    place.replaceChildren(beam.depths.length ? picture(beam.depths) : el("p", { class: "note" }, "No beam: nothing is known of this user, so TIGER was not asked."));
    mark();
    say(beam.depths.length ? `The beam of user ${text} went to ${beam.depths[0].slice(0, 3).map((each) => each.prefix[0]).join(", ")}` : "No beam");
  } catch (error) {
    find("#tree-trouble").replaceChildren(trouble(error));
  }
}

/** A column for each depth, best first; a line from each prefix to the one it grew from. */
function picture(depths) {
  const rows = Math.max(...depths.map((depth) => depth.length));
  const columns = depths.map((depth, at) =>
    el(
      "section",
      { class: "beam-depth", "aria-label": `Depth ${at + 1}: ${plural(depth.length, "prefix", "prefixes")} kept` },
      el("h4", {}, `Code ${at + 1}`, el("span", { class: "id" }, ` the best ${depth.length}`)),
      el("ol", {}, depth.map((each) => el("li", {}, grown(each, depth[0].score)))),
    ),
  );
  const lines = depths.slice(1).map((depth, at) => links(depths[at], depth, rows));
  return el("div", { class: "beam" }, columns.flatMap((each, at) => (lines[at] ? [each, lines[at]] : [each])));
}

function grown(each, best) {
  return el(
    "button",
    { type: "button", class: "prefix", title: each.example, click: () => walk(each.prefix.length > 1 ? each.prefix.slice(0, -1) : each.prefix) },
    el("span", { class: "code" }, each.prefix.join("–")),
    el("span", { class: "name" }, each.example),
    bar(Math.exp(each.score - best)),
    el("span", { class: "number" }, short(each.score)),
  );
}

function links(parents, children, rows) {
  const middle = (row) => row * ROW + ROW / 2;
  const drawing = svg("svg", { class: "links", width: 36, height: rows * ROW, viewBox: `0 0 36 ${rows * ROW}`, "aria-hidden": "true" });
  children.forEach((child, row) => {
    const from = parents.findIndex((parent) => isBegin(parent.prefix, child.prefix));
    if (from < 0) return;
    const [y1, y2] = [middle(from), middle(row)];
    drawing.append(svg("path", { d: `M0 ${y1}C18 ${y1} 18 ${y2} 36 ${y2}`, class: row < 5 ? "strong" : "" }));
  });
  return drawing;
}
