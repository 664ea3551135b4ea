// How the page speaks with its server. The key lives in this tab's session storage, and is sent as a header alone.

const KEY = "isomesh-key";

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (text) => (text ? sessionStorage.setItem(KEY, text) : sessionStorage.removeItem(KEY)),
};

// A refusal or a fault, in words that a person can act on. `status` 0: there was no answer at all.
export class Failure extends Error {
  constructor(status, message, { code = null, seconds = null, id = null } = {}) {
    super(message);
    Object.assign(this, { status, code, seconds, id });
  }
}

const WORDS = {
  401: () => (key.get() ? "The server does not know this key, or it has expired." : "The server asks for a key."),
  403: () => "This key may not do that.",
  404: () => "The server has no such thing.",
  413: () => "The text is too long to be sent.",
  429: () => "You have reached the limit of this key.",
  500: () => "The server has failed on this request.",
  502: () => "No server answers behind this address.",
  503: () => "The server has no room just now, or is going down.",
  504: () => "The server took too long.",
};

const sentence = (text) => (text ? `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}` : "");

export function inWords(failure) {
  const parts = [WORDS[failure.status]?.() ?? ""];
  if (failure.message && failure.status !== 401) parts.push(sentence(failure.message));
  if (failure.seconds) parts.push(`Try again in ${failure.seconds} s.`);
  return parts.filter(Boolean).join(" ");
}

async function failureOf(response) {
  let told = {};
  try {
    told = (await response.json()).error ?? {};
  } catch {
    // not ours: a proxy's page
  }
  return new Failure(response.status, String(told.message ?? ""), {
    code: told.code ?? null,
    seconds: Number(response.headers.get("retry-after")) || null,
    id: response.headers.get("x-request-id"),
  });
}

// Raises Failure, or AbortError.
export async function ask(path, { body, signal } = {}) {
  const headers = { accept: body?.stream ? "text/event-stream" : "application/json" };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body) headers["content-type"] = "application/json";
  const options = { headers, signal, cache: "no-store", method: body ? "POST" : "GET", body: body && JSON.stringify(body) };
  let response;
  try {
    response = await fetch(new URL(path, location.origin), options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure(0, "The server cannot be reached. Is it running, and is the network there?");
  }
  if (!response.ok) throw await failureOf(response);
  return response;
}

// The events of an answer, each as an object. Raises Failure where the answer breaks off.
export async function* stream(path, body, signal) {
  const response = await ask(path, { body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const broken = () => new Failure(0, "The connection was lost before the answer was complete.");
  let rest = "", whole = false;
  try {
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        throw error.name === "AbortError" ? error : broken();
      }
      if (part.done) throw broken();
      rest += part.value;
      const events = rest.split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim());
        if (!data.length) continue;
        if (data[0] === "[DONE]") {
          whole = true;
          return;
        }
        const told = JSON.parse(data.join("\n"));
        if (told.error) throw new Failure(-1, `The answer broke off: ${told.error.message ?? "the server failed"}`);
        yield told;
      }
    }
  } finally {
    // behind [DONE] comes nothing more: read to the end, so that the connection can be used again
    (whole ? reader.read() : reader.cancel()).catch(() => {});
  }
}
