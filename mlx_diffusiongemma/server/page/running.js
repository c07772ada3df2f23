// One request at a time: its chunks go to a reply, until it ends, fails or is stopped.

import { save } from "./conversation.js";
import { chunks } from "./server.js";

const at = (id) => document.getElementById(id);
let running = null; // the AbortController of the reply that is being written

export const isBusy = () => running !== null;
export const stop = () => running?.abort();

// Returns whether the answer came whole. after: the text behind what is being written, of an edit.
export async function run(reply, path, body, after) {
  running = new AbortController();
  busy(true);
  reply.begin(after);
  let wrong = null;
  try {
    for await (const chunk of chunks(path, body, running.signal)) {
      const following = isAtEnd();
      reply.take(chunk);
      if (following) goToEnd();
    }
    if (reply.ended === null) throw new Error("The server went away; start it again.");
  } catch (error) {
    wrong = error.name === "AbortError" ? "Stopped." : error.message;
  }
  running = null;
  busy(false);
  if (wrong === null) return true;
  if (after === undefined) reply.record.text = reply.settled; // what is certain of it stays; an edit leaves no trace
  reply.end();
  reply.fail(wrong);
  return false;
}

// What a request has in common with all others; what is left empty is the server's own, but for the seed: the server's
// would be too large for JavaScript to show.
export function settings() {
  return { max_steps: number("max_steps"), seed: number("seed") ?? crypto.getRandomValues(new Uint32Array(1))[0] };
}

export function replySettings() {
  return {
    ...settings(),
    max_tokens: number("max_tokens"),
    decoder: at("decoder").value || undefined,
    reasoning_effort: at("thinking").checked ? "high" : "none",
  };
}

export function finish(reply, text) {
  Object.assign(reply.record, { text, whole: true });
  const following = isAtEnd();
  reply.end();
  if (following) goToEnd();
  at("status").textContent = text;
  save();
}

function number(id) {
  return at(id).value === "" ? undefined : Number(at(id).value);
}

function busy(is) {
  at("send").hidden = is;
  at("stop").hidden = !is;
  document.body.classList.toggle("busy", is);
}

// The page follows a reply for those who have not scrolled away from its end.
function isAtEnd() {
  const page = document.documentElement;
  return page.scrollHeight - page.scrollTop - page.clientHeight < 40;
}

export function goToEnd() {
  document.documentElement.scrollTop = document.documentElement.scrollHeight;
}
