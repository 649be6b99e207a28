// From a trace to the rows of its waterfall. Pure: no page, no clock.

import { bytes, plural, seconds } from "./format.js";

/** Spans of the time to first token in order, as the gateway names them: who, and what it is. */
const SPANS = {
  wake: ["gateway", "Wait for an instance"],
  tokenize: ["gateway", "Check and tokenise"],
  gateway_queue: ["gateway", "Gateway queue"],
  lost: ["gateway", "Lost instances"],
  gateway_network: ["network", "Gateway ↔ decode"],
  decide: ["decode", "Decide where to prefill"],
  failed_handovers: ["prefill", "Failed handovers"],
  handshake: ["network", "Handshake"],
  prefill_network: ["network", "Decode ↔ prefill"],
  prefill_queue: ["prefill", "Prefill queue"],
  prefill_compute: ["prefill", "Prefill compute"],
  prefill_offer: ["prefill", "Digest last blocks"],
  room: ["decode", "Wait for KV room"],
  connect: ["transfer", "Transport connect"],
  transfer: ["transfer", "KV reads, exposed"],
  local_queue: ["decode", "Decode queue"],
  local_compute: ["decode", "Prefill on decode"],
  admit: ["decode", "Admit to batch"],
  outbox: ["decode", "Outbox"],
};

/** Return rows {who, name, start, length, note, ticks, parts} in seconds from the request's arrival.

A row with parts [{start, length, title}] is drawn as these; else it is one bar. */
export function rowsOf(trace) {
  const landed = trace.handovers.find((handover) => handover.outcome === "ok");
  const told = Object.entries(trace.ttft_spans ?? {}).filter(([, length]) => length > 0);
  const spans = told.length ? told.map(([name, length]) => [...(SPANS[name] ?? ["network", name]), length]) : roughly(trace, landed);
  const rows = [];
  let at = 0;
  for (const [who, name, length] of spans) {
    rows.push({ who, name, start: at, length, note: noteOf(name, trace, landed) });
    at += length;
  }
  const compute = rows.find((row) => row.name === "Prefill compute");
  if (compute && landed) {
    compute.parts = chunks(landed, compute);
    const offered = rows.findLast((row) => row.name === "Digest last blocks" || row.name === "Prefill compute");
    rows.splice(rows.findLastIndex((row) => row.who === "prefill") + 1, 0, ...reads(landed, compute, offered.start + offered.length));
  }
  if (trace.output_tokens > 0 && trace.e2e_s > trace.ttft_s) rows.push(decode(trace));
  return rows;
}

/** Of a trace without spans: what its handover tells, and one row for all that it does not. */
function roughly(trace, landed) {
  if (!trace.ttft_s) return [["gateway", "No token came", trace.e2e_s]];
  const after = landed ? [
    ["prefill", "Prefill queue", landed.queue_s],
    ["prefill", "Prefill compute", landed.compute_s],
    ["decode", "Wait for KV room", landed.allocation_wait_s],
    ["transfer", "KV reads, exposed", landed.exposed_s],
  ] : [];
  const left = Math.max(0, trace.ttft_s - after.reduce((sum, [, , length]) => sum + length, 0));
  // Prefill queues while its answer to the handshake is on its way: of that counts what is left.
  const handshake = Math.min(landed?.handshake_s ?? 0, left);
  const rest = trace.local_prefill ? "Prefill on decode, queues, network" : "Gateway, network, other";
  return [["network", rest, left - handshake], ["network", "Handshake", handshake], ...after].filter(([, , length]) => length > 0);
}

/** The chunks of a prompt, as prefill computed them; none if it did not tell of all. */
function chunks(landed, compute) {
  const ends = landed.chunk_s ?? [];
  if (ends.length < 2 || ends.length < landed.chunks) return null;
  return ends.map((end, i) => part(compute.start + (ends[i - 1] ?? 0), end - (ends[i - 1] ?? 0), `Chunk ${i + 1}`));
}

/** A row for each group of layers, with the reads of all chunks; the last offer came at `offered`. */
function reads(landed, compute, offered) {
  const groups = new Map();
  for (const offer of landed.offers ?? []) {
    if (!offer.done_s) continue;
    const one = offer.layer_end === offer.layer_start + 1;
    const name = one ? `Layer ${offer.layer_end}` : `Layers ${offer.layer_start + 1}–${offer.layer_end}`;
    if (!groups.has(name)) groups.set(name, []);
    groups.get(name).push(offer);
  }
  if (!groups.size) return landed.transfer_s > landed.exposed_s ? [hidden(landed, compute)] : [];
  const opened = offered - landed.offered_s;
  return [...groups].map(([name, offers]) => {
    const parts = offers.map((x) => part(Math.max(0, opened + x.read_s), x.done_s - x.read_s,
      `Blocks ${x.first_block}–${x.first_block + x.blocks - 1}, ${bytes(x.bytes)}`));
    const length = parts.reduce((sum, x) => sum + x.length, 0);
    const note = `${plural(offers.length, "read")}, ${bytes(offers.reduce((sum, x) => sum + x.bytes, 0))}`;
    return { who: "transfer", name, start: parts[0].start, length, parts, overlaps: true, note };
  });
}

const part = (start, length, what) => ({ start, length, title: `${what}, ${seconds(length)}` });

/** Reads that went on while prefill still computed: they end where the exposed ones begin. */
function hidden(landed, compute) {
  const end = compute.start + compute.length;
  const length = Math.min(landed.transfer_s - landed.exposed_s, end);
  return { who: "transfer", name: "KV reads, hidden", start: end - length, length, overlaps: true, note: "while prefill computed" };
}

function decode(trace) {
  const ticks = [];
  let at = 0;
  for (const gap of trace.itl_s ?? []) ticks.push((at += gap));
  const tokens = Math.max(0, trace.output_tokens - 1);
  return { who: "decode", name: "Decode", start: trace.ttft_s, length: trace.e2e_s - trace.ttft_s, ticks, note: `${tokens} token${tokens === 1 ? "" : "s"} after the first` };
}

function noteOf(name, trace, landed) {
  if (name === "Prefill compute" && landed) return `${landed.chunks} chunk${landed.chunks === 1 ? "" : "s"} on ${landed.prefill_instance}`;
  if (name === "Prefill on decode") return `on ${trace.decode_instance}`;
  if (name === "Failed handovers") return trace.handovers.filter((x) => x.outcome !== "ok").map((x) => `${x.prefill_instance}: ${x.outcome}`).join(", ");
  return "";
}

/** Return the shares of a request's whole time: {who: seconds}, for a small bar. */
export function sharesOf(trace) {
  const shares = {};
  for (const row of rowsOf({ ...trace, itl_s: [] })) if (!row.overlaps) shares[row.who] = (shares[row.who] ?? 0) + row.length;
  return shares;
}
