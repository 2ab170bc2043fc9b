/**
 * What a mixture did in one answer: coloured tokens, the readout, the strip, and all of it as a table.
 */

import { make } from "./element.js";
import { inWords, strongest, written } from "./gates.js";
import { Readout } from "./readout.js";
import { Strip } from "./strip.js";
import { TokenText } from "./tokens.js";

/** @typedef {import("./answer.js").Answer} Answer */
/** @typedef {import("./answer.js").Mixture} Mixture */

export class MixtureView {
  #mixture;
  #gates;
  #answer;
  #readout;
  /** @type {Strip | null} */
  #strip = null;
  /** @type {TokenText | null} */
  #text = null;

  /**
   * @param {Answer} answer
   * @param {Mixture} mixture the answer's
   * @param {(name: string) => string} look an adapter's classes
   */
  constructor(answer, mixture, look) {
    this.#answer = answer;
    this.#mixture = mixture;
    this.#gates = mixture.token_gates ?? [];
    const { adapters } = mixture;
    const classes = adapters.map(look);
    const largest = [...this.#gates.flat(), ...this.#mean].reduce((most, gate) => Math.max(most, Math.abs(gate)), 0);
    this.#readout = new Readout(adapters, classes, largest);
    /** @type {HTMLElement} */
    this.element = make("section", { class: "gates", "aria-label": `Gates of ${mixture.name}` });
    if (this.#gates.length) {
      this.#text = new TokenText(answer, mixture, look, (token) => this.#point(token));
      const label = `Gates over ${this.#gates.length} tokens. Mean: ${inWords(adapters, this.#mean)}.`;
      const pick = (/** @type {number} */ token) => this.#text?.focus(token);
      this.#strip = new Strip(this.#gates, classes, label, { over: (token) => this.#point(token), pick });
      this.#readout.element.prepend(this.#strip.element);
    }
    this.element.append(this.#readout.element, make("p", { class: "quiet" }, ofPrompt(mixture)));
    if (this.#gates.length) this.element.append(this.#table());
    this.#point(-1);
  }

  /** The answer's text, a block for each part of it; empty where tokens have no gates. */
  get blocks() {
    return this.#text?.blocks ?? [];
  }

  get #mean() {
    return this.#mixture.adapters.map((name) => this.#mixture.gates[name] ?? 0);
  }

  /** @param {number} token -1: none, so the mean is shown */
  #point(token) {
    this.#text?.point(token);
    this.#strip?.point(token);
    const gates = this.#gates[token];
    if (gates === undefined) {
      this.#readout.show([`Mean over ${counted(this.#mixture.tokens, "token")}`], this.#mean);
    } else {
      const text = make("code", {}, visible(this.#answer.tokens[token] ?? ""));
      this.#readout.show([`Token ${token + 1} of ${this.#gates.length} `, text], gates);
    }
  }

  /** A table of all gates, made when it is opened. */
  #table() {
    const { adapters } = this.#mixture;
    const box = make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Gates of each token" });
    const details = make("details", {}, make("summary", {}, "Gates as a table"), box);
    details.addEventListener("toggle", () => {
      if (!details.open || box.firstChild) return;
      const head = ["Token", ...adapters].map((name) => make("th", { scope: "col" }, name));
      const rows = this.#gates.map((gates, i) => {
        const best = strongest(gates);
        const text = make("code", {}, visible(this.#answer.tokens[i] ?? ""));
        const cells = gates.map((gate, k) => make("td", { class: k === best && "strongest" }, written(gate)));
        return make("tr", {}, make("th", { scope: "row" }, `${i + 1} `, text), ...cells);
      });
      box.append(make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)));
    });
    return details;
  }
}

/** @param {Mixture} mixture */
function ofPrompt({ adapters, prompt_gates: gates, prompt_tokens: computed, cached_prompt_tokens: cached }) {
  const mean = gates && inWords(adapters, adapters.map((name) => gates[name] ?? 0));
  const known = mean ? `Prompt, mean over ${counted(computed, "token")}: ${mean}.` : "";
  const rest = cached > 0 ? `${counted(cached, "token")} of the prompt came from the prefix cache, without gates.` : "";
  return `${known} ${rest}`.trim();
}

/** @param {string} token white space and nothing made visible */
function visible(token) {
  if (token === "") return "(part of a character)";
  return token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}

/**
 * @param {number} count
 * @param {string} noun
 */
export function counted(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}
