// Starts the views, and asks the gateway once a second while somebody looks.

import { get, key } from "./api.js";
import { $ } from "./dom.js";
import { duration } from "./format.js";
import { Overview, healthOf } from "./overview.js";
import { Playground } from "./playground.js";
import { Requests } from "./requests.js";

const VIEWS = ["overview", "requests", "playground"];
const EVERY_MS = 1000;
const THEMES = ["auto", "light", "dark"];

let models = [];
let answered = null;
let view = VIEWS[0];

const overview = new Overview();
const requests = new Requests();
const playground = new Playground(askKey);

// Views

function route() {
  const wanted = location.hash.slice(1);
  view = VIEWS.includes(wanted) ? wanted : VIEWS[0];
  for (const name of VIEWS) $(`view-${name}`).hidden = name !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${view[0].toUpperCase()}${view.slice(1)} · Baton console`;
}
addEventListener("hashchange", () => { if (VIEWS.includes(location.hash.slice(1))) route(); });

// Theme

function theme(value) {
  if (value === "auto") { delete document.documentElement.dataset.theme; localStorage.removeItem("baton-theme"); }
  else { document.documentElement.dataset.theme = value; localStorage.setItem("baton-theme", value); }
  $("theme").textContent = `Theme: ${value}`;
}
const themeNow = () => document.documentElement.dataset.theme ?? "auto";
$("theme").addEventListener("click", () => theme(THEMES[(THEMES.indexOf(themeNow()) + 1) % THEMES.length]));

// API key

function askKey(why) {
  $("key").hidden = false;
  if ($("key-dialog").open) return;
  $("key-why").textContent = why;
  $("key-input").value = "";
  $("key-dialog").showModal();
}
$("key").addEventListener("click", () => askKey(key.get() ? "A key is in use. Another one replaces it." : "This gateway asks for an API key."));
$("key-cancel").addEventListener("click", () => $("key-dialog").close());
$("key-forget").addEventListener("click", () => { key.forget(); $("key-dialog").close(); });
$("key-form").addEventListener("submit", () => { key.set($("key-input").value.trim()); declined = false; });
let declined = false;
$("key-dialog").addEventListener("close", () => { declined = !key.get(); turn(); });

// What the gateway tells

function pill(state, text) {
  $("health").className = `pill ${state}`;
  $("health").title = text;
  if ($("health").lastElementChild.textContent !== text) $("health").lastElementChild.textContent = text;
}

function note(id, text) {
  $(id).hidden = !text;
  $(id).textContent = text ?? "";
}

async function look() {
  if (!models.length) await learnModels();
  try {
    const status = await get("v1/status");
    answered = Date.now();
    overview.update(status);
    pill(...healthOf(status));
    note("forbidden", null);
  } catch (error) {
    if (error.status !== 403) throw error;
    $("key").hidden = false;
    answered = Date.now();
    note("forbidden", "This key may not see instances and load: that takes the key of an admin. Your own requests and the playground are at hand.");
    pill("", "Connected");
  }
  if (view === "requests") await requests.refresh();
  note("notice", null);
}

async function learnModels() {
  models = (await get("v1/models")).data;
  $("model").textContent = $("model").title = [...new Set(models.map((model) => model.root))].join(", ");
  playground.offer(models.map((model) => model.id));
}

function failed(error) {
  if (error.status === 401) {
    pill("warn", "API key needed");
    note("notice", null);
    $("key").hidden = false;
    if (!declined) askKey(key.get() ? `The key was refused: ${error.message}` : "This gateway asks for an API key.");
    return;
  }
  pill("bad", error.status ? "Error" : "No connection");
  const age = answered === null ? "" : ` What is shown is ${duration((Date.now() - answered) / 1000)} old.`;
  note("notice", `${error.message}${age} Trying again…`);
}

let timer = 0, turning = false;
async function turn() {
  if (turning) return;
  turning = true;
  clearTimeout(timer);
  if (!document.hidden && !(declined && !key.get())) {
    try { await look(); } catch (error) { if (error.status === undefined) throw error; failed(error); } finally { turning = false; }
  }
  turning = false;
  timer = setTimeout(turn, EVERY_MS);
}
document.addEventListener("visibilitychange", turn);
addEventListener("hashchange", turn);

theme(themeNow());
route();
turn();
