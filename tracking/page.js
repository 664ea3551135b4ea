// The page of runs: facts, charts, settings, samples, from the data beside this script; a live page asks for more.

const data = JSON.parse(document.getElementById("data").textContent);
const view = { from: 0, to: 1, cursor: null, smoothing: 0, logX: false };
const hidden = new Set(); // names of runs that are switched off
const COLORS = 8; // --c0 to --c7 of the style
const EVERY = 2000; // milliseconds between two questions of a live page
const SHARES = ["perf/mfu_full_attention", "perf/hfu", "perf/bubble", "perf/goodput", "train/accuracy", "moe/dropped"];
const STEP_PARTS = [
  ["perf/device_ms", "device"],
  ["perf/data_wait_ms", "waiting for data"],
  ["perf/host_ms", "host"],
];
const EVALUATED = { dashed: true, dots: true, tone: 1 };

// What every page shows, by the keys of docs/metrics.md.
const KINDS = [
  {
    title: "Loss",
    unit: "nats a token",
    first: true,
    height: 300,
    parts: [
      ["train/loss", "train"],
      ["eval/loss", "held out", EVALUATED],
    ],
  },
  { title: "Bits per byte", unit: "held out", parts: [["eval/bits_per_byte", "held out", EVALUATED]] },
  { title: "Learning rate", parts: [["train/lr", "learning rate"]] },
  { title: "Gradient norm", unit: "before clipping", parts: [["train/grad_norm", "gradient norm"]] },
  { title: "Throughput", unit: "tokens/s", parts: [["perf/tokens_per_s", "tokens/s"]] },
  { title: "MFU", unit: "share of the peak", write: percent, parts: [["perf/mfu", "MFU"]] },
];
// Written once in a life of a run, or the same as the steps: no curves.
const NO_CURVE = ["tokens", "epoch", "perf/peak_tflops", "perf/compile_s", "perf/startup_s"];

// ---------------------------------------------------------------------------------------------------------------- data

function decode(run) {
  for (const points of Object.values(run.series)) points.value = points.value.map(Number); // "NaN", "Infinity"
  return run;
}

// Puts what a live run has written since in the place of what was known of it.
function merge(run, news) {
  decode(news);
  if (news.generation === run.generation) {
    for (const [key, points] of Object.entries(run.series)) {
      const fresh = news.series[key] || {};
      for (const [steps, values] of [
        ["step", "value"],
        ["mean_step", "mean"],
      ]) {
        if (!points[steps]) continue;
        const end = place(points[steps], news.from);
        fresh[steps] = points[steps].slice(0, end).concat(fresh[steps] || []);
        fresh[values] = points[values].slice(0, end).concat(fresh[values] || []);
      }
      news.series[key] = fresh;
    }
  }
  return news;
}

const color = (number) => `var(--c${number % COLORS})`;
const shownRuns = () => data.runs.filter((run) => !hidden.has(run.name));
const lastOf = (run, key) => run.series[key]?.value.at(-1);
const bestOf = (run, key) => run.series[key]?.value.reduce((best, value) => (value < best ? value : best), Infinity);

function duration(seconds) {
  const [h, m, s] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, Math.floor(seconds % 60)];
  return h ? `${h} h ${m} min` : m ? `${m} min ${s} s` : `${trimmed((seconds % 60).toPrecision(3))} s`;
}

// Label and text of what is known of a run; the same labels for each run.
function facts(run) {
  const told = (value, write = number) => (value === undefined || value === Infinity ? "–" : write(value));
  const planned = run.settings["train.steps"];
  return [
    ["step", whole(Math.max(run.last, 0)) + (planned ? ` of ${whole(Number(planned))}` : "")],
    ["tokens", told(lastOf(run, "tokens"))],
    ["train loss", told(lastOf(run, "train/loss"))],
    ["best held-out loss", told(bestOf(run, "eval/loss"))],
    ["best bits per byte", told(bestOf(run, "eval/bits_per_byte"))],
    ["tokens/s", told(lastOf(run, "perf/tokens_per_s"))],
    ["MFU", told(lastOf(run, "perf/mfu"), percent)],
    ["wall time", told(lastOf(run, "perf/wall_s"), duration)],
  ];
}

// -------------------------------------------------------------------------------------------------------------- charts

// The lines of a kind of chart: each of its parts, of each run that is shown.
function linesOf(kind) {
  return () =>
    shownRuns()
      .filter((run) => !kind.run || kind.run === run.name)
      .flatMap((run) =>
        kind.parts.map(([key, name, style], part) => {
          const many = data.runs.length > 1 && !kind.run;
          const label = !many ? name : kind.parts.length > 1 ? `${name}, ${run.name}` : run.name;
          return {
            name: label,
            color: color(many ? data.runs.indexOf(run) : (style?.tone ?? part)),
            ...style,
            points: run.series[key],
            last: run.last,
          };
        }),
      )
      .filter((line) => line.points?.step.length);
}

function allKinds() {
  const several = data.runs.length > 1;
  const stacks = data.runs
    .filter((run) => STEP_PARTS.every(([key]) => run.series[key]))
    .map((run) => ({
      title: several ? `Shares of a step: ${run.name}` : "Shares of a step",
      unit: "of its time",
      stack: true,
      write: percent,
      run: run.name,
      parts: STEP_PARTS,
    }));
  const many = stacks.length > 3; // one for each run would bury the rest
  const main = [...KINDS, ...(many ? [] : stacks)];
  const taken = new Set([...[...KINDS, ...stacks].flatMap((kind) => kind.parts.map(([key]) => key)), ...NO_CURVE]);
  const others = [...new Set(data.runs.flatMap((run) => Object.keys(run.series)))]
    .filter((key) => !taken.has(key))
    .sort();
  const rest = others.map((key) => ({
    title: key,
    write: SHARES.includes(key) ? percent : undefined,
    parts: [[key, key]],
  }));
  const there = (kind) =>
    data.runs.some((run) => (!kind.run || kind.run === run.name) && kind.parts.some(([key]) => run.series[key]));
  return { main: main.filter(there), rest: [...(many ? stacks : []), ...rest] };
}

const charts = new Map(); // title -> Chart
const mainCharts = element("div", { class: "charts" });
const restCharts = element("div", { class: "charts" });
const restTitle = element("summary");
const rest = element("details", { id: "others" }, restTitle, restCharts);
const loud = element("div", { class: "hidden", "aria-live": "polite", id: "said" });

function chartOf(kind) {
  if (!charts.has(kind.title)) charts.set(kind.title, new Chart(kind, linesOf(kind), view, { zoom, cursor }));
  return charts.get(kind.title);
}

// Puts the charts of all metrics that are there into the page, keeping those that stand in it.
function arrangeCharts() {
  const kinds = allKinds();
  for (const [where, some] of [
    [mainCharts, kinds.main],
    [restCharts, kinds.rest],
  ]) {
    const nodes = some.map((kind) => chartOf(kind).node);
    if (nodes.length !== where.children.length || nodes.some((node, i) => node !== where.children[i]))
      where.replaceChildren(...nodes);
  }
  restTitle.textContent = `${kinds.rest.length} more charts`;
  rest.hidden = !kinds.rest.length;
}

let zoomed = null; // [from, to] in steps, or null for all

function zoom(from, to) {
  const [first, last] = extent();
  const range = from === null ? null : [Math.max(from, first), Math.min(to, last)];
  zoomed = range && range[1] - range[0] < last - first - 1e-6 && range[1] > range[0] ? range : null;
  draw();
}

// The first and the last step of the runs shown.
function extent() {
  let first = Infinity,
    last = -Infinity;
  for (const run of shownRuns()) {
    for (const [key, { step }] of Object.entries(run.series)) {
      if (NO_CURVE.includes(key) || !step.length) continue;
      const low = view.logX ? (step[place(step, 1)] ?? Infinity) : step[0];
      first = Math.min(first, low);
      last = Math.max(last, step.at(-1));
    }
  }
  if (first > last) return view.logX ? [1, 10] : [0, 1];
  return first === last ? [view.logX ? first * 0.9 : first - 1, last + 1] : [first, last];
}

function draw() {
  const [first, last] = extent();
  [view.from, view.to] = zoomed ? [Math.max(zoomed[0], view.logX ? first : -Infinity), zoomed[1]] : [first, last];
  if (view.to <= view.from) [view.from, view.to] = [first, last];
  reset.disabled = !zoomed;
  for (const chart of charts.values()) chart.draw();
}

let waiting = false;

function cursor(step, chart, spoken) {
  if (spoken) {
    view.cursor = step;
    loud.textContent = chart.point();
  }
  view.cursor = step;
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    for (const one of charts.values()) one.point();
  });
}

// ----------------------------------------------------------------------------------------------------------- the tools

function toggle(words, does) {
  const button = element("button", { type: "button", "aria-pressed": "false" }, words);
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", on);
    does(on);
  });
  return button;
}

const reset = element("button", { type: "button", id: "reset", disabled: "" }, "Reset zoom");
reset.addEventListener("click", () => zoom(null, null));

function tools() {
  const slider = element("input", { type: "range", id: "smoothing", min: 0, max: 0.99, step: 0.01, value: 0 });
  const output = element("output", { for: "smoothing" }, "0");
  slider.addEventListener("input", () => {
    view.smoothing = Number(slider.value);
    output.textContent = slider.value;
    draw();
  });
  const logX = toggle("log steps", (on) => {
    view.logX = on;
    draw();
  });
  const theme = toggle("Dark", (on) => (document.documentElement.dataset.theme = on ? "dark" : "light"));
  theme.setAttribute("aria-pressed", matchMedia("(prefers-color-scheme: dark)").matches);
  return element(
    "div",
    { class: "tools", role: "toolbar", "aria-label": "charts" },
    element("label", {}, "Smoothing", slider, output),
    logX,
    reset,
    theme,
    state,
  );
}

// ------------------------------------------------------------------------------------------------------------ sections

const about = element("div");
const settings = element("div");
const samples = element("div");
const state = element("span", { class: "state" });

function runSwitch(run, number) {
  const box = element("input", { type: "checkbox" });
  box.checked = !hidden.has(run.name);
  box.addEventListener("change", () => {
    hidden[box.checked ? "delete" : "add"](run.name);
    draw();
  });
  return element(
    "label",
    { class: "run", title: run.path, color: color(number) },
    box,
    element("span", { class: "swatch", color: color(number) }),
    run.name,
  );
}

function table(heads, rows, kind = "") {
  const head = element("tr", {}, ...heads.map((text) => element("th", { scope: "col" }, text)));
  const body = rows.map(([first, ...cells]) =>
    element("tr", {}, element("th", { scope: "row" }, first), ...cells.map((cell) => element("td", {}, cell))),
  );
  return element(
    "div",
    { class: `wide ${kind}`, tabindex: 0 },
    element("table", {}, element("thead", {}, head), element("tbody", {}, ...body)),
  );
}

function showFacts() {
  const notes = data.runs.flatMap((run) => run.notes).map((note) => element("p", { class: "note" }, note));
  const peaks = [...new Set(data.runs.map((run) => run.facts["perf/peak"]).filter(Boolean))];
  const compiling = data.runs.length === 1 ? lastOf(data.runs[0], "perf/compile_s") : undefined;
  const words = [
    ...(peaks.length ? [`MFU is relative to ${peaks.join("; ")}.`] : []),
    ...(compiling === undefined ? [] : [`Compiling took ${duration(compiling)}.`]),
  ];
  if (data.runs.some((run) => Object.values(run.series).some((points) => points.mean)))
    words.push(
      "Long runs are drawn by the least and the greatest value of each bucket of steps, and smoothed by its means.",
    );
  const peak = words.length ? [element("p", { class: "soft" }, words.join(" "))] : [];
  if (data.runs.length === 1) {
    const tiles = facts(data.runs[0]).map(([label, text]) =>
      element("div", {}, element("dt", {}, label), element("dd", {}, text)),
    );
    about.replaceChildren(...notes, element("dl", { class: "facts" }, ...tiles), ...peak);
  } else {
    const rows = data.runs.map((run, i) => [runSwitch(run, i), ...facts(run).map(([, text]) => text)]);
    about.replaceChildren(...notes, table(["run", ...facts(data.runs[0]).map(([label]) => label)], rows), ...peak);
  }
}

function showSettings() {
  const rows = Object.entries(data.differences).map(([key, values]) => [key, ...values.map((value) => value ?? "–")]);
  const several = data.runs.length > 1,
    names = data.runs.map((run) => run.name);
  const same =
    several && !rows.length ? [element("p", {}, "All settings are the same, the runs' names and places aside.")] : [];
  const keys = [...new Set(data.runs.flatMap((run) => Object.keys(run.settings)))];
  const every = keys.map((key) => [key, ...data.runs.map((run) => run.settings[key] ?? "–")]);
  const all = keys.length
    ? element(
        "details",
        {},
        element("summary", {}, `All ${keys.length} settings`),
        table(["setting", ...(several ? names : ["value"])], every, "words"),
      )
    : element("p", { class: "soft" }, "There is no config.yaml that can be read.");
  settings.replaceChildren(
    element("h2", {}, several ? "What differs in the settings" : "Settings"),
    ...(rows.length ? [table(["setting", ...names], rows, "words")] : []),
    ...same,
    all,
  );
}

function showSamples() {
  const text = ({ prompt, text }) => element("pre", { tabindex: 0 }, element("b", {}, prompt), text);
  const blocks = data.runs
    .filter((run) => run.samples.length)
    .flatMap((run) => {
      const last = run.samples.at(-1).step,
        title = data.runs.length > 1 ? `${run.name}, step ${whole(last)}` : `Step ${whole(last)}`;
      const newest = run.samples.filter(({ step }) => step === last),
        older = run.samples.filter(({ step }) => step !== last);
      const before = older.map((sample) =>
        element("div", {}, element("p", { class: "soft" }, `step ${whole(sample.step)}`), text(sample)),
      );
      return [
        element("h3", {}, title),
        ...newest.map(text),
        ...(older.length
          ? [element("details", {}, element("summary", {}, `${older.length} earlier samples`), ...before)]
          : []),
      ];
    });
  samples.replaceChildren(...(blocks.length ? [element("h2", {}, "Samples"), ...blocks] : []));
}

// Shows a section again if what it shows has changed, so that what a reader opened or marked stays.
const shown = new Map();

function refreshed(show, what) {
  const text = JSON.stringify(what);
  if (shown.get(show) !== text) show();
  shown.set(show, text);
}

function show() {
  refreshed(
    showFacts,
    data.runs.map((run) => [run.name, run.notes, facts(run), run.facts]),
  );
  refreshed(showSettings, [data.differences, data.runs.map((run) => run.settings)]);
  refreshed(
    showSamples,
    data.runs.map((run) => run.samples),
  );
  arrangeCharts();
  draw();
}

// ---------------------------------------------------------------------------------------------------------------- live

async function ask() {
  try {
    const known = data.runs.map((run) => `${run.generation}.${run.last}`).join(",");
    const answer = await fetch(`data?server=${data.live}&known=${known}`);
    if (answer.status === 409) location.reload(); // another server has this address now
    const news = await answer.json();
    data.runs = data.runs.map((run, i) => merge(run, news.runs[i]));
    data.differences = news.differences;
    show();
    state.textContent = `live, read at ${new Date().toLocaleTimeString("en-GB")}`;
  } catch {
    state.textContent = "no longer served";
  }
}

async function follow() {
  for (;;) {
    await new Promise((done) => setTimeout(done, EVERY));
    if (!document.hidden) await ask();
  }
}

data.runs.forEach(decode);
document.body.append(
  element(
    "header",
    {},
    element("h1", {}, data.title),
    ...(data.runs.length > 1 ? [] : [element("p", { class: "soft" }, data.runs[0].path)]),
  ),
  about,
  tools(),
  element("h2", { class: "hidden" }, "Charts"),
  mainCharts,
  rest,
  settings,
  samples,
  loud,
);
show();
if (data.live) {
  state.textContent = "live";
  follow();
}
