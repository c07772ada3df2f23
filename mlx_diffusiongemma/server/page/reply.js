// One reply as it is drawn: the text that is certain, the frames of every step, and where the scrubber stands. What the
// model writes only ever becomes text, never markup.

import { doubt, drawHeat, isOpen } from "./heat.js";

const at = (id) => document.getElementById(id);
const REPLAY = 4000; // milliseconds that a replay takes, unless its steps are too few or too many for that

export class Reply {
  // record: what remains of it when the page is loaded again.
  constructor(record) {
    this.record = record;
    this.article = at("turn").content.cloneNode(true).querySelector("article");
    const find = (selector) => this.article.querySelector(selector);
    this.canvas = find(".canvas");
    this.steps = find(".steps");
    this.heat = find(".heat");
    this.replay = find(".replay");
    this.range = find("input[type=range]");
    this.label = find("output");
    this.cost = find(".cost");
    this.thought = find(".thought");
    find(".said").append(record.said, ...record.images.map(picture));
    this.frames = [];
    this.settled = "";
    this.range.addEventListener("input", () => this.show(Number(this.range.value), this.pause()));
    this.replay.addEventListener("click", () => (this.playing ? this.pause() : this.play()));
    this.heat.addEventListener("pointerdown", (event) => this.point(event));
    this.heat.addEventListener("pointermove", (event) => event.buttons && this.point(event));
    at("turns").append(this.article);
    this.show(0);
  }

  // after: the text behind what is being written, of an edit.
  begin(after = "") {
    this.pause();
    this.frames = [];
    this.settled = "";
    this.after = after;
    this.timings = this.ended = null;
    this.cost.textContent = "";
    this.cost.classList.remove("error");
    this.canvas.setAttribute("aria-busy", "true");
    this.range.disabled = this.replay.disabled = true;
  }

  take(chunk) {
    if (chunk.type === "diffusion_frame") {
      const previous = this.frames.at(-1);
      const same = previous?.block === chunk.block && previous.before === this.settled;
      this.frames.push({ ...chunk, before: this.settled, after: this.after, previous: same ? previous : null });
      this.steps.hidden = false;
      this.range.max = this.range.value = this.frames.length - 1;
      this.draw(this.frames.length - 1);
      this.label.textContent = `${place(chunk)} (at most ${chunk.total})`;
      cancelAnimationFrame(this.drawing);
      this.drawing = requestAnimationFrame(() => this.drawSteps());
    }
    const [choice] = chunk.choices;
    if (choice?.delta?.reasoning) {
      this.thought.hidden = false;
      this.thought.querySelector("p").textContent += choice.delta.reasoning;
    }
    const text = choice?.delta?.content ?? choice?.text;
    if (text) {
      this.settled += text;
      if (!this.after) this.write(this.settled);
    }
    if (choice?.finish_reason) this.ended = choice.finish_reason;
    if (chunk.timings) this.timings = { ...chunk.timings, seed: chunk.seed };
  }

  // Draw a step: what was certain before it is calm, each token of the canvas has the colour of its doubt.
  draw(number) {
    const frame = this.frames[number];
    const end = frame.holes ? Math.max(0, ...frame.holes.map(([, stop]) => stop)) : frame.pieces.length;
    const tokens = frame.pieces.slice(0, end).map((piece, index) => {
      if (!isOpen(frame, index)) return piece;
      const token = document.createElement("span");
      const nats = frame.entropy[index];
      const isNew = frame.previous && frame.previous.pieces[index] !== piece;
      token.className = `token${frame.accepted[index] ? "" : " redrawn"}${isNew ? " new" : ""}`;
      token.style.setProperty("--doubt", doubt(nats).toFixed(3));
      token.title = `${nats.toFixed(2)} nats of doubt${frame.accepted[index] ? "" : "; drawn again in the next step"}`;
      token.textContent = piece;
      return token;
    });
    this.canvas.replaceChildren(frame.before, ...tokens, frame.after);
    this.fields?.take(frame.before + frame.text);
  }

  write(...content) {
    this.canvas.replaceChildren(...content);
    this.fields?.take(this.canvas.textContent);
  }

  drawSteps() {
    drawHeat(this.heat, this.frames);
  }

  // Show the reply as it was after a step; the last place of the scrubber is the finished text.
  show(number) {
    const past = number < this.frames.length;
    this.canvas.classList.toggle("past", past);
    this.range.value = number;
    this.range.setAttribute("aria-valuetext", past ? place(this.frames[number]) : "finished");
    this.label.textContent = past ? `${place(this.frames[number])} of ${this.frames.length}` : `${number} steps`;
    if (past) return this.draw(number);
    this.write(...(this.changes ?? [this.record.text]));
  }

  get isFinished() {
    return Number(this.range.value) === this.frames.length && !this.canvas.hasAttribute("aria-busy");
  }

  end() {
    this.canvas.removeAttribute("aria-busy");
    this.range.disabled = this.replay.disabled = false;
    this.range.max = this.frames.length;
    this.steps.hidden = this.frames.length === 0;
    this.drawSteps();
    this.show(this.frames.length);
    const speed = this.timings;
    if (!speed) return;
    const parts = [
      `${speed.predicted_n} tokens`,
      ...(speed.predicted_n ? [`${speed.predicted_per_second.toFixed(1)} per second`] : []),
      `${speed.cache_n} of ${speed.cache_n + speed.prompt_n} prompt tokens read before`,
      `seed ${speed.seed}`,
      ...(this.ended === "length" ? ["cut off: no room for more tokens"] : []),
    ];
    this.cost.textContent = parts.join(" · ");
  }

  fail(message) {
    this.cost.textContent = message;
    this.cost.classList.add("error");
  }

  // Go through the steps again, slowly enough to see them.
  play() {
    const pause = Math.min(Math.max(REPLAY / this.frames.length, 40), 400);
    const start = this.range.value < this.frames.length ? Number(this.range.value) : 0;
    this.show(start);
    this.replay.textContent = "❚❚";
    this.playing = setInterval(() => {
      const next = Number(this.range.value) + 1;
      this.show(next);
      if (next >= this.frames.length) this.pause();
    }, pause);
  }

  pause() {
    clearInterval(this.playing);
    this.playing = null;
    this.replay.textContent = "▶";
  }

  point(event) {
    if (this.range.disabled) return;
    this.pause();
    const box = this.heat.getBoundingClientRect();
    const number = Math.floor(((event.clientX - box.left) / box.width) * this.frames.length);
    this.show(Math.min(Math.max(number, 0), this.frames.length - 1));
  }
}

function place(frame) {
  return frame.block ? `canvas ${frame.block + 1}, step ${frame.step}` : `step ${frame.step}`;
}

export function picture(url) {
  const image = new Image();
  image.src = url;
  image.alt = "";
  return image;
}
