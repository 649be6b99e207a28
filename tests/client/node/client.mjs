// The gRPC API by stubs that @grpc/grpc-js makes of the .proto file; prints what it saw as JSON.
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const { ADDRESS, PROTO } = process.env;
const options = { keepCase: true, longs: Number, defaults: true, oneofs: true };
const { baton } = grpc.loadPackageDefinition(loader.loadSync(PROTO, options));
const client = new baton.v1.Inference(ADDRESS, grpc.credentials.createInsecure(), {
  "grpc.enable_http_proxy": 0,
});
const soon = () => ({ deadline: Date.now() + 60_000 });

const unary = (method, request) =>
  new Promise((resolve, reject) =>
    client[method](request, soon(), (error, told) => (error ? reject(error) : resolve(told))),
  );

async function generate(request) {
  let text = "";
  let last;
  for await (const told of client.Generate(request, soon())) {
    text += told.text;
    last = told;
  }
  return { text, finish: last.finish_reason, tokens: last.usage.completion_tokens };
}

async function batch(names) {
  const call = client.GenerateBatch(soon());
  const texts = {};
  for (const id of names) call.write({ id, generate: { text: "hi", max_tokens: 50 } });
  call.write({ id: "bad", generate: { text: "hi", max_tokens: 0 } });
  call.end();
  let opened = 0;
  for await (const told of call) {
    if (told.event === "opened") opened = told.opened.max_open;
    else if (told.event === "error") texts[told.id] = told.error.code;
    else texts[told.id] = (texts[told.id] ?? "") + told.response.text;
  }
  return { texts, opened };
}

async function refused() {
  try {
    await generate({ text: "hi", top_p: 5 });
  } catch (error) {
    return { code: error.code, details: error.details };
  }
}

const tokens = await unary("Tokenize", { text: "añ😀" });
const chat = { messages: [{ role: "user", content: "hi" }] };
console.log(
  JSON.stringify({
    models: (await unary("ListModels", {})).models,
    one: await generate({ text: "hi", max_tokens: 50 }),
    chat: await generate({ chat, max_tokens: 50 }),
    back: (await unary("Detokenize", tokens)).text,
    batch: await batch(["a", "b", "c"]),
    refused: await refused(),
    cancelled: (await unary("Cancel", { request_id: "gen-x" })).cancelled,
  }),
);
client.close();
