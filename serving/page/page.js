// The page: a chat and a completion, streamed; the engine and the settings beside them. All text is set as text.

import { ask, inWords, key, stream } from "./api.js";
import { build, chosen, system } from "./controls.js";
import { follow } from "./engine.js";
import { element, hide, tokensOf, watch, Writer } from "./tokens.js";

const at = (id) => document.getElementById(id);
const log = at("log"), text = at("text");
const chat = []; // {role, content} as the server takes them
let running = null; // of the answer that streams
let following = true; // whether the log stays at its end
let modes = ["chat", "complete"];

const mode = () => document.querySelector("input[name=mode]:checked").value;
const reset = build(at("controls"));
const look = follow();
watch(log);

// ---- answers ---------------------------------------------------------------------------------------------------

function entry(kind, label, content = "") {
  at("empty").hidden = true;
  const body = element("div", { className: "text", textContent: content });
  const node = element("article", { className: `entry ${kind}` }, element("h3", { textContent: label }), body);
  log.append(node);
  return { node, body };
}

function toEnd() {
  if (following) log.scrollTop = log.scrollHeight;
}
log.addEventListener("scroll", () => (following = log.scrollHeight - log.scrollTop - log.clientHeight < 40), { passive: true });

const ENDS = { stop: "complete", length: "as long as was asked for", stopped: "stopped" };

function facts(began, first, writer, usage, finish) {
  const count = usage?.completion_tokens ?? writer.count;
  const seconds = (performance.now() - first) / 1000;
  const parts = [`${count} token${count === 1 ? "" : "s"}`];
  if (count > 1 && first) parts.push(`${((count - 1) / seconds).toFixed(1)} tokens/s`);
  if (first) parts.push(`first after ${((first - began) / 1000).toFixed(2)} s`);
  parts.push(ENDS[finish] ?? finish);
  return parts.join(" · ");
}

function trouble(place, words, again, id) {
  const node = element("div", { className: "trouble", role: "alert" }, element("p", { textContent: words }));
  if (id) node.append(element("p", { className: "soft", textContent: `request ${id}` }));
  if (again) node.append(button("Try again", () => (node.remove(), again())));
  place.append(node);
  toEnd();
}

function button(words, action) {
  const node = element("button", { type: "button", textContent: words });
  node.addEventListener("click", action);
  return node;
}

// Streams one answer into `place`; gives its text, or null where nothing came of it.
async function answer(place, path, body, again) {
  const node = element("div", { className: "answer text", tabIndex: 0 });
  node.setAttribute("role", "group");
  node.setAttribute("aria-label", "Answer; arrow keys go through its tokens");
  place.append(node);
  const writer = new Writer(node), began = performance.now();
  let first = 0, usage = null, finish = "", failure = null;
  running = new AbortController();
  state();
  try {
    for await (const told of stream(path, body, running.signal)) {
      usage = told.usage ?? usage;
      for (const choice of told.choices) {
        const piece = choice.delta?.content ?? choice.text ?? "";
        const tokens = tokensOf(choice.logprobs);
        if (!first && (piece || tokens.length)) first = performance.now();
        writer.push(piece, tokens);
        finish = choice.finish_reason ?? finish;
      }
      toEnd();
    }
  } catch (error) {
    if (error.name === "AbortError") finish = "stopped";
    else failure = error;
  }
  running = null;
  state();
  if (first) place.append(element("p", { className: "facts-line", textContent: facts(began, first, writer, usage, finish || "broken off") }));
  else node.remove();
  if (failure) {
    trouble(place, inWords(failure), again, failure.id);
    if (failure.status === 401) keys(inWords(failure));
  }
  toEnd();
  look();
  return first ? writer.text : null;
}

// ---- what is asked ---------------------------------------------------------------------------------------------

function requested(place, again) {
  try {
    return chosen();
  } catch (error) {
    trouble(place, error.message, again);
    return null;
  }
}

async function talk() {
  const { node, body } = entry("model", "Model");
  body.remove();
  const again = () => (node.remove(), talk());
  const set = requested(node, again);
  if (!set) return;
  const messages = [...(system() ? [{ role: "system", content: system() }] : []), ...chat];
  const more = set.logprobs ? { logprobs: true, top_logprobs: 5 } : {};
  const request = { messages, stream: true, stream_options: { include_usage: true }, ...set.body, ...more };
  const said = await answer(node, "/v1/chat/completions", request, again);
  if (said !== null) chat.push({ role: "assistant", content: said });
}

async function complete(prompt) {
  const { node, body } = entry("continued", "Completion");
  body.classList.add("prompt");
  body.textContent = prompt;
  const again = () => (node.remove(), complete(prompt));
  const set = requested(node, again);
  if (!set) return;
  const request = { prompt, stream: true, stream_options: { include_usage: true }, ...set.body };
  if (set.logprobs) request.logprobs = 5;
  const said = await answer(node, "/v1/completions", request, again);
  if (said === null) return;
  node.append(
    button("Go on from here", () => {
      text.value = prompt + said;
      grow();
      text.focus();
    }),
  );
}

function send() {
  const words = text.value;
  if (running || !words.trim()) return text.focus();
  following = true;
  hide();
  if (mode() === "complete") return complete(words);
  text.value = "";
  grow();
  entry("person", "You", words);
  // after an answer that failed two messages of a person would stand side by side: they are one
  const last = chat.at(-1);
  if (last?.role === "user") last.content += `\n${words}`;
  else chat.push({ role: "user", content: words });
  return talk();
}

function state() {
  at("send").hidden = Boolean(running);
  at("stop").hidden = !running;
  log.setAttribute("aria-busy", String(Boolean(running))); // read aloud when it is whole
  at("clear").disabled = Boolean(running);
  for (const input of document.querySelectorAll("input[name=mode]")) {
    input.disabled = Boolean(running) || !modes.includes(input.value);
  }
}

function grow() {
  text.style.height = "auto";
  text.style.height = `${Math.min(text.scrollHeight + 2, innerHeight * 0.4)}px`;
}

const finger = matchMedia("(pointer: coarse)");
at("ask").addEventListener("submit", (event) => (event.preventDefault(), send()));
text.addEventListener("input", grow);
text.addEventListener("keydown", (event) => {
  const sends = event.key === "Enter" && !event.shiftKey && !event.isComposing && !finger.matches;
  if (sends && (mode() === "chat" || event.ctrlKey || event.metaKey)) event.preventDefault(), send();
});
const stop = () => running?.abort();
at("stop").addEventListener("click", () => (stop(), text.focus()));
document.addEventListener("keydown", (event) => event.key === "Escape" && !at("keys").open && stop());
at("clear").addEventListener("click", () => {
  for (const node of log.querySelectorAll(".entry")) node.remove();
  chat.length = 0;
  at("empty").hidden = false;
  text.focus();
});
at("reset").addEventListener("click", (event) => (event.preventDefault(), reset()));

function turn() {
  const chats = mode() === "chat";
  text.placeholder = chats ? "Message" : "A text that the model shall continue";
  at("text-label").textContent = chats ? "Message" : "Prompt";
  at("send").textContent = chats ? "Send" : "Continue";
  at("ask").title = chats ? "" : "Ctrl+Enter continues";
  text.rows = chats ? 1 : 4;
  grow();
}
for (const input of document.querySelectorAll("input[name=mode]")) input.addEventListener("change", turn);

// ---- key, colours, what is served --------------------------------------------------------------------------------

const WHY = at("keys-why").textContent;
function keys(why = "") {
  if (at("keys").open) return;
  at("keys-why").textContent = why ? `${why} ${WHY}` : WHY;
  at("key").value = key.get();
  at("keys").showModal();
  at("key").select();
}
const changed = (words) => (key.set(words.trim()), at("keys").close(), introduce(), look());
at("key-button").addEventListener("click", () => keys());
at("key-form").addEventListener("submit", (event) => (event.preventDefault(), changed(at("key").value)));
at("forget").addEventListener("click", () => changed(""));
at("dismiss").addEventListener("click", () => at("keys").close());

const THEMES = { "": ["Auto", "as the system has them"], light: ["Light", "light"], dark: ["Dark", "dark"] };
function theme(name) {
  document.documentElement.dataset.theme = name;
  sessionStorage.setItem("isomesh-theme", name);
  at("theme").textContent = THEMES[name][0];
  at("theme").setAttribute("aria-label", `Colours: ${THEMES[name][1]}`);
}
const names = Object.keys(THEMES);
at("theme").addEventListener("click", () => theme(names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length]));
theme(names.find((name) => name === sessionStorage.getItem("isomesh-theme")) ?? "");

async function introduce() {
  try {
    const { data } = await (await ask("/v1/models")).json();
    at("model").textContent = data[0]?.id ?? "no model";
    document.title = `${data[0]?.id ?? ""} · isomesh`;
    const about = await (await ask("/tokenizer_info")).json();
    modes = about.chat_template ? ["chat", "complete"] : ["complete"];
    if (!modes.includes(mode())) document.querySelector("input[value=complete]").checked = true;
    turn();
    state();
  } catch (failure) {
    if (failure.status === 401) keys(inWords(failure));
  }
}
if (matchMedia("(max-width: 60rem)").matches) for (const node of document.querySelectorAll("details")) node.open = false;
introduce();
turn();
if (!finger.matches) text.focus();
