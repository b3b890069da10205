// Compare: two answers that were kept, of one bundle or of two, side by side.

import * as api from "./api.js";
import { difference, itemsOf, sideBySide, summary } from "./answer.js";
import { learn, lookUp, nameOf } from "./names.js";
import { el, find, percent, plural, say, short, table, trouble } from "./page.js";

const kept = []; // {name, request, answer, texts}
const FORM = "tiglon answer 1"; // of a saved file

export function start() {
  for (const side of ["a", "b"]) {
    find(`#compare-${side}`).addEventListener("change", draw);
    find(`#again-${side}`).addEventListener("click", () => again(side));
    find(`#save-${side}`).addEventListener("click", () => save(chosen(side)));
  }
  find("#open-answer").addEventListener("change", openFile);
}

/** Take an answer, with the request that led to it. */
export function keep(answer, request, person) {
  const who = person?.user_id != null ? `user ${api.typed(person.user_id)}` : "a history";
  const texts = [...new Map(itemsOf(answer).map((id) => [api.same(id), { item_id: id, text: nameOf(id) }])).values()];
  add({ name: `${kept.length + 1}. ${who}${request.history && request.user_id !== undefined ? ", changed" : ""}`, request, answer, texts });
}

function add(entry) {
  kept.push(entry);
  const last = kept.length - 1;
  for (const side of ["a", "b"]) {
    const select = find(`#compare-${side}`);
    const value = select.value;
    select.replaceChildren(...kept.map((each, at) => el("option", { value: at }, `${each.name} · bundle ${each.answer.bundle || "unsaved"}`)));
    select.value = side === "b" ? last : value === "" ? Math.max(0, last - 1) : value;
  }
  draw();
}

const chosen = (side) => kept[Number(find(`#compare-${side}`).value)];

function draw() {
  find("#no-answers").hidden = kept.length > 0;
  find("#compared").hidden = !kept.length;
  if (!kept.length) return;
  const [a, b] = [chosen("a"), chosen("b")];
  const changes = difference(a.answer, b.answer);
  const both = changes.right.filter((row) => row.was !== null);
  const size = Math.max(a.answer.items.length, b.answer.items.length, 1);
  const moves = both.map((row) => Math.abs(row.was - row.is));
  find("#compare-table").replaceChildren(
    table(
      "How the two answers differ",
      ["", "A", "B"],
      [
        ["bundle", a.answer.bundle || "unsaved", b.answer.bundle || "unsaved"],
        ["length", plural(a.answer.items.length, "item"), plural(b.answer.items.length, "item")],
        ["placed by", sources(a.answer), sources(b.answer)],
        ["left out or stood in", a.answer.degraded.join(", ") || "nothing", b.answer.degraded.join(", ") || "nothing"],
      ],
    ),
  );
  find("#compare-sum").textContent = both.length
    ? `${summary(changes)} · ${percent(both.length / size)} in both · mean move ${short(moves.reduce((x, y) => x + y, 0) / both.length)} places`
    : "No item is in both";
  find("#compare-lists").replaceChildren(sideBySide(a.answer, b.answer, [`A: ${a.name}`, `B: ${b.name}`]));
}

function sources(answer) {
  const counts = new Map();
  for (const { source } of answer.items) counts.set(source, (counts.get(source) ?? 0) + 1);
  return [...counts].map(([name, n]) => `${name} ${n}`).join(", ") || "nobody";
}

/** Ask what this answer was asked, of the bundle that serves now. */
async function again(side) {
  find("#compare-trouble").replaceChildren();
  try {
    const { request, name } = chosen(side);
    const answer = await api.recommend(request);
    await lookUp(itemsOf(answer));
    const texts = itemsOf(answer).map((id) => ({ item_id: id, text: nameOf(id) }));
    add({ name: `${kept.length + 1}. ${name.replace(/^\d+\. /, "").replace(/, again$/, "")}, again`, request, answer, texts });
    say(find("#compare-sum").textContent);
  } catch (error) {
    find("#compare-trouble").replaceChildren(trouble(error));
  }
}

function save(entry) {
  const { request, answer, texts } = entry;
  const blob = new Blob([api.write({ form: FORM, request, answer, texts })], { type: "application/json" });
  const link = el("a", { href: URL.createObjectURL(blob), download: `answer-${answer.bundle || "unsaved"}-${answer.request_id}.json` });
  link.click();
  URL.revokeObjectURL(link.href);
}

async function openFile(event) {
  const [file] = event.target.files;
  if (!file) return;
  find("#compare-trouble").replaceChildren();
  try {
    const saved = api.read(await file.text());
    if (saved?.form !== FORM) throw new Error();
    const { request, answer, texts } = saved;
    learn(texts.filter(({ text }) => !/^item /.test(text)));
    add({ name: `${kept.length + 1}. ${file.name}`, request, answer, texts });
    say(find("#compare-sum").textContent);
  } catch {
    find("#compare-trouble").replaceChildren(trouble(new Error(`${file.name} is no saved answer. Choose a file that Save wrote here.`)));
  } finally {
    event.target.value = "";
  }
}
