// One request's waterfall: a table, so that it can be read without seeing it.

import { h } from "./dom.js";
import { bytes, clockTime, count, percent, plural, seconds } from "./format.js";
import { rowsOf } from "./spans.js";

const WHO = { gateway: "Gateway", network: "Network", prefill: "Prefill", transfer: "Transfer", decode: "Decode" };
const MOST_TICKS = 120;

/** Return the elements that tell all of a trace. */
export function detailOf(trace) {
  const total = Math.max(trace.e2e_s, 1e-9);
  return [
    h("div", { class: "head" },
      h("h3", { class: "id" }, trace.request_id),
      outcome(trace),
      trace.ended_at ? h("span", { class: "sub" }, `ended ${clockTime(trace.ended_at)}`) : null),
    h("dl", { class: "facts" }, facts(trace).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Waterfall" },
      h("table", { class: "waterfall" },
        h("caption", { class: "sr" }, `Where ${seconds(total)} went`),
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Span"), h("th", { scope: "col", class: "axis" }, h("span", { class: "sr" }, "Timeline"), axis(total)), h("th", { scope: "col", class: "num" }, "Time"))),
        h("tbody", {}, rowsOf(trace).map((row) => line(row, total, trace.ttft_s))))),
    h("ul", { class: "who", "aria-label": "Colours" }, Object.entries(WHO).map(([who, name]) => h("li", {}, h("i", { class: `w-${who}`, "aria-hidden": "true" }), name))),
    ...handovers(trace), ...migrations(trace),
  ];
}

/** Return how it ended, as a badge; a `small` one says so without words to look at. */
export function outcome(trace, small = false) {
  const bad = Boolean(trace.error) && trace.finish !== "cancelled";
  const [mark, state] = bad ? ["✕", "bad"] : trace.finish === "cancelled" ? ["◼", "warn"] : ["✓", "good"];
  return h("span", { class: `badge ${state}` }, h("i", { "aria-hidden": "true" }, mark), h("span", { class: small ? "sr" : "" }, bad ? trace.error : trace.finish));
}

function facts(trace) {
  return [
    ...(trace.model ? [["Model", trace.model]] : []),
    ["Prompt", `${count(trace.prompt_tokens)} tokens`],
    ["Cached", trace.prompt_tokens ? percent(trace.cached_tokens / trace.prompt_tokens) : "–"],
    ["Output", `${count(trace.output_tokens)} tokens`],
    ["TTFT", trace.ttft_s ? seconds(trace.ttft_s) : "–"],
    ["TPOT", trace.tpot_s ? seconds(trace.tpot_s) : "–"],
    ["Total", seconds(trace.e2e_s)],
    ["Decode", trace.decode_instance],
    ...(trace.tenant ? [["Tenant", trace.tenant]] : []),
  ];
}

function axis(total) {
  return h("span", { class: "scale", "aria-hidden": "true" }, [0, 0.25, 0.5, 0.75, 1].map((share) => h("span", {}, seconds(total * share))));
}

function line(row, total, ttft) {
  const at = (value) => `${((100 * value) / total).toFixed(3)}%`;
  const step = Math.ceil((row.ticks?.length ?? 0) / MOST_TICKS);
  const ticks = (row.ticks ?? []).filter((_, i) => i % step === 0);
  return h("tr", {},
    h("th", { scope: "row" }, row.name, h("small", {}, row.note ? `${WHO[row.who]} · ${row.note}` : WHO[row.who])),
    h("td", { class: "track" }, h("div", { class: "lane" },
      ttft ? h("i", { class: "first", style: { left: at(ttft) } }) : null,
      (row.parts ?? [row]).map((bar) => h("i", { class: `span w-${row.who}${row.overlaps ? " overlaps" : ""}${row.parts ? " part" : ""}`, title: bar.title ?? "", style: { left: at(bar.start), width: at(bar.length) } },
        ticks.map((t) => h("i", { class: "token", style: { left: `${((100 * t) / row.length).toFixed(2)}%` } })))))),
    h("td", { class: "num" }, seconds(row.length)));
}

function handovers(trace) {
  if (!trace.handovers.length) return [h("p", { class: "sub" }, trace.local_prefill ? "No handover: the decode instance computed the prompt itself." : "No handover.")];
  const texts = trace.handovers.map((x) => {
    const moved = x.transport ? `${bytes(x.bytes)} in ${plural(x.blocks - x.blocks_saved, "block")} of ${plural(x.chunks, "chunk")} by ${x.transport}, ${seconds(x.transfer_s)} reading, ${percent(x.overlapped)} of it hidden` : "nothing read";
    const saved = x.blocks_saved ? `; ${plural(x.blocks_saved, "block")} already in decode’s cache` : "";
    const ranks = (x.ranks ?? []).length > 1 ? `; ${x.ranks.map((r) => `rank ${r.rank} ${bytes(r.bytes)} in ${seconds(r.end_s - r.begin_s)}`).join(", ")}` : "";
    return h("li", {}, h("b", {}, `Attempt ${x.attempt} · ${x.prefill_instance} · ${x.outcome}`), ` — ${moved}${saved}${ranks}.`);
  });
  return [h("h4", {}, "Handover"), h("ul", { class: "notes" }, texts)];
}

function migrations(trace) {
  if (!trace.migrations.length) return [];
  const texts = trace.migrations.map((x) => h("li", {}, h("b", {}, `Left ${x.instance} · ${x.error}`),
    ` — after ${plural(x.output_tokens, "token")}; went on ${seconds(x.wait_s)} later, with ${plural(x.cached_tokens, "token")} not computed again.`));
  return [h("h4", {}, "Migrations"), h("ul", { class: "notes" }, texts)];
}
