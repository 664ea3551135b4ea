// The settings of sampling: built from a table, kept for this tab, and turned into the fields of a request.

import { element } from "./tokens.js";

const KEPT = "isomesh-settings";
// name in a request, label, least, most, step, as it is, what it does
const SLIDERS = [
  ["temperature", "Temperature", 0, 2, 0.05, 0.7, "0 always takes the likeliest token; higher is more varied"],
  ["top_p", "Top-p", 0.01, 1, 0.01, 1, "Only the likeliest tokens that make up this probability; 1 is off"],
  ["top_k", "Top-k", 0, 200, 1, 0, "Only so many of the likeliest tokens; 0 is off"],
  ["min_p", "Min-p", 0, 1, 0.01, 0, "Only tokens at least so likely as this share of the likeliest; 0 is off"],
  ["repetition_penalty", "Repetition penalty", 0.5, 2, 0.05, 1, "Makes tokens seen before less likely; 1 is off"],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1, 0, "Subtracted once for a token that is in the answer; 0 is off"],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1, 0, "Subtracted each time that a token is in the answer; 0 is off"],
];
const FORMATS = [["", "Any text"], ["json_object", "JSON"], ["json_schema", "JSON that fits a schema"]];

const fields = {}; // name -> what has a value
const defaults = {};

function row(name, label, about, ...inputs) {
  const id = `set-${name}`;
  const node = element("div", { className: "setting" });
  node.append(element("label", { htmlFor: id, textContent: label, title: about }), ...inputs);
  inputs[0].id = id;
  inputs[0].title = about;
  return node;
}

function keep(name, input, value) {
  fields[name] = input;
  defaults[name] = value;
  input.value = value;
  return input;
}

function slider([name, label, min, max, step, value, about]) {
  const number = keep(name, element("input", { type: "number", min, max, step, inputMode: "decimal" }), value);
  const range = element("input", { type: "range", min, max, step, value, tabIndex: -1 });
  range.setAttribute("aria-hidden", "true"); // the number beside it says and does the same
  range.addEventListener("input", () => {
    number.value = range.value;
    save();
  });
  number.addEventListener("input", () => (range.value = number.value));
  number.follow = () => (range.value = number.value);
  return row(name, label, about, number, range);
}

export function build(place) {
  const number = (name, value, min, max, placeholder = "") =>
    keep(name, element("input", { type: "number", min, max, step: 1, placeholder, inputMode: "numeric" }), value);
  const area = (name, placeholder, rows) => keep(name, element("textarea", { rows, placeholder, spellcheck: false }), "");
  const format = element("select", {}, ...FORMATS.map(([value, textContent]) => element("option", { value, textContent })));
  const schema = row("schema", "Schema", "A JSON schema", area("schema", '{"type": "object", …}', 3));
  const probable = keep("logprobs", element("input", { type: "checkbox", checked: true }), true);
  place.append(
    row("system", "System prompt", "Said to the model before the chat", area("system", "none", 2)),
    row("max_tokens", "Most new tokens", "The answer ends there at the latest", number("max_tokens", 256, 1, 1048576)),
    ...SLIDERS.map(slider),
    row("seed", "Seed", "The same seed gives the same text", number("seed", "", 0, 4294967295, "any")),
    row("stop", "Stop at", "Texts that end the answer, one a line; \\n stands for a new line", area("stop", "one a line", 1)),
    row("format", "Format", "What the answer has to be", keep("format", format, "")),
    schema,
    row("logprobs", "Token probabilities", "Shown when you point at a word", probable),
  );
  const shown = () => (schema.hidden = format.value !== "json_schema");
  for (const [name, value] of Object.entries(saved())) if (name in fields) put(name, value);
  place.addEventListener("input", () => (shown(), save()));
  shown();
  return () => {
    for (const [name, value] of Object.entries(defaults)) put(name, value);
    shown();
    save();
  };
}

function put(name, value) {
  const input = fields[name];
  if (input.type === "checkbox") input.checked = Boolean(value);
  else input.value = value;
  input.follow?.();
}

const read = (input) => (input.type === "checkbox" ? input.checked : input.value);
const save = () =>
  sessionStorage.setItem(KEPT, JSON.stringify(Object.fromEntries(Object.entries(fields).map(([k, v]) => [k, read(v)]))));

function saved() {
  try {
    return JSON.parse(sessionStorage.getItem(KEPT)) ?? {};
  } catch {
    return {};
  }
}

export const system = () => fields.system.value.trim();

// The fields of a request that are not as the server has them anyway. Raises Error in words, for what cannot be sent.
export function chosen() {
  const body = {};
  for (const input of Object.values(fields)) {
    if (!input.checkValidity()) {
      input.focus();
      throw new Error(`${input.labels[0].textContent}: ${input.validationMessage}`);
    }
  }
  const off = { top_p: 1, top_k: 0, min_p: 0, repetition_penalty: 1, presence_penalty: 0, frequency_penalty: 0 };
  for (const name of ["temperature", "max_tokens", "seed", ...Object.keys(off)]) {
    const text = fields[name].value;
    if (text !== "" && Number(text) !== off[name]) body[name] = Number(text);
  }
  const stops = fields.stop.value.split("\n").filter(Boolean).map((text) => text.replaceAll("\\n", "\n"));
  if (stops.length) body.stop = stops;
  if (fields.format.value === "json_object") body.response_format = { type: "json_object" };
  if (fields.format.value === "json_schema") {
    try {
      body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(fields.schema.value) } };
    } catch {
      fields.schema.focus();
      throw new Error("Schema: this is not JSON.");
    }
  }
  return { body, logprobs: fields.logprobs.checked };
}
