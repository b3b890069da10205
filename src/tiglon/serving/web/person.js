// Recommend: find somebody, see the life, the answer with its reasons, and what an event more or less changes.

import * as api from "./api.js";
import { difference, itemsOf, list, provenance, sideBySide, summary } from "./answer.js";
import { keep } from "./compare.js";
import { idsAreTexts, kindsOf, learn, lookUp, nameOf } from "./names.js";
import { clock, el, find, plural, say, trouble, when } from "./page.js";
import { timeLine } from "./life.js";

const ROWS = 50; // of the table of behaviours; more on request

// person: {user_id or null, events}. removed: Set of places in events. added: item ids.
// before, after: answers; after is null until something is tried or stored.
const now = { person: null, removed: new Set(), added: [], before: null, after: null, titles: ["", ""], column: null, line: null, rows: ROWS };
let turn = 0; // answers that come too late for their question are dropped

/** Who is looked at: a request's user_id or history, for the other views. */
export const lookedAt = () => (now.person?.user_id != null ? api.typed(now.person.user_id) : "");

export function start() {
  const form = find("#who");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    look();
  });
  form.addEventListener("change", (event) => event.target.name === "kind" && kind());
  find("#who-text").addEventListener("input", debounced(suggest));
  find("#event-item").addEventListener("input", debounced(suggestItems));
  find("#try-event").addEventListener("submit", (event) => {
    event.preventDefault();
    const item = typedItem();
    if (item === null) return;
    if (event.submitter?.value === "store") storeEvent(item);
    else attempt(item);
  });
  find("#undo").addEventListener("click", reset);
  find("#keep").addEventListener("click", () => {
    const answer = now.after ?? now.before;
    keep(answer, request(now.after && !now.stored ? edited() : null), now.person);
    say("Kept for comparison");
  });
  find("#column").addEventListener("change", (event) => {
    now.column = event.target.value;
    drawLife();
  });
  kind();
  suggest();
}

// -- who ---------------------------------------------------------------------------------------------------

const isHistory = () => find("#who").elements.kind.value === "history";

function kind() {
  find("#who-label").textContent = isHistory() ? "Item ids, oldest first" : "User id";
  find("#who-text").placeholder = isHistory() ? "201704, 397896" : "";
  find("#who-text").setAttribute("list", isHistory() ? "" : "users");
}

async function suggest() {
  if (isHistory()) return;
  try {
    const { users } = await api.search(find("#who-text").value.trim());
    find("#users").replaceChildren(...users.map((user) => el("option", { value: api.typed(user) })));
    if (!find("#who-text").value && users.length) find("#who-text").placeholder = `such as ${users.slice(0, 3).map(api.typed).join(", ")}`;
  } catch {} // suggestions are no more than that
}

async function suggestItems() {
  try {
    const { items } = await api.search(find("#event-item").value.trim());
    learn(items);
    find("#items").replaceChildren(...items.map((item) => el("option", { value: api.typed(item.item_id) }, item.text)));
  } catch {}
}

function debounced(work, wait = 150) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(work, wait);
  };
}

/** An item's id as typed. Where all ids of items are texts, digits are one, too. */
function itemId(text) {
  const found = api.id(text);
  return typeof found !== "string" && idsAreTexts() ? text.trim() : found;
}

function typedItem() {
  const field = find("#event-item");
  if (!field.value.trim()) {
    field.focus();
    return null;
  }
  const item = itemId(field.value);
  field.value = "";
  return item;
}

async function look() {
  const mine = ++turn;
  const text = find("#who-text").value.trim();
  if (!text && !isHistory()) return find("#who-text").focus();
  busy(true);
  find("#who-trouble").replaceChildren();
  try {
    const person = isHistory() ? typedHistory(text) : await api.user(text);
    if (mine !== turn) return;
    Object.assign(now, { person, removed: new Set(), added: [], before: null, after: null, column: null, rows: ROWS, stored: false });
    const answer = await api.recommend(request());
    await lookUp([...person.events.map((event) => event.item_id), ...itemsOf(answer)]);
    if (mine !== turn) return;
    now.before = answer;
    draw();
    const who = person.user_id === null ? "this history" : `user ${api.typed(person.user_id)}`;
    say(`${plural(answer.items.length, "recommendation")} for ${who}`);
  } catch (error) {
    if (mine === turn) find("#who-trouble").replaceChildren(trouble(error));
  } finally {
    if (mine === turn) busy(false);
  }
}

function typedHistory(text) {
  const ids = text.split(/[,;\s]+/).filter(Boolean).map(itemId);
  return { user_id: null, known: true, events: ids.map((item_id, at) => ({ item_id, timestamp: at + 1 })) };
}

// -- asking ------------------------------------------------------------------------------------------------

/** A request with the form's settings. history: in place of the stored life. */
function request(history = null) {
  const form = find("#who").elements;
  const asked = { k: Number(form.k.value) || 10, explain: true };
  if (form.seen.value) asked.exclude_seen = form.seen.value === "hide";
  if (form.budget.value) asked.budget_ms = Number(form.budget.value);
  if (form.deny.value.trim()) asked.deny = form.deny.value.split(/[,;\s]+/).filter(Boolean).map(itemId);
  const caps = form.caps.value.split(/[,;]+/).map((cap) => cap.split("=")).filter((cap) => cap.length === 2);
  if (caps.length) asked.at_most = Object.fromEntries(caps.map(([column, n]) => [column.trim(), Number(n)]));
  if (now.person.user_id !== null) asked.user_id = now.person.user_id;
  if (history !== null) asked.history = history;
  else if (now.person.user_id === null) asked.history = now.person.events.map((event) => event.item_id);
  return asked;
}

const edited = () => [...now.person.events.filter((_, at) => !now.removed.has(at)).map((event) => event.item_id), ...now.added];

/** Ask with the edited history beside the whole one, so that the edit alone can make a difference. */
async function reconsider() {
  const mine = ++turn;
  if (!now.removed.size && !now.added.length) return reset();
  busy(true);
  find("#who-trouble").replaceChildren();
  try {
    const whole = now.person.events.map((event) => event.item_id);
    const [before, after] = await Promise.all([api.recommend(request(whole)), api.recommend(request(edited()))]);
    await lookUp([...itemsOf(before), ...itemsOf(after), ...now.added]);
    if (mine !== turn) return;
    Object.assign(now, { before, after, titles: ["As it is", "With your change"], stored: false });
    draw();
    say(summary(difference(before, after)));
  } catch (error) {
    if (mine === turn) find("#who-trouble").replaceChildren(trouble(error));
  } finally {
    if (mine === turn) busy(false);
  }
}

function attempt(item) {
  now.added.push(item);
  return reconsider();
}

function without(at) {
  if (!now.removed.delete(at)) now.removed.add(at);
  return reconsider();
}

async function reset() {
  Object.assign(now, { removed: new Set(), added: [], after: null, stored: false });
  const mine = ++turn;
  try {
    const answer = await api.recommend(request());
    await lookUp(itemsOf(answer));
    if (mine !== turn) return;
    now.before = answer;
    draw();
    say("Your changes are undone");
  } catch (error) {
    find("#who-trouble").replaceChildren(trouble(error));
  } finally {
    if (mine === turn) busy(false);
  }
}

/** Put an event into the user's life on the server, and ask again. */
async function storeEvent(item) {
  const mine = ++turn;
  const { user_id, events } = now.person;
  busy(true);
  find("#who-trouble").replaceChildren();
  try {
    const before = await api.recommend(request());
    await api.store([{ user_id, item_id: item, timestamp: nextTime(events), event_id: `console-${crypto.randomUUID?.() ?? Date.now()}` }]);
    const [person, after] = await Promise.all([api.user(api.typed(user_id)), api.recommend(request())]);
    await lookUp([...itemsOf(before), ...itemsOf(after), item]);
    if (mine !== turn) return;
    Object.assign(now, { person, removed: new Set(), added: [], before, after, stored: true, titles: ["Before", `After ${nameOf(item)}`] });
    draw();
    say(`Stored. ${summary(difference(before, after))}`);
  } catch (error) {
    if (mine === turn) find("#who-trouble").replaceChildren(trouble(error));
  } finally {
    if (mine === turn) busy(false);
  }
}

/** A time after all of the user's: now, in the log's own unit, or one more where that is not a date. */
function nextTime(events) {
  const last = events.at(-1)?.timestamp;
  if (last === undefined) return Math.floor(Date.now() / 1000);
  const read = clock(last);
  const present = read ? Math.floor(Date.now() * (Number(last) / read(last))) : 0;
  return typeof last === "bigint" ? last + 1n : Math.max(last + 1, present);
}

// -- drawing -----------------------------------------------------------------------------------------------

function busy(yes) {
  find("#person").setAttribute("aria-busy", yes);
}

function draw() {
  find("#found").hidden = false;
  drawLife();
  drawEdits();
  drawAnswers();
}

function drawLife() {
  const { person, removed, added } = now;
  const ids = [...person.events.map((event) => event.item_id), ...added];
  const columns = kindsOf(ids);
  now.column ??= columns[0] ?? "";
  const select = find("#column");
  select.replaceChildren(
    ...columns.map((column) => el("option", { value: column, selected: column === now.column }, column.replaceAll("_", " "))),
    el("option", { value: "", selected: now.column === "" }, "first code of the ID"),
  );
  find("#life-title").textContent =
    person.user_id === null ? `A history of ${plural(person.events.length, "item")}` : `User ${api.typed(person.user_id)}, ${plural(person.events.length, "behaviour")}`;
  const place = find("#line");
  find("#store").disabled = person.user_id === null;
  if (!ids.length) {
    now.line = null;
    place.replaceChildren(el("p", { class: "note" }, "Nothing is known of this user. The answer is what such users get."));
  } else {
    now.line = timeLine(place, { events: person.events, removed, added, column: now.column, pick: drawPicked });
  }
  find("#picked").replaceChildren(person.events.length ? "Click a behaviour, or walk the line with the arrow keys." : "");
  drawTable();
}

function drawPicked(at) {
  const event = now.person.events[at];
  find("#picked").replaceChildren(
    el("span", { class: "name" }, nameOf(event.item_id)),
    el("span", { class: "id" }, ` ${api.typed(event.item_id)} · ${timeOf(event)} `),
    button(at),
  );
}

const timeOf = (event) => (now.person.user_id === null ? `behaviour ${event.timestamp}` : when(event.timestamp));

function button(at) {
  const gone = now.removed.has(at);
  const name = nameOf(now.person.events[at].item_id);
  return el("button", { type: "button", class: "quiet", "aria-label": `${gone ? "Put back" : "Leave out"} ${name}`, click: () => without(at) }, gone ? "Put back" : "Leave out");
}

function drawTable() {
  const { events } = now.person;
  const newest = events.map((_, at) => at).reverse().slice(0, now.rows);
  const body = newest.map((at) =>
    el(
      "tr",
      { class: now.removed.has(at) ? "gone" : "" },
      el("td", { class: "time" }, timeOf(events[at])),
      el("td", {}, el("span", { class: "name" }, nameOf(events[at].item_id)), el("span", { class: "id" }, ` ${api.typed(events[at].item_id)}`)),
      el("td", { class: "number" }, button(at)),
    ),
  );
  find("#events tbody").replaceChildren(...body);
  const more = find("#more");
  more.hidden = events.length <= now.rows;
  more.textContent = `Show ${Math.min(200, events.length - now.rows)} more of ${events.length}`;
  more.onclick = () => {
    now.rows += 200;
    drawTable();
  };
}

function drawEdits() {
  const chip = (words, undo) => el("li", {}, el("button", { type: "button", class: "chip", "aria-label": `Undo: ${words}`, click: undo }, `${words} ×`));
  const chips = [
    ...[...now.removed].map((at) => chip(`without ${nameOf(now.person.events[at].item_id)}`, () => without(at))),
    ...now.added.map((item, at) =>
      chip(`with ${nameOf(item)}`, () => {
        now.added.splice(at, 1);
        return reconsider();
      }),
    ),
  ];
  find("#edits").replaceChildren(...chips);
  find("#undo").hidden = !chips.length;
}

function drawAnswers() {
  const tools = { attempt, show: (attended) => now.line?.attend(attended) };
  const place = find("#answers");
  const answer = now.after ?? now.before;
  if (now.after) {
    const words = summary(difference(now.before, now.after));
    const note = now.stored ? "Stored in the user's life." : "Both lists are asked with the history in the request, so your change alone makes the difference.";
    place.replaceChildren(el("p", { class: "changes" }, el("strong", {}, words), ` ${note}`), sideBySide(now.before, now.after, now.titles, tools));
  } else {
    place.replaceChildren(list(now.before, tools));
  }
  find("#provenance").replaceChildren(provenance(answer));
}

addEventListener("resize", debounced(() => now.person && now.before && drawLife()));
