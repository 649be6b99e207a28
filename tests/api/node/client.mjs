// Uses OpenAI's own client for JavaScript against BASE_URL, and prints what it saw as JSON.
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.env.BASE_URL, apiKey: "x", maxRetries: 0 });
const chat = { model: "demo", messages: [{ role: "user", content: "hi" }], max_tokens: 100 };
const tools = [
  {
    type: "function",
    function: {
      name: "get_weather",
      parameters: { type: "object", properties: { city: { type: "string" } } },
    },
  },
];
const seen = {};

const whole = await client.chat.completions.create({ ...chat, tools });
seen.whole = whole.choices[0].message;
seen.finish = whole.choices[0].finish_reason;
seen.usage = whole.usage.total_tokens;

const stream = client.chat.completions.stream({
  ...chat,
  tools,
  stream_options: { include_usage: true },
});
seen.streamed = await stream.finalMessage();
seen.streamedUsage = (await stream.totalUsage()).total_tokens;

seen.echoed = "";
const pieces = await client.completions.create({
  model: "demo",
  prompt: "hi ",
  max_tokens: 100,
  echo: true,
  stream: true,
});
for await (const piece of pieces) seen.echoed += piece.choices[0].text;

seen.models = [];
for await (const model of client.models.list()) seen.models.push(model.id);

try {
  await client.completions.create({ model: "demo", prompt: "" });
} catch (error) {
  seen.error = { kind: error.constructor.name, status: error.status, param: error.param };
}
const named = await client.chat.completions
  .create(chat, { headers: { "X-Request-Id": "mine" } })
  .withResponse();
seen.requestId = named.request_id;
console.log(JSON.stringify(seen));
