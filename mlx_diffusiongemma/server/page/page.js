"use strict";
// A chat whose canvas can be watched. What the model writes only ever becomes text, never markup.

const at = (id) => document.getElementById(id);
const SURE = 2; // nats of entropy from which a token is drawn in the full colour of doubt
const REMEMBERED = ["system", "decoder", "max_tokens", "max_steps", "seed", "key"];

let messages = [];
let pictures = [];
let running = null; // the AbortController of the reply that is being written

// One reply as it is drawn: what is certain, the frames of every step, and where the scrubber stands.
class Reply {
  constructor(said, images) {
    const article = at("turn").content.cloneNode(true).querySelector("article");
    const find = (selector) => article.querySelector(selector);
    find(".said").append(said, ...images.map(picture));
    this.canvas = find(".canvas");
    this.scrubber = find(".scrubber");
    this.range = find("input");
    this.label = find("output");
    this.cost = find(".cost");
    this.thought = find(".thought");
    this.text = "";
    this.frames = [];
    this.range.addEventListener("input", () => this.show(Number(this.range.value)));
    at("turns").append(article);
    article.scrollIntoView({ block: "end" });
  }

  take(chunk) {
    if (chunk.type === "diffusion_frame") {
      this.frames.push({ ...chunk, before: this.text });
      this.draw(this.frames.at(-1));
    }
    const delta = chunk.choices?.[0]?.delta ?? {};
    if (delta.reasoning) {
      this.thought.hidden = false;
      this.thought.querySelector("p").textContent += delta.reasoning;
    }
    if (delta.content) {
      this.text += delta.content;
      this.canvas.textContent = this.text;
    }
    if (chunk.timings) this.timings = chunk.timings;
    if (chunk.error) throw new Error(chunk.error.message);
  }

  // Draw a step: what was certain before it is calm, each token of the canvas has the colour of its entropy.
  draw(frame) {
    const tokens = frame.pieces.map((piece, place) => {
      const token = document.createElement("span");
      token.className = "token open";
      token.style.setProperty("--doubt", Math.min(frame.entropy[place] / SURE, 1).toFixed(3));
      token.title = `${frame.entropy[place].toFixed(2)} nats${frame.accepted[place] ? ", accepted" : ""}`;
      token.textContent = piece;
      return token;
    });
    this.canvas.replaceChildren(frame.before, ...tokens);
    this.label.textContent = `canvas ${frame.block + 1}, step ${frame.step} of ${frame.total}`;
  }

  // Show the reply as it was after a step; the last place of the scrubber is the finished text.
  show(place) {
    const past = place < this.frames.length;
    this.canvas.classList.toggle("past", past);
    if (past) return this.draw(this.frames[place]);
    this.canvas.textContent = this.text;
    this.label.textContent = `${this.frames.length} steps`;
  }

  end() {
    this.range.max = this.frames.length;
    this.range.value = this.frames.length;
    this.scrubber.hidden = this.frames.length === 0;
    this.show(this.frames.length);
    const speed = this.timings;
    if (speed) {
      this.cost.textContent =
        `${speed.predicted_n} tokens, ${speed.predicted_per_second.toFixed(1)} per second, ` +
        `${speed.cache_n} of ${speed.cache_n + speed.prompt_n} prompt tokens read before`;
    }
  }

  fail(message) {
    this.cost.textContent = message;
    this.cost.classList.add("error");
  }
}

function picture(url) {
  const image = new Image();
  image.src = url;
  image.alt = "";
  return image;
}

function request(path, body, signal) {
  const key = at("key").value;
  const headers = { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  return fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
}

// The events of a stream, as they come in.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (waiting + value).split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      if (part.startsWith("data: {")) yield JSON.parse(part.slice(6));
    }
  }
}

function settings() {
  const number = (id) => (at(id).value === "" ? undefined : Number(at(id).value));
  return {
    decoder: at("decoder").value || undefined,
    max_tokens: number("max_tokens"),
    max_steps: number("max_steps"),
    seed: number("seed"),
    reasoning_effort: at("thinking").checked ? "high" : "none",
  };
}

async function ask(text) {
  const images = pictures;
  pictures = [];
  at("pictures").replaceChildren();
  const parts = images.map((url) => ({ type: "image_url", image_url: { url } }));
  const said = { role: "user", content: images.length ? [...parts, { type: "text", text }] : text };
  const system = at("system").value.trim() ? [{ role: "system", content: at("system").value }] : [];
  const reply = new Reply(text, images);
  running = new AbortController();
  busy(true);
  try {
    const body = { messages: [...system, ...messages, said], stream: true, frames: true, ...settings() };
    const response = await request("v1/chat/completions", body, running.signal);
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const chunk of events(response)) reply.take(chunk);
    messages = [...messages, said, { role: "assistant", content: reply.text }];
    reply.end();
  } catch (error) {
    reply.end();
    reply.fail(error.name === "AbortError" ? "Stopped." : error.message);
  } finally {
    running = null;
    busy(false);
  }
}

function busy(is) {
  at("send").hidden = is;
  at("stop").hidden = !is;
  if (!is) at("prompt").focus();
}

function submit(event) {
  event?.preventDefault();
  const text = at("prompt").value.trim();
  if (running || !(text || pictures.length)) return;
  at("prompt").value = "";
  ask(text);
}

async function addPictures() {
  for (const file of at("image").files) {
    const url = await new Promise((resolve) => {
      const reader = new FileReader();
      reader.addEventListener("load", () => resolve(reader.result));
      reader.readAsDataURL(file);
    });
    pictures.push(url);
    at("pictures").append(picture(url));
  }
  at("image").value = "";
}

async function nameModel() {
  try {
    const response = await request("v1/models");
    const said = await response.json();
    at("model").textContent = response.ok ? said.data[0].id : said.error.message;
    if (response.status === 503) setTimeout(nameModel, 1000);
  } catch {
    at("model").textContent = "The server does not answer.";
  }
}

for (const id of REMEMBERED) {
  at(id).value = sessionStorage.getItem(id) ?? "";
  at(id).addEventListener("change", () => sessionStorage.setItem(id, at(id).value));
}
at("key").addEventListener("change", nameModel);
at("ask").addEventListener("submit", submit);
at("stop").addEventListener("click", () => running?.abort());
at("image").addEventListener("change", addPictures);
at("clear").addEventListener("click", () => {
  running?.abort();
  messages = [];
  at("turns").replaceChildren();
  at("settings").open = false;
});
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (at("settings").open) at("settings").open = false;
  else running?.abort();
});
nameModel();
at("prompt").focus();
