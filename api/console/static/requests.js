// The last requests, and the waterfall of the one that is chosen.

import { get } from "./api.js";
import { $, h, show } from "./dom.js";
import { clockTime, count, seconds } from "./format.js";
import { sharesOf } from "./spans.js";
import { detailOf, outcome } from "./waterfall.js";

const ORDER = ["gateway", "network", "prefill", "transfer", "decode"];

export class Requests {
  constructor() {
    this.chosen = null;
    this.data = null;
    this.detail(null);
    $("rows").addEventListener("keydown", (event) => this.step(event));
  }

  async refresh() {
    if (!$("live").checked && this.data) return;
    this.data = (await get("v1/requests?limit=50")).data;
    this.list();
    if (!this.chosen && this.data.length) await this.choose(this.data[0].request_id);
  }

  list() {
    if (!this.data.length) {
      show($("rows"), h("p", { class: "empty" }, h("b", {}, "No requests have ended yet."), " Send one from the ", h("a", { href: "#playground" }, "playground"), "."));
      return;
    }
    const longest = Math.max(...this.data.map((trace) => trace.e2e_s));
    show($("rows"), h("table", { class: "requests" },
      h("caption", { class: "sr" }, "Requests that ended last, newest first"),
      h("thead", {}, h("tr", {}, ["Ended", "Request", "Tokens", "TTFT", "Total"].map((name, i) => h("th", { scope: "col", class: i > 1 ? "num" : "" }, name)))),
      h("tbody", {}, this.data.map((trace) => this.row(trace, longest)))));
  }

  row(trace, longest) {
    const id = trace.request_id, shares = sharesOf(trace);
    const choose = () => this.choose(id);
    return h("tr", { class: id === this.chosen ? "chosen" : "", onclick: choose },
      h("td", { class: "when" }, clockTime(trace.ended_at)),
      h("td", {},
        h("div", { class: "name" }, h("button", { type: "button", class: "link", "data-focus": id, "aria-pressed": String(id === this.chosen), "aria-label": `Request ${id}` }, shortened(id)), outcome(trace, true)),
        h("div", { class: "mini", "aria-hidden": "true" }, ORDER.filter((who) => shares[who]).map((who) =>
          h("i", { class: `w-${who}`, style: { width: `${((100 * shares[who]) / longest).toFixed(2)}%` } })))),
      h("td", { class: "num" }, `${count(trace.prompt_tokens)} → ${count(trace.output_tokens)}`),
      h("td", { class: "num" }, trace.ttft_s ? seconds(trace.ttft_s) : "–"),
      h("td", { class: "num" }, seconds(trace.e2e_s)));
  }

  /** Arrow keys go from request to request. */
  step(event) {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    const buttons = [...$("rows").querySelectorAll("button")];
    const next = buttons[buttons.indexOf(document.activeElement) + by];
    if (!next) return;
    event.preventDefault();
    next.focus();
    this.choose(next.dataset.focus);
  }

  async choose(id) {
    this.chosen = id;
    this.list();
    const row = this.data.find((trace) => trace.request_id === id);
    try {
      this.detail({ ...row, ...(await get(`v1/requests/${encodeURIComponent(id)}`)) });
    } catch (error) {
      if (this.chosen === id) show($("detail"), h("p", { class: "empty" }, error.message));
    }
  }

  detail(trace) {
    if (!trace) show($("detail"), h("p", { class: "empty" }, "Choose a request to see where its time went."));
    else if (trace.request_id === this.chosen) show($("detail"), ...detailOf(trace));
  }
}

const shortened = (id) => (id.length > 24 ? `${id.slice(0, 13)}…${id.slice(-6)}` : id);
