// Every call to the router, with the key if there is one. The key lives in this tab's session storage and nowhere else.

const KEY = "relevo-key";

/** What the router answered instead; status 0: it did not answer. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

/** path: relative to the router, also where a proxy puts it under a path of its own. Raises ApiError. */
export async function call(path, { body, signal, headers } = {}) {
  const request = { method: body ? "POST" : "GET", signal, headers: { ...headers }, cache: "no-store" };
  if (key.get()) request.headers.authorization = `Bearer ${key.get()}`;
  if (body) {
    request.headers["content-type"] = "application/json";
    request.body = JSON.stringify(body);
  }
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), request);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The router does not answer.");
  }
  if (!response.ok) throw new ApiError(response.status, await complaint(response));
  return response;
}

/** Server-sent events of a response, as { event, data }; EventSource could not send the key. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      pending += value;
      const blocks = pending.split("\n\n");
      pending = blocks.pop();
      for (const block of blocks) yield parse(block);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parse(block) {
  const found = { event: "message", data: "" };
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) found.event = line.slice(7);
    else if (line.startsWith("data: ")) found.data += line.slice(6);
  }
  return found;
}

async function complaint(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The router answered with status ${response.status}.`;
  }
}
