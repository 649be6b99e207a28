// The first view: load in numbers, KV over time, and every instance as it is.

import { Chart } from "./chart.js";
import { $, h, show } from "./dom.js";
import { NONE, count, duration, percent, rate, seconds } from "./format.js";

const TITLES = { prefill: "Prefill pool", decode: "Decode pool", mixed: "Mixed pool" };
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
    const instances = status.pools.flatMap((pool) => pool.instances);
    const steps = Object.fromEntries(instances.filter((i) => i.up).map((i) => [i.incarnation, i.steps]));
    const now = [status.clock_s ?? performance.now() / 1000, status.requests.prompt_tokens, status.requests.output_tokens, steps];
    if (this.history.length && now[0] < this.history.at(-1)[0]) this.history = []; // the gateway was restarted
    this.history.push(now);
    while (this.history.length > 2 && this.history[1][0] <= now[0] - RATE_OVER_S) this.history.shift();
    const then = this.history[0];
    const over = now[0] - then[0];
    const rates = over > 0 ? { prompt: (now[1] - then[1]) / over, output: (now[2] - then[2]) / over } : null;
    const stepRate = (id) => (over > 0 && id in steps && id in then[3] ? Math.max(0, steps[id] - then[3][id]) / over : null);
    const shares = instances.filter((i) => i.blocks_total).map((i) => [i.instance_id, share(i)]);
    this.kv.add(now[0], Object.fromEntries(shares));
    if (rates) this.rate.add(now[0], rates);
    this.tiles(status, rates);
    this.pools(status.pools, stepRate);
    $("about").textContent = `Baton ${status.version}${status.uptime_s ? `, up ${duration(status.uptime_s)}` : ""}. `;
  }

  tiles(status, rates) {
    const r = status?.requests, lately = status?.last_minute;
    const told = (value, text) => (value === undefined ? "" : text(value));
    const rows = [
      ["Open requests", r ? count(r.open) : NONE, r?.waiting ? `${count(r.waiting)} wait for an instance` : told(r?.limit, (limit) => `of ${count(limit)} allowed`)],
      ["Output tokens/s", rates ? rate(rates.output) : NONE, told(r?.output_tokens, (n) => `${count(n)} in all`)],
      ["Prompt tokens/s", rates ? rate(rates.prompt) : NONE, told(r?.prompt_tokens, (n) => `${count(n)} in all`)],
      ["TTFT p90", seconds(lately?.ttft_s.p90), "last minute"],
      ["TPOT p90", seconds(lately?.tpot_s.p90), "last minute"],
      ["Refused", r?.refused === undefined ? NONE : count(r.refused), told(r?.admitted, (n) => `${count(n)} admitted`)],
    ];
    show($("tiles"), rows.map(([name, value, sub]) => h("div", { class: "card tile" },
      h("dt", {}, name), h("dd", {}, h("b", {}, value), h("span", { class: "sub" }, sub || "\u00a0")))));
  }

  pools(told, stepRate) {
    const several = new Set(told.map((pool) => pool.model)).size > 1;
    const titleOf = (pool) => TITLES[pool.role] + (several ? ` of ${pool.model}` : "");
    const pools = told.map((pool) => [titleOf(pool), sorted(pool.instances), pool.size]);
    if (!pools.length) {
      show($("pools"), h("p", { class: "card empty" }, h("b", {}, "No instances."), " Those that start are listed here as soon as they are ready."));
      return;
    }
    show($("pools"), pools.map(([title, rows, size]) => h("section", { class: "pool", style: { "flex-grow": rows.length } },
      h("h3", {}, title, h("span", { class: "sub" }, poolText(rows, size))),
      h("ul", {}, rows.map((row) => card(row, stepRate(row.incarnation)))))));
  }
}

const sorted = (rows) => [...rows].sort((a, b) => a.instance_id.localeCompare(b.instance_id, "en", { numeric: true }));

function poolText(rows, size) {
  const ready = rows.filter((row) => isReady(row)).length;
  const unseen = size - rows.length;
  return `${ready} of ${rows.length} ready${unseen ? `, ${count(unseen)} not shown` : ""}`;
}

const share = (i) => i.blocks_used / i.blocks_total;
const isReady = (i) => (i.usable ?? i.up) && !i.draining;

/** Return class, mark and word of how an instance is. */
function stateOf(i) {
  if (i.draining) return ["warn", "◐", "Draining"];
  if (isReady(i)) return i.problems?.length ? ["warn", "!", "Ready, with problems"] : ["good", "✓", "Ready"];
  return i.up ? ["warn", "…", "Connecting"] : ["bad", "✕", "No answer"];
}

function card(i, steps) {
  const [state, mark, word] = stateOf(i);
  const used = i.blocks_total ? share(i) : null;
  const facts = [
    ["Running", i.up ? `${count(i.running)} of ${count(i.max_sequences)}` : NONE],
    ["Queue", i.up ? `${count(i.waiting)}${i.waiting ? `, ${seconds(i.waited_s)}` : ""}` : NONE],
    ["Steps/s", steps === null ? NONE : rate(steps)],
    ["Lease", i.standing ?? NONE],
    ["Our requests", i.our_requests === null ? NONE : count(i.our_requests)],
    ["Ranks", i.ranks === undefined ? NONE : count(i.ranks)],
  ];
  return h("li", { class: `card instance ${state}` },
    h("div", { class: "head" }, h("h4", {}, i.instance_id), h("span", { class: `badge ${state}` }, h("i", { "aria-hidden": "true" }, mark), word)),
    h("div", { class: "kv" },
      h("span", {}, "KV"),
      h("span", { class: "meter", role: "meter", "aria-label": `KV in use on ${i.instance_id}`, "aria-valuemin": 0, "aria-valuemax": 100, "aria-valuenow": used === null ? 0 : Math.round(used * 100) },
        h("i", { class: used > 0.9 ? "full" : "", style: { width: `${100 * (used ?? 0)}%` } })),
      h("b", {}, used === null ? NONE : percent(used))),
    h("p", { class: "sub" }, i.blocks_total ? `${count(i.blocks_used)} of ${count(i.blocks_total)} blocks, ${count(i.kv_tokens)} tokens` : `${count(i.kv_tokens)} tokens`),
    h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
    ...(i.problems ?? []).map((text) => h("p", { class: "problem" }, text)));
}

/** Return what the pill in the header says of a status. */
export function healthOf(status) {
  if (!status.problems.length) return ["good", "Healthy"];
  const some = status.models.some((model) => !model.problems.length);
  return [some ? "warn" : "bad", status.problems.join("; ")];
}
