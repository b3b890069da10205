// What items are called and which kind they are. Filled by whatever the server says of items, asked once for the rest.

import * as api from "./api.js";

const OTHER = "other";
const LANES = 8; // more colours than this nobody tells apart
const known = new Map(); // same(item_id) → {item_id, text, columns, code}
const asked = new Set();

/** Keep what an answer says of items. */
export function learn(items) {
  for (const item of items) known.set(api.same(item.item_id), { ...known.get(api.same(item.item_id)), ...item });
}

/** Learn what is not known yet of these items. A server that cannot say leaves them with their ids. */
export async function lookUp(ids) {
  const missing = new Map(ids.map((id) => [api.same(id), id]).filter(([key]) => !asked.has(key) && !known.get(key)?.columns));
  if (!missing.size) return;
  for (const key of missing.keys()) asked.add(key);
  const all = [...missing.values()];
  for (let at = 0; at < all.length; at += 1000) learn(await api.lookUp(all.slice(at, at + 1000)));
}

/** The item's words, or its id where it has none. */
export const nameOf = (id) => known.get(api.same(id))?.text || `item ${api.typed(id)}`;

export const codeOf = (id) => known.get(api.same(id))?.code ?? null;

/** Whether ids of items are texts, as far as items were seen. */
export const idsAreTexts = () => known.size > 0 && [...known.values()].every((item) => typeof item.item_id === "string");

/** The columns that sort these items into kinds: more than one value, few of them. "" is the first code. */
export function kindsOf(ids) {
  const values = new Map();
  for (const id of ids) {
    for (const [column, value] of Object.entries(known.get(api.same(id))?.columns ?? {})) {
      if (typeof value !== "string" || value.length > 40) continue;
      if (!values.has(column)) values.set(column, new Map());
      const seen = values.get(column);
      seen.set(value, (seen.get(value) ?? 0) + 1);
    }
  }
  return [...values]
    .filter(([, seen]) => seen.size > 1)
    .map(([column, seen]) => [column, topShare(seen), seen.size])
    .filter(([, share]) => share > 0.5)
    .sort((a, b) => b[2] - a[2])
    .map(([column]) => column);
}

/** What share of items the lanes would show by name. */
function topShare(seen) {
  const counts = [...seen.values()].sort((a, b) => b - a);
  const sum = (list) => list.reduce((total, n) => total + n, 0);
  return sum(counts.slice(0, LANES - 1)) / sum(counts);
}

/** Lanes for these items by a column, or by the first code of their ID (""): most frequent first, the rest last. */
export function lanes(ids, column) {
  const kind = (id) => {
    if (column) return String(known.get(api.same(id))?.columns?.[column] ?? OTHER);
    const code = codeOf(id);
    return code ? `code ${code[0]}` : "all";
  };
  const counts = new Map();
  for (const id of ids) counts.set(kind(id), (counts.get(kind(id)) ?? 0) + 1);
  const order = [...counts].filter(([name]) => name !== OTHER).sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
  const names = order.slice(0, order.length > LANES || counts.has(OTHER) ? LANES - 1 : LANES).map(([name]) => name);
  const rest = ids.some((id) => !names.includes(kind(id)));
  const all = rest ? [...names, OTHER] : names;
  return { names: all, of: (id) => (names.includes(kind(id)) ? names.indexOf(kind(id)) : all.length - 1) };
}
