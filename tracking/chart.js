// One chart: its lines, and what a pointer or the keyboard does in it. Nothing here knows of the page.

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { left: 52, right: 12, top: 12, bottom: 24 };

// An element with attributes and children; texts become text, never markup.
function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function drawn(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(made, { color, ...attributes }, children) {
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined) made.setAttribute(name, value);
  if (color) made.style.setProperty("--color", color);
  made.append(...children);
  return made;
}

// --------------------------------------------------------------------------------------------------------------- chart

class Chart {
  // kind: {title, unit, write, height, stack}; lines: () => [{name, color, dashed, dots, points}] of those to be shown;
  // view: {from, to, cursor, smoothing, logX} of the whole page; told: {zoom(from, to), cursor(step, chart, loud)}.
  constructor(kind, lines, view, told) {
    Object.assign(this, { kind, lines, view, told, logY: false, drag: null });
    this.clip = `clip${Chart.count++}`;
    this.svg = drawn("svg", {
      tabindex: 0,
      role: "group",
      "aria-label": `${kind.title} by step. Left and right read values, plus and minus zoom, Escape shows all.`,
    });
    this.reading = element("ul", { class: "reading" });
    this.why = element("p", { class: "why", hidden: "" });
    const head = element("h3", {}, kind.title, ...(kind.unit ? [element("small", {}, kind.unit)] : []));
    this.node = element(
      "section",
      { class: kind.first ? "chart first" : "chart", "data-chart": kind.title },
      element("div", { class: "top" }, head),
      this.svg,
      this.reading,
      this.why,
    );
    if (!kind.stack) this.node.firstChild.append(this.logButton());
    this.node.style.setProperty("--height", `${kind.height || 200}px`);
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  logButton() {
    const button = element(
      "button",
      { type: "button", "aria-pressed": "false", "aria-label": `log axis of ${this.kind.title}` },
      "log",
    );
    button.addEventListener("click", () => {
      this.logY = !this.logY;
      button.setAttribute("aria-pressed", this.logY);
      this.draw();
    });
    return button;
  }

  draw() {
    this.shown = this.lines();
    this.node.hidden = !this.shown.length;
    const width = this.svg.clientWidth,
      height = this.svg.clientHeight;
    if (!width) return; // folded away, or nothing to show
    this.x = scale(this.view.from, this.view.to, MARGIN.left, width - MARGIN.right, this.view.logX);
    const [low, high] = this.extent();
    this.y = scale(low, high, height - MARGIN.bottom, MARGIN.top, this.logY && !this.nothingPositive);
    const [right, bottom] = [width - MARGIN.right, height - MARGIN.bottom];
    const box = { x: MARGIN.left - 4, y: 0, width: right - MARGIN.left + 8, height: bottom + 1 };
    const body = drawn("g", { "clip-path": `url(#${this.clip})` });
    const lines = this.kind.stack ? [] : this.shown.map((line) => this.paths(line)); // what is smoothed lies below
    body.append(
      ...(this.kind.stack ? this.areas() : [...lines.flatMap(([raw]) => raw), ...lines.flatMap(([, over]) => over)]),
    );
    this.over = drawn("g");
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren(
      drawn("clipPath", { id: this.clip }, drawn("rect", box)),
      ...this.axes(width, right, bottom),
      body,
      this.over,
    );
    this.explain();
    this.point();
  }

  // The least and the greatest value to be seen, with some air.
  extent() {
    if (this.kind.stack) return [0, 1];
    let low = Infinity,
      high = -Infinity,
      positive = false;
    for (const { points } of this.shown) {
      for (const value of within(points, this.view.from, this.view.to)) {
        positive ||= value > 0 && Number.isFinite(value);
        if (!Number.isFinite(value) || (this.logY && value <= 0)) continue;
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
    }
    this.nothingPositive = this.logY && !positive;
    if (low > high) return this.logY ? [0.1, 1] : [0, 1];
    if (low === high) return low === 0 ? [0, 1] : low > 0 ? [low * 0.9, high * 1.1] : [low - 1, high + 1];
    if (this.logY) return [low / (high / low) ** 0.04, high * (high / low) ** 0.04];
    const air = (high - low) * 0.04;
    return [low >= 0 && low < 2 * air ? 0 : low - air, high + air];
  }

  axes(width, right, bottom) {
    const found = [],
      write = this.kind.write || number;
    const add = (x1, y1, x2, y2, x, y, anchor, text) =>
      found.push(
        drawn("line", { class: "grid", x1, y1, x2, y2 }),
        drawn("text", { x, y, "text-anchor": anchor }, text),
      );
    for (const value of this.y.ticks((bottom - MARGIN.top) / 40)) {
      const y = this.y(value);
      add(MARGIN.left, y, right, y, MARGIN.left - 6, y + 4, "end", short(write(value, 3)));
    }
    for (const value of this.x.ticks((right - MARGIN.left) / 80, true)) {
      const x = this.x(value),
        anchor = x > right - 16 ? "end" : "middle";
      add(
        x,
        bottom,
        x,
        bottom + 4,
        anchor === "end" ? right : x,
        bottom + 17,
        anchor,
        value < 1e4 ? String(value) : short(number(value, 6)),
      );
    }
    found.push(drawn("line", { class: "grid", x1: MARGIN.left, x2: right, y1: bottom, y2: bottom }));
    return found;
  }

  // Where the axes can show it: the line, or what is smoothed; and above: the smoothed line, dots, crosses for what is
  // not finite.
  paths({ points, color, dashed, dots }) {
    const { smoothing } = this.view,
      style = dashed ? "line dashed" : "line",
      raw = this.path(points);
    const below = [drawn("path", { class: smoothing ? `${style} raw` : style, color, d: raw.text })],
      above = [];
    if (smoothing) {
      const mean = points.mean
        ? smoothed(points.mean_step, points.mean, smoothing)
        : smoothed(points.step, points.value, smoothing);
      above.push(drawn("path", { class: style, color, d: this.path(mean).text }));
    }
    const seen = dots && raw.seen.length <= 200 ? raw.seen : raw.alone;
    above.push(...seen.map(([x, y]) => drawn("circle", { class: "dot", color, cx: x, cy: y, r: dots ? 2.6 : 2 })));
    above.push(...raw.odd.map((x) => drawn("path", { class: "odd", color, d: `M${x - 4},2l8,8m-8,0l8,-8` })));
    return [below, above];
  }

  // The SVG path of points around the range; a value that the axes cannot show breaks it.
  path({ step, value }) {
    const begin = Math.max(0, place(step, this.view.from) - 1),
      end = Math.min(step.length, place(step, this.view.to + 1e-9) + 1);
    const found = { text: "", seen: [], alone: [], odd: [] };
    let open = 0;
    const close = () => {
      if (open === 1) found.alone.push(found.seen.at(-1));
    };
    const parts = [];
    for (let i = begin; i < end; i++) {
      if (!this.x.holds(step[i])) continue;
      const x = this.x(step[i]).toFixed(1);
      if (!this.y.holds(value[i])) {
        if (!Number.isFinite(value[i])) found.odd.push(Number(x));
        close();
        open = 0;
        continue;
      }
      const y = this.y(value[i]).toFixed(1);
      parts.push(`${open ? "L" : "M"}${x},${y}`);
      found.seen.push([x, y]);
      open++;
    }
    close();
    found.text = parts.join("");
    return found;
  }

  // Shares on top of each other: each part of the sum of all at a step.
  areas() {
    const means = this.shown.map(({ points }) => points.mean || points.value),
      steps = this.stackSteps();
    const base = steps.map(() => 0),
      total = steps.map((_, i) => means.reduce((sum, part) => sum + (part[i] || 0), 0));
    return this.shown.map((line, place) => {
      const low = base.map((value, i) => [steps[i], value]);
      steps.forEach((_, i) => (base[i] += total[i] > 0 ? (means[place][i] || 0) / total[i] : 0));
      const outline = [...base.map((value, i) => [steps[i], value]), ...low.reverse()].filter(([step]) =>
        this.x.holds(step),
      );
      const text = outline
        .map(([step, value], i) => `${i ? "L" : "M"}${this.x(step).toFixed(1)},${this.y(value).toFixed(1)}`)
        .join("");
      return drawn("path", { class: "area", color: line.color, d: text && `${text}Z` });
    });
  }

  stackSteps() {
    const first = this.shown[0].points;
    return first.mean ? first.mean_step : first.step;
  }

  explain() {
    const missing = this.logY && this.shown.some(({ points }) => points.value.some((value) => value <= 0));
    const odd = this.shown.some(({ points }) => points.value.some((value) => !Number.isFinite(value)));
    const words = [];
    if (this.nothingPositive) words.push("No value here is above 0: the axis stays linear.");
    else if (missing) words.push("Values of 0 and below have no place on a log axis.");
    if (odd && !this.kind.stack) words.push("A cross at the top is a value that is not finite.");
    this.why.textContent = words.join(" ");
    this.why.hidden = !words.length;
  }

  // ------------------------------------------------------------------------------------------------------- reading

  // What a line has at the cursor's step, or before it; without a cursor its last.
  value(line, order) {
    const { cursor } = this.view;
    const steps = this.kind.stack ? this.stackSteps() : line.points.step;
    let i = cursor === null ? steps.length - 1 : place(steps, cursor + 0.5) - 1;
    if (i < 0 || (cursor !== null && cursor > line.points.step.at(-1) && cursor > line.last)) return null;
    if (!this.kind.stack) return { step: steps[i], value: line.points.value[i] };
    const parts = this.shown.map(({ points }) => (points.mean || points.value)[i] || 0);
    return { step: steps[i], value: parts[order] / (parts.reduce((sum, part) => sum + part, 0) || 1) };
  }

  // Draws the cursor and writes the values below the chart. Returns them as a sentence.
  point() {
    if (!this.over || !this.shown.length) return "";
    const { cursor } = this.view,
      write = this.kind.write || number,
      said = [],
      marks = [];
    const items = this.shown.map((line, order) => {
      const found = this.value(line, order);
      const late = found && cursor !== null && found.step !== cursor ? ` at ${whole(found.step)}` : "";
      const text = found ? write(found.value, 5) + late : "–";
      said.push(`${line.name} ${text}`);
      if (found && cursor !== null && !this.kind.stack && this.y.holds(found.value) && this.x.holds(found.step))
        marks.push(
          drawn("circle", {
            class: "mark",
            color: line.color,
            cx: this.x(found.step),
            cy: this.y(found.value),
            r: 4,
            "clip-path": `url(#${this.clip})`,
          }),
        );
      return element(
        "li",
        { title: `${line.name} ${text}` },
        element("span", { class: line.dashed ? "swatch dashed" : "swatch", color: line.color }),
        element("span", { class: "name" }, line.name),
        element("b", {}, text),
      );
    });
    const label = cursor === null ? "last" : `step ${whole(cursor)}`;
    this.reading.replaceChildren(element("li", {}, element("b", {}, label)), ...items);
    const x = cursor !== null && this.x.holds(cursor) ? this.x(cursor) : NaN;
    const seen = x >= MARGIN.left - 0.5 && x <= this.svg.clientWidth - MARGIN.right + 0.5;
    const bar = seen
      ? [drawn("line", { class: "cursor", x1: x, x2: x, y1: 0, y2: this.svg.clientHeight - MARGIN.bottom })]
      : [];
    this.over.replaceChildren(...bar, ...marks, ...this.selection());
    return `${this.kind.title}, ${label}: ${said.join(", ")}`;
  }

  selection() {
    if (!this.drag || Math.abs(this.drag.to - this.drag.from) < 5) return [];
    const [from, to] = [this.drag.from, this.drag.to].sort((a, b) => a - b);
    return [
      drawn("rect", {
        class: "chosen",
        x: from,
        width: to - from,
        y: 0,
        height: this.svg.clientHeight - MARGIN.bottom,
      }),
    ];
  }

  // The measured step nearest to a place in the chart.
  nearest(pixel) {
    let best = null,
      far = Infinity;
    for (const { points } of this.shown) {
      const i = place(points.step, this.x.back(pixel));
      for (const step of [points.step[i - 1], points.step[i]]) {
        const away = step === undefined || !this.x.holds(step) ? Infinity : Math.abs(this.x(step) - pixel);
        if (away < far) [best, far] = [step, away];
      }
    }
    return best;
  }

  // The next measured step after (by: 1) or before (by: -1) the cursor.
  next(by) {
    const { cursor, from, to } = this.view,
      at = cursor === null ? (by > 0 ? from - 1 : to + 1) : cursor;
    const steps = this.shown.map(
      ({ points: { step } }) => step[by > 0 ? place(step, at + 0.5) : place(step, at - 0.5) - 1],
    );
    const there = steps.filter((step) => step !== undefined && step >= from && step <= to);
    return there.length ? Math[by > 0 ? "min" : "max"](...there) : cursor;
  }

  // ------------------------------------------------------------------------------------------------------ listening

  listen() {
    const at = (event) => {
      const box = this.svg.getBoundingClientRect();
      return Math.min(Math.max(event.clientX - box.left, MARGIN.left), box.width - MARGIN.right);
    };
    const on = (name, does) => this.svg.addEventListener(name, (event) => this.x && this.shown.length && does(event));
    on("pointerdown", (event) => {
      if (event.button !== 0) return;
      this.svg.setPointerCapture(event.pointerId);
      this.drag = { from: at(event), to: at(event) };
      this.told.cursor(this.nearest(at(event)), this);
    });
    on("pointermove", (event) => {
      if (this.drag) this.drag.to = at(event);
      this.told.cursor(this.nearest(at(event)), this);
    });
    on("pointerup", () => {
      const { from, to } = this.drag || { from: 0, to: 0 };
      this.drag = null;
      if (Math.abs(to - from) >= 5) this.told.zoom(...[this.x.back(from), this.x.back(to)].sort((a, b) => a - b));
      else this.point();
    });
    on("pointercancel", () => {
      this.drag = null;
      this.point();
    });
    on("pointerleave", (event) => {
      if (event.pointerType !== "touch" && !this.drag) this.told.cursor(null, this);
    });
    on("dblclick", () => this.told.zoom(null, null));
    on("keydown", (event) => this.key(event));
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { from, to, cursor } = this.view,
      middle = cursor ?? (from + to) / 2;
    const around = (factor) => this.told.zoom(middle - (middle - from) * factor, middle + (to - middle) * factor);
    const does = {
      ArrowLeft: () => this.told.cursor(this.next(-1), this, true),
      ArrowRight: () => this.told.cursor(this.next(1), this, true),
      Home: () => this.told.cursor(this.nearest(MARGIN.left), this, true),
      End: () => this.told.cursor(this.nearest(this.svg.clientWidth - MARGIN.right), this, true),
      "+": () => around(0.5),
      "=": () => around(0.5),
      "-": () => around(2),
      Escape: () => this.told.zoom(null, null),
    }[event.key];
    if (!does) return;
    event.preventDefault();
    does();
  }
}
Chart.count = 0;
