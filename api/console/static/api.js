// Calls of the gateway's API, relative to the page: it also works behind a proxy's path.

const KEY = "baton-api-key";
const PATIENCE_MS = 8000;

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

function headers() {
  const bearer = key.get();
  return bearer ? { authorization: `Bearer ${bearer}` } : {};
}

async function checked(response) {
  if (response.ok) return response;
  let message = `HTTP ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* not an error of the gateway's; its status has to do */ }
  throw new ApiError(response.status, message);
}

/** Return what a GET answers; throws ApiError, with status 0 where there was no answer. */
export async function get(path) {
  let response;
  try {
    response = await fetch(`../${path}`, { headers: headers(), cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
  } catch {
    throw new ApiError(0, "The gateway does not answer.");
  }
  return (await checked(response)).json();
}

/** Post `body`, and yield the events of the stream that answers it; the first tells the id. */
export async function* stream(path, body, signal) {
  const response = await checked(await fetch(`../${path}`, {
    method: "POST",
    headers: { ...headers(), "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  }));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const frames = text.split("\n\n");
    text = frames.pop();
    for (const frame of frames) {
      if (!frame.startsWith("data: ")) continue; // a comment keeps the connection alive
      if (frame === "data: [DONE]") return;
      const event = JSON.parse(frame.slice(6));
      if (event.error) throw new ApiError(response.status, event.error.message);
      yield event;
    }
  }
}
