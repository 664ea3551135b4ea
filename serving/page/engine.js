// The state of the engine, asked for every second while the page can be seen, and tokens a second as a plot.

import { ask, inWords, key } from "./api.js";

const SECONDS = 120; // of the plot
const WIDTH = 300, HEIGHT = 84, TOP = 10, BOTTOM = 3;
const at = (id) => document.getElementById(id);
const points = []; // {time, rate}
let before = null;
let shown = "";

const draw = (name, attributes, text = "") => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
};

const tidy = (most) => {
  const unit = 10 ** Math.floor(Math.log10(most));
  return [1, 2, 5, 10].map((part) => part * unit).find((value) => value >= most);
};
const short = (value) => (value >= 10 || value === 0 ? value.toFixed(0) : value.toFixed(1));

function plot(now) {
  const most = tidy(Math.max(5, ...points.map((one) => one.rate)));
  const x = (time) => WIDTH * (1 - (now - time) / SECONDS);
  const y = (rate) => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (rate / most);
  const path = points.map((one) => `${x(one.time).toFixed(1)},${y(one.rate).toFixed(1)}`).join(" L");
  const svg = at("plot");
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.replaceChildren(
    ...[0, most / 2, most].map((rate) => draw("line", { class: "grid", x1: 0, x2: WIDTH, y1: y(rate), y2: y(rate) })),
    ...(points.length > 1
      ? [
          draw("path", { class: "area", d: `M${x(points[0].time)},${y(0)} L${path} L${x(points.at(-1).time)},${y(0)}Z` }),
          draw("path", { class: "line", d: `M${path}` }),
        ]
      : []),
    draw("text", { x: 2, y: y(most) + 11 }, `${most}`),
    draw("text", { x: WIDTH - 2, y: y(0) - 4, "text-anchor": "end" }, "now"),
    draw("text", { x: 2, y: y(0) - 4 }, "2 min ago"),
  );
  svg.setAttribute("aria-label", `Tokens per second in the last two minutes, now ${short(points.at(-1)?.rate ?? 0)}`);
}

function health(kind, words) {
  if (shown !== words) at("health").textContent = shown = words; // said by screen readers when it changes
  at("health").dataset.kind = kind;
}

function show(state, now) {
  if (before && state.generated_tokens >= before.tokens && now > before.time) {
    points.push({ time: now, rate: (state.generated_tokens - before.tokens) / (now - before.time) });
  } else if (before) points.length = 0; // the server has begun anew
  before = { tokens: state.generated_tokens, time: now };
  while (points.length && points[0].time < now - SECONDS) points.shift();
  const rate = points.at(-1)?.rate ?? 0;
  at("running").textContent = state.running;
  at("waiting").textContent = state.waiting;
  at("rate").textContent = short(rate);
  at("rate-now").textContent = `${state.running} running · ${short(rate)} tokens/s`;
  const share = (blocks) => (state.blocks ? blocks / state.blocks : 0);
  at("used").style.setProperty("--share", share(state.blocks_used));
  at("kept").style.setProperty("--share", share(state.blocks_cached));
  at("cache").textContent = `${Math.round(100 * share(state.blocks_used))}% used`;
  at("cache").title = `${state.blocks_used} of ${state.blocks} blocks in use, ${state.blocks_cached} kept for prompts that begin alike`;
  plot(now);
  if (state.draining) health("warn", "going down");
  else if (!state.ready) health("warn", "warming up");
  else health("good", state.waiting ? `busy, ${state.waiting} waiting` : "ready");
}

async function look() {
  const note = at("engine-note");
  try {
    const state = await (await ask("/state")).json();
    show(state, performance.now() / 1000);
    note.hidden = true;
  } catch (failure) {
    before = null;
    if (failure.status === 401) health("bad", key.get() ? "wrong key" : "needs a key");
    else if (failure.status === 403) health("", "");
    else health("bad", failure.status ? "in trouble" : "not reachable");
    note.textContent = failure.status === 403 ? "This key may not see the state of the engine." : inWords(failure);
    note.hidden = false;
  }
}

export function follow() {
  let timer = null;
  const turn = async () => {
    clearTimeout(timer);
    if (!document.hidden) await look();
    clearTimeout(timer);
    timer = setTimeout(turn, 1000);
  };
  document.addEventListener("visibilitychange", () => !document.hidden && turn());
  plot(0);
  turn();
  return turn;
}
