// Select a part of a reply: it is filled or written anew in place, and the change is kept or undone.

import { messagesBefore, replies, save } from "./conversation.js";
import { compare } from "./diff.js";
import { isBusy, run, settings } from "./running.js";

const chosen = globalThis.Highlight && new Highlight(); // keeps the selection in sight while its fields have the focus
if (chosen) CSS.highlights.set("chosen", chosen);
let selected = null; // { reply, start, stop }

export function allowRewriting(reply) {
  const find = (selector) => reply.article.querySelector(selector);
  const form = find(".rewrite");
  const instruction = form.querySelector("input");
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (instruction.value.trim()) rewrite(instruction.value.trim());
    else instruction.focus();
  });
  find(".fill").addEventListener("click", () => rewrite());
  find(".keep").addEventListener("click", () => settle(reply, reply.changed));
  find(".undo").addEventListener("click", () => settle(reply, reply.record.text));
  find(".select").hidden = false;
  find(".select").addEventListener("click", () => selectWithKeys(reply));
}

document.addEventListener("selectionchange", followSelection);

function followSelection() {
  const selection = getSelection();
  const ends = [selection.anchorNode, selection.focusNode];
  const reply = replies.find(({ canvas }) => ends.every((node) => canvas.contains(node)));
  if (!reply || isBusy() || !reply.isFinished || reply.changes || reply.fields) return;
  deselect();
  if (selection.isCollapsed) return;
  const range = selection.getRangeAt(0).cloneRange();
  const start = lengthTo(reply.canvas, range.startContainer, range.startOffset);
  selected = { reply, start, stop: start + range.toString().length };
  chosen?.add(range);
  reply.article.querySelector(".rewrite").hidden = false;
}

export function deselect() {
  if (!selected) return false;
  selected.reply.article.querySelector(".rewrite").hidden = true;
  chosen?.clear();
  selected = null;
  return true;
}

// Without an instruction the span is filled from noise, so that it fits what is around it.
async function rewrite(instruction) {
  if (!selected || isBusy()) return;
  const { reply, start, stop } = selected;
  const text = reply.record.text;
  const [before, own, after] = [text.slice(0, start), text.slice(start, stop), text.slice(stop)];
  const characters = (part) => [...part].length; // the server counts those, JavaScript halves of some
  const first = characters(before);
  const body = {
    input: text,
    span: [first, first + characters(own)],
    instruction,
    messages: reply.record.mode === "chat" ? messagesBefore(reply) : undefined,
    ...settings(),
  };
  deselect();
  getSelection().removeAllRanges();
  if (!(await run(reply, "v1/edits", body, after))) return;
  reply.changed = reply.settled;
  const now = reply.changed.slice(before.length, reply.changed.length - after.length);
  if (now === own) {
    reply.end();
    reply.cost.textContent = `Nothing changed. ${reply.cost.textContent}`;
    return;
  }
  reply.changes = [before, ...compare(own, now).map(marked), after];
  reply.article.querySelector(".change").hidden = false;
  reply.end();
  reply.article.querySelector(".keep").focus();
}

function marked({ text, in: where }) {
  if (where === "both") return text;
  const mark = document.createElement(where === "old" ? "del" : "ins");
  mark.textContent = text;
  return mark;
}

function settle(reply, text) {
  reply.record.text = text;
  reply.changes = null;
  reply.article.querySelector(".change").hidden = true;
  reply.show(reply.frames.length);
  save();
}

// A caret in the reply, for as long as it has the focus; nothing can be typed.
function selectWithKeys({ canvas }) {
  const refuse = (event) => event.preventDefault();
  canvas.contentEditable = "true";
  canvas.setAttribute("aria-label", "Select with Shift and the arrow keys, then Tab");
  canvas.addEventListener("beforeinput", refuse);
  canvas.addEventListener(
    "blur",
    () => {
      followSelection(); // its event may still be under way, and finds the selection elsewhere
      canvas.removeAttribute("contenteditable");
      canvas.removeAttribute("aria-label");
      canvas.removeEventListener("beforeinput", refuse);
    },
    { once: true },
  );
  canvas.focus();
}

// How many characters of an element's text come before a place in it.
function lengthTo(element, node, offset) {
  const range = document.createRange();
  range.setStart(element, 0);
  range.setEnd(node, offset);
  return range.toString().length;
}
