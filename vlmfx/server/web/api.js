// The server's API. The page lies beside it, so addresses are relative, and a proxy's prefix is kept.

const ROOT = new URL("../", import.meta.url);
const KEY = "vlmfx-key";

export class ApiError extends Error {
  // status: of HTTP; 0 where there was no response, or it broke off
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export const addressOf = (path) => new URL(path, ROOT).href;
export const keyOf = () => sessionStorage.getItem(KEY) ?? "";
export const keepKey = (key) => sessionStorage.setItem(KEY, key);

// The one model, as /v1/models describes it.
export const model = async () => (await (await ask("v1/models")).json()).data[0];

// How many tokens messages are.
export const count = async (name, messages) => (await (await ask("tokenize", { model: name, messages })).json()).count;

// The chunks of an answer as they come. Aborted by signal, it throws the browser's AbortError; for all else ApiError.
export async function* chat(body, signal) {
  const response = await ask("v1/chat/completions", body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      if (signal.aborted) throw error;
      return { done: true };
    });
    if (done) throw new ApiError("The connection ended before the answer did.", 0);
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue; // a ping
      const text = event.slice(6);
      if (text === "[DONE]") return;
      const chunk = JSON.parse(text);
      if (chunk.error) throw new ApiError(chunk.error.message, response.status);
      yield chunk;
    }
  }
}

async function ask(path, body, signal) {
  const headers = {};
  if (keyOf()) headers["Authorization"] = `Bearer ${keyOf()}`;
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal };
  const response = await fetch(addressOf(path), options).catch((error) => {
    if (signal?.aborted) throw error;
    throw new ApiError("The server cannot be reached; see whether it still runs.", 0);
  });
  if (!response.ok) throw new ApiError(await reasonOf(response), response.status);
  return response;
}

async function reasonOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The answer was ${response.status} ${response.statusText}, and no reason with it.`; // a proxy's
  }
}
