/**
 * A text token by token, each in the colour of its strongest adapter. One tab stop; the arrow keys go on from there.
 */

import { align } from "./alignment.js";
import { make } from "./element.js";
import { inWords, level, strongest } from "./gates.js";

/** @typedef {import("./answer.js").Answer} Answer */
/** @typedef {import("./answer.js").Mixture} Mixture */

export class TokenText {
  /** @type {HTMLElement[]} one a token */
  spans = [];
  #index = new Map();
  #pointed = -1;
  #tell;

  /**
   * @param {Answer} answer
   * @param {Mixture} mixture with `token_gates`
   * @param {(name: string) => string} look an adapter's classes
   * @param {(token: number) => void} tell which token is pointed at; -1: none
   */
  constructor(answer, mixture, look, tell) {
    this.#tell = tell;
    const gates = mixture.token_gates ?? [];
    const ranges = align(answer.tokens, answer.text);
    const classes = mixture.adapters.map(look);
    this.spans = answer.tokens.map((text, i) => tokenSpan(text, gates[i] ?? [], mixture.adapters, classes));
    this.spans.forEach((span, i) => this.#index.set(span, i));
    if (this.spans.length) this.spans[0].tabIndex = 0;
    /** @type {HTMLElement[]} a block for each part of the answer */
    this.blocks = blocksOf(answer, ranges, this.spans);
    for (const block of this.blocks) this.#listen(block);
  }

  /** @param {number} token the one to mark; -1: none */
  point(token) {
    this.spans[this.#pointed]?.classList.remove("pointed");
    this.#pointed = token;
    this.spans[token]?.classList.add("pointed");
  }

  /** @param {number} token */
  focus(token) {
    const span = this.spans[token];
    if (span === undefined) return;
    for (const other of this.spans) other.tabIndex = other === span ? 0 : -1;
    span.focus();
  }

  /** @param {HTMLElement} block */
  #listen(block) {
    const tell = (/** @type {Event} */ event) => {
      const token = this.#index.get(event.target);
      if (token !== undefined) this.#tell(token);
    };
    block.addEventListener("pointerover", tell);
    block.addEventListener("focusin", tell);
    block.addEventListener("pointerleave", () => this.#tell(this.#index.get(document.activeElement) ?? -1));
    block.addEventListener("focusout", () => this.#tell(-1));
    block.addEventListener("click", (event) => {
      const token = this.#index.get(event.target);
      if (token !== undefined && getSelection()?.isCollapsed) this.focus(token);
    });
    block.addEventListener("keydown", (event) => this.#move(event));
  }

  /** @param {KeyboardEvent} event */
  #move(event) {
    const at = this.#index.get(event.target);
    if (at === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    const last = this.spans.length - 1;
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.focus(Math.min(last, Math.max(0, to)));
  }
}

/**
 * @param {string} text
 * @param {number[]} gates
 * @param {string[]} adapters
 * @param {string[]} classes
 * @returns {HTMLElement}
 */
function tokenSpan(text, gates, adapters, classes) {
  const best = strongest(gates);
  const span = make("span", { class: "token", tabindex: -1 });
  if (best >= 0) {
    span.className = `token hued ${classes[best]} level-${level(gates)}`;
    span.dataset.adapter = adapters[best];
    span.setAttribute("aria-description", inWords(adapters, gates));
  }
  span.dataset.text = text;
  return span;
}

/**
 * The answer's text in blocks, its tokens' spans in them.
 * @param {Answer} answer
 * @param {[number, number][]} ranges
 * @param {HTMLElement[]} spans
 */
function blocksOf(answer, ranges, spans) {
  const blocks = [];
  let start = 0; // of the block in the whole text
  let next = 0; // token
  for (const [number, part] of answer.parts.entries()) {
    const end = start + part.text.length;
    const block = make("div", { class: `text ${part.kind}` });
    const isLast = number === answer.parts.length - 1;
    let at = start;
    for (; next < spans.length && (isLast || ranges[next][0] < end); next++) {
      const from = Math.max(ranges[next][0], at);
      const to = Math.min(ranges[next][1], end);
      if (from > at) block.append(part.text.slice(at - start, from - start));
      const shown = to > from ? part.text.slice(from - start, to - start) : "";
      fill(spans[next], shown);
      block.append(spans[next]);
      at = Math.max(at, to);
    }
    if (at < end) block.append(part.text.slice(at - start));
    blocks.push(block);
    start = end;
  }
  return blocks;
}

/**
 * @param {HTMLElement} span
 * @param {string} shown
 */
function fill(span, shown) {
  span.append(shown);
  if (shown === "") {
    span.classList.add("unseen"); // not in the text, and has gates all the same
    if (span.dataset.text === "" || span.dataset.text?.trim() === "") span.dataset.text = "·";
  } else if (/^\s*\n/.test(shown)) {
    span.classList.add("newline");
  }
}
