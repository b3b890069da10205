// What every view needs: elements made of text alone, words for screen readers, numbers and times as people read them.

const SVG = "http://www.w3.org/2000/svg";

/** An element. Attributes that are functions become listeners; children are elements or text, never markup. */
export function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** The same for drawings. */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

export const find = (selector, inside = document) => inside.querySelector(selector);

/** Tell screen readers what happened; the same words twice are told twice. */
export function say(words) {
  const place = find("#said");
  place.textContent = place.textContent === words ? words + "\u00a0" : words;
}

/** A bar filled to `share` (0…1). It is decoration: the number stands beside it. */
export function bar(share, kind = "") {
  const fill = el("span", { class: `fill ${kind}` });
  fill.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
  return el("span", { class: "bar", "aria-hidden": "true" }, fill);
}

/** A table with a caption for screen readers. head: texts; rows: lists of cells; a number stands right. */
export function table(caption, head, rows) {
  const cell = (value) => {
    const number = typeof value === "number" || (typeof value === "string" && /^[−+]?[\d,.]+( ?(ms|%|\/s|s))?$/.test(value));
    return el("td", number ? { class: "number" } : {}, typeof value === "number" ? count(value) : value);
  };
  return el(
    "table",
    {},
    el("caption", { class: "hidden" }, caption),
    el("thead", {}, el("tr", {}, head.map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, rows.map((row) => el("tr", {}, row.map(cell)))),
  );
}

/** What went wrong, in the server's words, where people look. */
export function trouble(error) {
  say(error.message);
  return el("p", { class: "trouble", role: "alert" }, error.message);
}

export const count = (n) => n.toLocaleString("en-US");

export function plural(n, one, many = one + "s") {
  return `${count(n)} ${n === 1 ? one : many}`;
}

/** Three digits that matter: 0.0123, 1.23, 123. */
export function short(x) {
  if (x === 0) return "0";
  const digits = Math.max(0, Math.min(4, 2 - Math.floor(Math.log10(Math.abs(x)))));
  return x.toFixed(digits).replace("-", "−");
}

export const percent = (share) => `${(share * 100).toFixed(share > 0 && share < 0.0995 ? 1 : 0)}%`;

// A log's unit of time is its owner's. These sizes leave no doubt for dates between 1973 and 5138.
const UNITS = [
  [1e17, 1e6],
  [1e14, 1e3],
  [1e11, 1],
  [1e8, 1e-3],
];

/** How to read times like this one: a function to milliseconds, or null where they are plain numbers. */
export function clock(latest) {
  const unit = UNITS.find(([least]) => Math.abs(Number(latest)) >= least);
  return unit ? (time) => Number(time) / unit[1] : null;
}

const DAY = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", year: "numeric", timeZone: "UTC" });
const MINUTE = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", timeZone: "UTC" });

export function when(time) {
  const read = clock(time);
  if (!read) return `t = ${time}`;
  const date = new Date(read(time));
  return `${DAY.format(date)}, ${MINUTE.format(date)}`;
}

export function day(time) {
  const read = clock(time);
  return read ? DAY.format(new Date(read(time))) : `t = ${time}`;
}
