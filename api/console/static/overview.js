// The first view: load in numbers, KV over time, and every instance as it is.

import { Chart } from "./chart.js";
import { $, h, show } from "./dom.js";
import { NONE, count, duration, percent, plural, rate, seconds } from "./format.js";

const ROLES = [["prefill", "Prefill pool"], ["decode", "Decode pool"], ["mixed", "Mixed pool"]];
const STATES = {
  ready: ["good", "✓", "Ready"], draining: ["warn", "◐", "Draining"],
  connecting: ["warn", "…", "Connecting"], silent: ["bad", "✕", "No answer"],
};
const RATE_OVER_S = 3;

export class Overview {
  constructor() {
    this.history = []; // [clock, prompt tokens, output tokens, {incarnation: steps}]
    this.kv = new Chart($("kv-chart"), { title: "KV in use", format: percent, most: 1, empty: "no instance has reported yet" });
    this.rate = new Chart($("rate-chart"), { title: "Tokens per second", format: rate, empty: "no figures yet" });
    this.tiles(null, null);
  }

  /** Show a /v1/status. */
  update(status) {
    const steps = Object.fromEntries(status.instances.filter((i) => i.report).map((i) => [i.incarnation, i.report.steps]));
    const now = [status.clock_s, status.tokens.prompt, status.tokens.output, steps];
    if (this.history.length && now[0] < this.history.at(-1)[0]) this.history = []; // the gateway was restarted
    this.history.push(now);
    while (this.history.length > 2 && this.history[1][0] <= now[0] - RATE_OVER_S) this.history.shift();
    const then = this.history[0];
    const over = now[0] - then[0];
    const rates = over > 0 ? { prompt: (now[1] - then[1]) / over, output: (now[2] - then[2]) / over } : null;
    const stepRate = (id) => (over > 0 && id in steps && id in then[3] ? Math.max(0, steps[id] - then[3][id]) / over : null);
    const shares = status.instances.filter((i) => i.report?.kv_blocks_total).map((i) => [i.id, share(i)]);
    this.kv.add(status.clock_s, Object.fromEntries(shares));
    if (rates) this.rate.add(status.clock_s, rates);
    this.tiles(status, rates);
    this.pools(status.instances, stepRate);
    $("about").textContent = `Baton ${status.version}, up ${duration(status.uptime_s)}. `;
  }

  tiles(status, rates) {
    const r = status?.requests;
    const rows = [
      ["Open requests", r ? count(r.open) : NONE, r ? (r.waiting_for_decode ? `${count(r.waiting_for_decode)} wait for an instance` : `of ${count(r.limit)} allowed`) : ""],
      ["Output tokens/s", rates ? rate(rates.output) : NONE, status ? `${count(status.tokens.output)} in all` : ""],
      ["Prompt tokens/s", rates ? rate(rates.prompt) : NONE, status ? `${count(status.tokens.prompt)} in all` : ""],
      ["TTFT p90", r ? seconds(r.ttft_p90_s) : NONE, "last minute"],
      ["TPOT p90", r ? seconds(r.tpot_p90_s) : NONE, "last minute"],
      ["Refused", r ? count(r.refused) : NONE, r ? `${count(r.admitted)} admitted` : ""],
    ];
    show($("tiles"), rows.map(([name, value, sub]) => h("div", { class: "card tile" },
      h("dt", {}, name), h("dd", {}, h("b", {}, value), h("span", { class: "sub" }, sub || "\u00a0")))));
  }

  pools(instances, stepRate) {
    const pools = ROLES.map(([role, title]) => [title, instances.filter((i) => i.role === role).sort((a, b) => a.id.localeCompare(b.id, "en", { numeric: true }))]).filter(([, rows]) => rows.length);
    if (!pools.length) {
      show($("pools"), h("p", { class: "card empty" }, h("b", {}, "No instances."), " Those that start are listed here as soon as they are ready."));
      return;
    }
    show($("pools"), pools.map(([title, rows]) => h("section", { class: "pool", style: { "flex-grow": rows.length } },
      h("h3", {}, title, h("span", { class: "sub" }, poolText(rows))),
      h("ul", {}, rows.map((row) => card(row, stepRate(row.incarnation)))))));
  }
}

function poolText(rows) {
  const ready = rows.filter((row) => row.state === "ready").length;
  return `${ready} of ${rows.length} ready, ${plural(rows.reduce((sum, row) => sum + row.ranks, 0), "rank")}`;
}

const share = (i) => i.report.kv_blocks_used / i.report.kv_blocks_total;

function card(i, steps) {
  const [state, mark, word] = STATES[i.state] ?? ["warn", "?", i.state];
  const r = i.report;
  const used = r?.kv_blocks_total ? share(i) : null;
  const facts = [
    ["Running", r ? `${count(r.running)} of ${count(i.max_sequences)}` : NONE],
    ["Queue", r ? `${count(r.waiting)}${r.waiting ? `, ${seconds(r.waited_s)}` : ""}` : NONE],
    ["Steps/s", steps === null ? NONE : rate(steps)],
    ["Lease", r ? r.lease : NONE],
    ["Open here", count(i.gateway.requests)],
    ["Ranks", count(i.ranks)],
  ];
  return h("li", { class: `card instance ${state}` },
    h("div", { class: "head" }, h("h4", {}, i.id), h("span", { class: `badge ${state}` }, h("i", { "aria-hidden": "true" }, mark), word)),
    h("div", { class: "kv" },
      h("span", {}, "KV"),
      h("span", { class: "meter", role: "meter", "aria-label": `KV in use on ${i.id}`, "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": used === null ? 0 : Math.round(used * 100) },
        h("i", { class: used > 0.9 ? "full" : "", style: { width: `${100 * (used ?? 0)}%` } })),
      h("b", {}, used === null ? NONE : percent(used))),
    h("p", { class: "sub" }, r?.kv_blocks_total ? `${count(r.kv_blocks_used)} of ${count(r.kv_blocks_total)} blocks, ${count(i.kv_tokens)} tokens` : `${count(i.kv_tokens)} tokens`),
    h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
    ...(r?.problems ?? []).map((text) => h("p", { class: "problem" }, text)));
}

/** Return what the pill in the header says of a status. */
export function healthOf(status) {
  return status.reasons.length ? ["bad", status.reasons.join("; ")] : ["good", "Healthy"];
}
