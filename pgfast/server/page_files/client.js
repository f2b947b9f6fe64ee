// POST /v1/answer?stream=1 and its server-sent events.

const LONGEST_WAIT = 30; // seconds; a server that asks for more is not waited for
const DEFAULT_WAIT = 2;

/** A refusal or failure, in one line for the user. */
export class AskError extends Error {
  constructor(message, status = 0, retryAfter = null) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/**
 * Asks once, and once more when the server is busy.
 * @param {FormData} form fields of the request
 * @param {{key: string | null, signal: AbortSignal, onText: (text: string) => void, onBusy: (seconds: number) => void}} how
 * @returns the JSON of the answer
 */
export async function ask(form, { key, signal, onText, onBusy }) {
  for (let again = true; ; again = false) {
    const response = await send(form, key, signal);
    if (response.ok) return readAnswer(response, signal, onText);
    const error = await refusal(response);
    if (error.retryAfter === null || error.retryAfter > LONGEST_WAIT || !again) throw error;
    onBusy(error.retryAfter);
    await pause(error.retryAfter, signal);
  }
}

async function send(form, key, signal) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  try {
    return await fetch("v1/answer?stream=1", { method: "POST", body: form, headers, signal });
  } catch (error) {
    if (signal.aborted) throw error;
    throw new AskError("The server cannot be reached. Is it still running?");
  }
}

async function refusal(response) {
  const body = await response.json().catch(() => null); // a proxy in between answers in HTML
  const said = body?.error?.message ?? `The server answered ${response.status} ${response.statusText}`.trim();
  if (response.status === 401) return new AskError("This server asks for an API key.", 401);
  if (response.status !== 429 && response.status !== 503) return new AskError(sentence(said), response.status);
  const seconds = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  const wait = Number.isNaN(seconds) ? DEFAULT_WAIT : Math.max(seconds, 0);
  return new AskError(`The server is busy. Ask again in ${wait} s.`, response.status, wait);
}

async function readAnswer(response, signal, onText) {
  let text = "";
  for await (const { event, data } of serverSentEvents(response.body)) {
    signal.throwIfAborted(); // what had arrived before is not shown any more
    if (event === "piece") onText((text += data.text));
    else if (event === "error") throw new AskError(sentence(data.error.message));
    else if (event === "answer") return data;
  }
  throw new AskError("The connection broke before the answer was complete.");
}

/** Yields {event, data} of each event, data parsed as JSON; a last event without its blank line is incomplete. */
export async function* serverSentEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", event = "message", data = [];
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines.map((line) => line.replace(/\r$/, ""))) {
        if (line === "") {
          if (data.length) yield { event, data: JSON.parse(data.join("\n")) };
          event = "message", data = [];
        } else if (line.startsWith("event:")) event = line.slice(6).trim();
        else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // left early, or broken already
  }
}

function sentence(text) {
  const line = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(line) ? line : `${line}.`;
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    if (signal.aborted) return reject(signal.reason);
    const timer = setTimeout(resolve, seconds * 1000);
    signal.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}
