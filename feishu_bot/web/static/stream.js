// A question on its way to its answer. The connection may break as often as it likes: the question is asked again under
// the same request id, the server then begins with all the text there is, and what was shown is replaced by it.
import { ApiError, base, headers, t } from "./page.js";

const PAUSES_MS = [300, 1000, 2000, 4000, 8000, 15000];
const TRIES = 40;
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Yields the events of one connection: `{name, data}`. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    const blocks = rest.split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const name = /^event: (.*)$/m.exec(block)?.[1], data = /^data: (.*)$/m.exec(block)?.[1];
      if (name && data) yield { name, data: JSON.parse(data) };
    }
  }
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const seconds = Number(response.headers.get("Retry-After")) || null;
  return new ApiError(response.status, body?.error?.code, body?.error?.message ?? t.failed, seconds);
}

/**
 * Asks and returns the JSON of the answer. `show({text, html})` gets the answer as it grows, `wait(true)` is told while
 * there is no connection. Throws ApiError.
 */
export async function ask(body, { show, wait }) {
  let text = "", html = null;
  for (let tries = 0; tries < TRIES; tries++) {
    try {
      const response = await fetch(`${base}/chat?html`, {
        method: "POST",
        headers: headers({ "Content-Type": "application/json", Accept: "text/event-stream" }),
        body: JSON.stringify(body),
      });
      if (!response.ok) {
        const error = await refusal(response);
        if (error.status !== 503) throw error;
        wait(true);
        await sleep((error.retryAfterS ?? 5) * 1000);
        continue;
      }
      for await (const { name, data } of events(response)) {
        wait(false);
        if (name === "delta") {
          if (data.at === 0) { text = ""; html = null; }
          text += data.text;
          show({ text, html });
        } else if (name === "html") {
          html = data.html;
          show({ text, html });
        } else if (name === "error") {
          throw new ApiError(502, data.code, data.message);
        } else if (name === "done") {
          if (data.status === "in progress") break;
          return data;
        }
      }
    } catch (error) {
      if (error instanceof ApiError) throw error;
    }
    wait(true);
    await sleep(PAUSES_MS[Math.min(tries, PAUSES_MS.length - 1)]);
  }
  throw new ApiError(0, "offline", t.offline);
}
