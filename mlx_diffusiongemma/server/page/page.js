// A chat whose canvas can be watched, texts that are edited in place, and forms that the model fills in.

import { add, clear, instructions, messagesBefore, replies, restore } from "./conversation.js";
import { Fields } from "./fields.js";
import { picture } from "./reply.js";
import { allowRewriting, deselect } from "./rewriting.js";
import { finish, goToEnd, isBusy, replySettings, run, stop } from "./running.js";
import { request } from "./server.js";

const at = (id) => document.getElementById(id);
const REMEMBERED = ["system", "decoder", "max_tokens", "max_steps", "seed", "key", "schema"];
const EXAMPLE = {
  type: "object",
  properties: { name: { type: "string", maxLength: 40 }, age: { type: "integer", minimum: 0, maximum: 120 } },
  required: ["name", "age"],
  additionalProperties: false,
};
// For each mode: what the field is for, what the button does, and how it begins.
const MODES = {
  chat: { hint: "Ask something", button: "Send", begin: chat },
  text: { hint: "Paste a text; then select the part of it to write anew", button: "Open", begin: openText },
  form: { hint: "What to fill the form from: a mail, a note, an invoice", button: "Fill", begin: fillForm },
};
let pictures = [];

async function chat(said) {
  const reply = shown({ mode: "chat", said, images: pictures });
  takeOff();
  const body = { messages: messagesBefore(reply), ...replySettings() };
  if (await run(reply, "v1/chat/completions", body)) finish(reply, reply.settled);
}

async function openText(text) {
  finish(shown({ mode: "text", said: "", text }), text);
}

async function fillForm(said) {
  const schema = JSON.parse(at("schema").value);
  const reply = shown({ mode: "form", said, schema });
  const body = {
    messages: [...instructions(), { role: "user", content: said }],
    response_format: { type: "json_schema", json_schema: { name: "form", schema } },
    ...replySettings(),
    reasoning_effort: "none",
  };
  if (!(await run(reply, "v1/chat/completions", body))) return;
  finish(reply, reply.settled);
  if (reply.ended === "stop") reply.fields.judge();
}

// Put a reply on the page, with what can be done with it.
function shown(record) {
  const reply = ready(add(record));
  goToEnd();
  return reply;
}

function ready(reply) {
  at("intro").hidden = true;
  reply.article.classList.add(reply.record.mode);
  if (reply.record.mode !== "form") allowRewriting(reply);
  else {
    const place = reply.article.querySelector(".fields");
    reply.fields = new Fields(place, reply.record.schema, (json) => {
      reply.record.text = json;
      reply.canvas.textContent = json;
    });
    reply.fields.take(reply.record.text);
  }
  return reply;
}

function mode() {
  return document.querySelector("[name=mode]:checked").value;
}

function showMode() {
  const { hint, button } = MODES[mode()];
  at("prompt").placeholder = hint;
  at("prompt").setAttribute("aria-label", hint);
  at("send").textContent = button;
  at("schema").hidden = mode() !== "form";
  at("add").hidden = mode() !== "chat";
  at("wrong").textContent = "";
}

async function submit(event) {
  event?.preventDefault();
  const said = at("prompt").value.trim();
  if (isBusy() || !(said || pictures.length)) return;
  try {
    if (mode() === "form") JSON.parse(at("schema").value);
    at("wrong").textContent = "";
  } catch (error) {
    at("wrong").textContent = `The schema is no JSON: ${error.message}`;
    return;
  }
  at("prompt").value = "";
  await MODES[mode()].begin(said);
  if (document.activeElement === document.body) at("prompt").focus({ preventScroll: true });
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

function takeOff() {
  pictures = [];
  at("pictures").replaceChildren();
}

function startOver() {
  stop();
  clear();
  takeOff();
  at("intro").hidden = false;
  at("settings").open = false;
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
at("schema").value ||= JSON.stringify(EXAMPLE, null, 2);
at("key").addEventListener("change", nameModel);
at("ask").addEventListener("submit", submit);
at("stop").addEventListener("click", stop);
at("image").addEventListener("change", addPictures);
at("clear").addEventListener("click", startOver);
at("modes").addEventListener("change", showMode);
document.querySelector("#settings form").addEventListener("submit", (event) => event.preventDefault());
at("prompt").addEventListener("keydown", (event) => {
  const isLine = event.shiftKey || (mode() === "text" && !event.ctrlKey && !event.metaKey);
  if (event.key === "Enter" && !isLine && !event.isComposing) submit(event);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (at("settings").open) at("settings").open = false;
  else if (!deselect()) stop();
});
document.addEventListener("pointerdown", (event) => {
  if (!at("settings").contains(event.target)) at("settings").open = false;
});
const theme = matchMedia("(prefers-color-scheme: dark)");
theme.addEventListener("change", () => replies.forEach((reply) => reply.drawSteps()));
restore().forEach(ready);
showMode();
nameModel();
at("prompt").focus();
