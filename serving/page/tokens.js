// Tokens of an answer as they stream in: each a span that knows its probability, and the box that tells of it.

const tip = document.getElementById("tip");
const said = document.getElementById("said");
const told = new WeakMap(); // span -> {token, logprob, top: [{token, logprob}]}

export const element = (name, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
};

// Of chat: {token, logprob, bytes, top_logprobs}. Of completions: parallel lists, bytes written as "bytes:\xe2\x82".
export function tokensOf(logprobs) {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((one) => ({ ...one, top: one.top_logprobs, bytes: one.bytes ?? encode(one.token) }));
  }
  return (logprobs.tokens ?? []).map((token, i) => ({
    token,
    logprob: logprobs.token_logprobs[i],
    top: Object.entries(logprobs.top_logprobs?.[i] ?? {}).map(([token, logprob]) => ({ token, logprob })),
    bytes: encode(token),
  }));
}

function encode(token) {
  const hex = /^bytes:((?:\\x[0-9a-f]{2})+)$/.exec(token);
  return hex ? hex[1].slice(2).split("\\x").map((byte) => parseInt(byte, 16)) : [...new TextEncoder().encode(token)];
}

// Writes a text into a node. A token's text may come later than the token (half a character, what may become a stop
// string), or never (a stop string): what is shown is the text, and tokens are laid over it in order.
export class Writer {
  constructor(node) {
    this.node = node;
    this.text = "";
    this.count = 0;
    this.waiting = []; // tokens with text that has not come
    this.decoder = new TextDecoder();
  }

  push(text, tokens) {
    for (const one of tokens) {
      this.waiting.push({ ...one, text: this.decoder.decode(new Uint8Array(one.bytes), { stream: true }) });
    }
    this.text += text;
    while (text) {
      const next = this.waiting.findIndex((one) => one.text && (text.startsWith(one.text) || one.text.startsWith(text)));
      const one = this.waiting[next];
      if (!one) {
        this.node.append(text);
        return;
      }
      const length = Math.min(one.text.length, text.length);
      this.span(text.slice(0, length), one);
      text = text.slice(length);
      if (length < one.text.length) {
        this.waiting.splice(0, next);
        one.text = one.text.slice(length);
      } else {
        this.waiting.splice(0, next + 1);
      }
    }
  }

  span(text, one) {
    const start = text.trim() ? text.length - text.trimStart().length : 0; // the space before a word stays uncoloured
    const word = element("span", { className: `word t${shade(one.logprob)}`, textContent: text.slice(start) });
    const node = element("span", { className: "token" }, text.slice(0, start), word);
    told.set(node, one);
    this.node.append(node);
    this.count += 1;
  }
}

// 0: at least even odds; 3: less than one in a hundred
const shade = (logprob) => (logprob == null ? 0 : [Math.log(0.5), Math.log(0.1), Math.log(0.01)].filter((x) => logprob < x).length);

const visible = (token) => token.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return share >= 10 ? `${share.toFixed(0)}%` : share >= 0.1 ? `${share.toFixed(1)}%` : "<0.1%";
};

function show(span) {
  const one = told.get(span);
  const rows = one.top.some((other) => other.token === one.token) ? one.top : [...one.top, one];
  tip.replaceChildren(
    element("p", { className: "chosen" }, element("b", { textContent: visible(one.token) }), ` ${percent(one.logprob)}`),
    ...rows.map((other) => {
      const bar = element("i");
      bar.style.setProperty("--share", Math.exp(other.logprob));
      const row = element("p", { className: other.token === one.token ? "row mine" : "row" });
      row.append(element("span", { textContent: visible(other.token) }), bar, element("em", { textContent: percent(other.logprob) }));
      return row;
    }),
  );
  tip.hidden = false;
  const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  const above = at.top - height - 8;
  tip.style.left = `${Math.max(8, Math.min(innerWidth - width - 8, at.left + at.width / 2 - width / 2))}px`;
  tip.style.top = `${above > 8 ? above : at.bottom + 8}px`;
  current?.classList.remove("current");
  current = span;
  span.classList.add("current");
}

let current = null;
export function hide() {
  tip.hidden = true;
  current?.classList.remove("current");
  current = null;
}

// One set of listeners for all answers in a node.
export function watch(node) {
  const tokenAt = (target) => (target instanceof Element ? target.closest(".token") : null);
  node.addEventListener("pointerover", (event) => {
    const span = tokenAt(event.target);
    if (span && told.has(span)) show(span);
    else if (event.pointerType === "mouse") hide();
  });
  node.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
  document.addEventListener("pointerdown", (event) => tokenAt(event.target) || hide());
  document.addEventListener("scroll", hide, { capture: true, passive: true });
  node.addEventListener("focusout", hide);
  node.addEventListener("keydown", (event) => {
    if (!event.target.classList.contains("answer")) return;
    const spans = [...event.target.querySelectorAll(".token")];
    const here = spans.indexOf(current);
    const to = { ArrowRight: here + 1, ArrowLeft: here < 0 ? spans.length - 1 : here - 1, Home: 0, End: spans.length - 1 }[event.key];
    if (event.key === "Escape") hide();
    if (to === undefined || !spans.length) return;
    event.preventDefault();
    const span = spans[Math.max(0, Math.min(spans.length - 1, to))];
    span.scrollIntoView({ block: "nearest" });
    requestAnimationFrame(() => show(span)); // after the scrolling that would hide it
    said.textContent = `${told.get(span).token}: ${percent(told.get(span).logprob)}`;
  });
}
