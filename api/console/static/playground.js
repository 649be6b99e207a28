// Sends one completion or chat, shows its text while it comes, and then where its time went.

import { ApiError, get, stream } from "./api.js";
import { $, h, show } from "./dom.js";
import { plural, seconds } from "./format.js";
import { detailOf } from "./waterfall.js";

const TRIES = 80;
const PAUSE_MS = 250;

export class Playground {
  /** `onDenied` hears that a key is needed. */
  constructor(onDenied) {
    Object.assign(this, { onDenied, running: null });
    $("play").addEventListener("submit", (event) => { event.preventDefault(); this.send(); });
    $("stop").addEventListener("click", () => this.running?.abort());
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); $("play").requestSubmit(); }
    });
  }

  /** Let one of these models be chosen. */
  offer(names) {
    show($("play-model"), names.map((name) => h("option", {}, name)));
    $("model-choice").hidden = names.length < 2;
  }

  async send() {
    if (this.running) return;
    const abort = (this.running = new AbortController());
    this.busy(true);
    $("answer").textContent = "";
    $("play-trace").hidden = true;
    this.say("Waiting for the first token…");
    const began = performance.now();
    let id = null, tokens = 0, first = null, finish = null;
    try {
      for await (const event of stream(...this.call(), abort.signal)) {
        id ??= event.id;
        tokens = event.usage?.completion_tokens ?? tokens;
        const choice = event.choices[0];
        finish = choice?.finish_reason ?? finish;
        const text = choice?.text ?? choice?.delta?.content;
        if (!text) continue;
        first ??= performance.now() - began;
        $("answer").append(text);
        this.say("Streaming…");
      }
      const all = (performance.now() - began) / 1000;
      this.say(`${plural(tokens, "token")} in ${seconds(all)}; first after ${seconds((first ?? 0) / 1000)}, as seen here. Ended: ${finish}.`);
    } catch (error) {
      this.failed(error, abort.signal.aborted);
    }
    this.running = null;
    this.busy(false);
    if (id) await this.trace(id);
  }

  call() {
    const prompt = $("prompt").value, chat = $("play").elements.mode.value === "chat";
    const common = { model: $("play-model").value, max_tokens: $("max").valueAsNumber, temperature: $("temperature").valueAsNumber, stream: true, stream_options: { include_usage: true } };
    if ($("seed").value !== "") common.seed = $("seed").valueAsNumber;
    return chat ? ["v1/chat/completions", { ...common, messages: [{ role: "user", content: prompt }] }] : ["v1/completions", { ...common, prompt }];
  }

  failed(error, stopped) {
    if (stopped) this.say("Stopped.");
    else if (error instanceof ApiError) {
      this.say(`Failed: ${error.message}`, true);
      if (error.status === 401) this.onDenied(error.message);
    } else this.say("Failed: the connection to the gateway was lost.", true);
  }

  /** The trace is there once both sides have let go of the request: a moment after its end. */
  async trace(id) {
    for (let i = 0; i < TRIES; i += 1) {
      try {
        const trace = await get(`v1/requests/${encodeURIComponent(id)}`);
        show($("play-trace"), ...detailOf(trace));
        $("play-trace").hidden = false;
        return;
      } catch (error) {
        if (error.status !== 404) return;
        await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
      }
    }
    show($("play-trace"), h("p", { class: "empty" }, "The gateway has no trace of this request."));
    $("play-trace").hidden = false;
  }

  say(text, bad = false) {
    if ($("play-state").textContent !== text) $("play-state").textContent = text;
    $("play-state").classList.toggle("bad-text", bad);
  }

  busy(on) {
    $("send").disabled = on;
    $("stop").disabled = !on;
  }
}
