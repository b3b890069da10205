// All that the console asks of the server. The page works below any path, so addresses are relative to it.

const ROOT = new URL("../", document.baseURI);
const KEY = "tiglon-key";

/** An answer that is none: what was given, the rule, what to do next. */
export class Refused extends Error {
  constructor(status, what, rule = "", fix = "") {
    super([what, rule, fix].filter(Boolean).map((part) => part.replace(/[.?]?$/, (end) => end || ".")).join(" "));
    this.status = status;
  }
}

/** The key for this tab; it is gone when the tab is closed. */
export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

// Ids are whole numbers of 64 bits, which a JavaScript number is not: large ones are BigInts here.
export function read(text) {
  return JSON.parse(text, (_, value, context) =>
    typeof value === "number" && !Number.isSafeInteger(value) && /^-?\d+$/.test(context?.source ?? "")
      ? BigInt(context.source)
      : value,
  );
}

export function write(value) {
  return JSON.stringify(value, (_, part) => (typeof part === "bigint" ? JSON.rawJSON(String(part)) : part));
}

/** An id as typed: digits are a number, anything else text, and "5" in quotes is the text 5. */
export function id(typed) {
  const text = typed.trim();
  if (/^".+"$/.test(text)) return text.slice(1, -1);
  if (!/^-?\d+$/.test(text)) return text;
  const number = Number(text);
  return Number.isSafeInteger(number) ? number : BigInt(text);
}

/** The id as it would be typed. */
export const typed = (value) =>
  typeof value === "string" && (typeof id(value) !== "string" || /^".+"$/.test(value)) ? `"${value}"` : String(value);

/** A key for maps: 5 and "5" are two ids. */
export const same = (value) => (typeof value === "string" ? `s${value}` : `n${value}`);

async function ask(path, message, method) {
  const headers = { Accept: "application/json" };
  if (message !== undefined) headers["Content-Type"] = "application/json";
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  let response;
  try {
    response = await fetch(new URL(path, ROOT), { method, headers, body: message === undefined ? undefined : write(message) });
  } catch {
    throw new Refused(0, "The server does not answer", "", "Is it still running?");
  }
  const text = await response.text();
  if (response.ok) return text;
  if (response.status === 401) document.dispatchEvent(new Event("key-needed"));
  let error = {};
  try {
    error = JSON.parse(text);
  } catch {}
  throw new Refused(response.status, error.what ?? `The server answered ${response.status}`, error.rule, error.fix);
}

const get = async (path) => read(await ask(path, undefined, "GET"));
const post = async (path, message) => read(await ask(path, message, "POST"));

export const recommend = (request) => post("v1/recommend", request);
export const store = (events) => post("v1/events", { events });
export const tree = (prefix) => get(`v1/tree?${prefix.map((code) => `prefix=${code}`).join("&")}`);
export const similar = (item, k) => post("v1/similar", { item_id: item, k });

/** A user's life. Unquoted digits are read as the bundle's own users are. */
export function user(text) {
  const quoted = /^".+"$/.test(text);
  return get(`v1/users/${encodeURIComponent(quoted ? id(text) : text)}?id_type=${quoted ? "string" : "auto"}`);
}
export const beam = (request) => post("v1/beam", request);
export const metrics = () => ask("metrics", undefined, "GET");
export const ready = () => get("health/ready");

/** [{item_id, text, columns, code}] of those that the catalogue has. */
export const lookUp = async (ids) => (await post("v1/lookup", { item_ids: ids })).items;

/** {users: [id], items: [{item_id, text}]} that begin with, or hold, what was typed. */
export const search = (text) => (text ? post("v1/find", { text, k: 8 }) : { users: [], items: [] });
