// The page as a whole: which view is open, the key, and which bundle answers.

import * as api from "./api.js";
import * as compare from "./compare.js";
import * as health from "./health.js";
import * as ids from "./ids.js";
import * as person from "./person.js";
import { find } from "./page.js";

const views = { person: {}, ids, compare: {}, health };

function route() {
  const name = location.hash.slice(1) in views ? location.hash.slice(1) : "person";
  for (const [other, view] of Object.entries(views)) {
    const open = other === name;
    if (!open && !find(`#${other}`).hidden) view.close?.();
    find(`#${other}`).hidden = !open;
    const link = find(`nav a[href="#${other}"]`);
    if (open) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  views[name].open?.();
  document.title = `${find(`nav a[href="#${name}"]`).textContent} · Tiglon`;
}

addEventListener("hashchange", () => {
  route();
  find("main > section:not([hidden]) h2").focus();
});

async function answering() {
  const place = find("#bundle");
  try {
    const ready = await api.ready();
    place.textContent = `bundle ${ready.bundle || "unsaved"}`;
    place.className = ready.trouble ? "state warn" : "state good";
    place.title = ready.trouble || `${ready.items} items, ${ready.users} users`;
  } catch (error) {
    place.textContent = error.status ? "not ready" : "no server";
    place.className = "state bad";
    place.title = error.message;
  }
}

const dialog = find("#key-dialog");
document.addEventListener("key-needed", () => dialog.open || dialog.showModal());
find("#key-button").addEventListener("click", () => dialog.showModal());
dialog.addEventListener("close", () => {
  if (dialog.returnValue !== "use") return;
  api.key.set(find("#key").value.trim());
  find("#key").value = "";
});

addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, textarea, select")) return;
  event.preventDefault();
  location.hash = "person";
  find("#who-text").focus();
});

person.start();
ids.start();
compare.start();
route();
answering();
setInterval(() => document.hidden || answering(), 10_000);
