// The replies on the page, kept for as long as its tab is open.

import { Reply } from "./reply.js";

const KEPT = "replies";
export const replies = [];

export function add(record) {
  const reply = new Reply({ images: [], text: "", whole: false, ...record });
  replies.push(reply);
  return reply;
}

// The chat up to what was said before a reply: what the model reads to write it, without replies that were stopped.
export function messagesBefore(reply) {
  const isTurn = ({ record }) => record.mode === "chat" && record.whole;
  const earlier = replies.slice(0, replies.indexOf(reply)).filter(isTurn);
  return [...instructions(), ...earlier.flatMap((each) => [said(each), answered(each)]), said(reply)];
}

export function instructions() {
  const system = document.getElementById("system").value;
  return system.trim() ? [{ role: "system", content: system }] : [];
}

function said({ record }) {
  const parts = record.images.map((url) => ({ type: "image_url", image_url: { url } }));
  return { role: "user", content: parts.length ? [...parts, { type: "text", text: record.said }] : record.said };
}

function answered({ record }) {
  return { role: "assistant", content: record.text };
}

export function save() {
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(replies.map(({ record }) => record).filter(({ whole }) => whole)));
  } catch {
    sessionStorage.removeItem(KEPT); // more images than the browser has room for
  }
}

export function restore() {
  return JSON.parse(sessionStorage.getItem(KEPT) ?? "[]").map(add);
}

export function clear() {
  replies.splice(0).forEach((reply) => reply.article.remove());
  save();
}
