/**
 * Messages of the conversation: what the user said, and answers as they come.
 */

import { Answer } from "./answer.js";
import { ApiError } from "./api.js";
import { make } from "./element.js";
import { MixtureView, counted } from "./mixture_view.js";

/** @param {string} text */
export function userMessage(text) {
  return make("article", { class: "message user", "aria-label": "You" }, make("p", {}, text));
}

/** An answer: text at once, and its gates when it is whole. */
export class AnswerMessage {
  answer = new Answer();
  #look;
  #started = performance.now();
  #meta = make("span", { class: "quiet" });
  /** @type {{kind: string, text: Text}[]} the last is what text is added to */
  #blocks = [];

  /**
   * @param {string} model
   * @param {string} kind
   * @param {(name: string) => string} look an adapter's classes
   */
  constructor(model, kind, look) {
    this.#look = look;
    const header = make("header", {}, make("h3", {}, model), make("span", { class: "quiet" }, kind), this.#meta);
    this.body = make("div", {});
    /** @type {HTMLElement} */
    this.element = make(
      "article", { class: "message answer", "aria-label": `Answer of ${model}`, "aria-busy": "true" },
      header, this.body,
    );
  }

  /** @param {any} chunk of the stream */
  take(chunk) {
    for (const { kind, text } of this.answer.take(chunk)) {
      const last = this.#blocks.at(-1);
      if (last?.kind === kind) {
        last.text.appendData(text);
      } else {
        const node = document.createTextNode(text);
        this.#blocks.push({ kind, text: node });
        this.body.append(make("div", { class: `text ${kind}` }, node));
      }
    }
  }

  /**
   * The answer has ended: colour it.
   * @returns {string} what there is to tell in a sentence
   */
  end() {
    const seconds = (performance.now() - this.#started) / 1000;
    const { answer } = this;
    const count = answer.count ?? answer.tokens.length;
    this.#meta.textContent = `${counted(count, "token")} in ${seconds.toFixed(1)} s`;
    if (answer.finish === "length") this.#meta.append(" · ended by the limit of tokens");
    if (answer.mixture) {
      const view = new MixtureView(answer, answer.mixture, this.#look);
      if (view.blocks.length) this.body.replaceChildren(...view.blocks);
      this.element.append(view.element);
    }
    this.#close();
    return `The answer is complete: ${counted(count, "token")}.`;
  }

  /**
   * The answer has not come to its end.
   * @param {unknown} error
   * @param {boolean} stopped by the user
   * @returns {string} what there is to tell in a sentence
   */
  fail(error, stopped) {
    this.#close();
    if (stopped) {
      this.element.append(make("p", { class: "told quiet" }, "Stopped."));
      return "Stopped.";
    }
    const message = error instanceof Error ? error.message : String(error);
    const about = error instanceof ApiError ? [error.status || "", error.code].filter(Boolean).join(" ") : "";
    this.element.append(make("p", { class: "error" }, `${message} `, make("code", {}, about)));
    return `Refused: ${message}`;
  }

  #close() {
    this.element.removeAttribute("aria-busy");
  }
}
