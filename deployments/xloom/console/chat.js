/**
 * The conversation: one request at a time, its answer streamed.
 */

import { byId } from "./element.js";
import { AnswerMessage, userMessage } from "./message.js";
import { isMixture } from "./models.js";

/** @typedef {import("./api.js").Api} Api */
/** @typedef {import("./api.js").Model} Model */

const NEAR = 60; // CSS pixels of an answer's end that may be out of view, and it still counts as in view

export class Chat {
  #api;
  #look;
  #request;
  #ended;
  #box = byId("conversation");
  #composer = byId("composer");
  #prompt = byId("prompt");
  #send = byId("send");
  #stop = byId("stop");
  /** @type {{role: string, content: string}[]} */
  #turns = [];
  /** @type {AbortController | null} */
  #running = null;
  #ready = false;

  /**
   * @param {Api} api
   * @param {(name: string) => string} look an adapter's classes
   * @param {() => {model: Model | undefined, options: object, weights: Record<string, number> | undefined,
   *   system: string}} request what the user has set
   * @param {() => void} ended told after each answer
   */
  constructor(api, look, request, ended) {
    this.#api = api;
    this.#look = look;
    this.#request = request;
    this.#ended = ended;
    this.#composer.addEventListener("submit", (/** @type {Event} */ event) => {
      event.preventDefault();
      this.#ask();
    });
    this.#prompt.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#ask();
    });
    this.#stop.addEventListener("click", () => this.#running?.abort());
    byId("clear").addEventListener("click", () => {
      this.#clear();
      this.#prompt.focus();
    });
    this.#clear();
  }

  /** @param {boolean} ready whether there is a model to ask */
  set ready(ready) {
    this.#ready = ready;
    this.#show();
  }

  #show() {
    this.#send.hidden = this.#running !== null;
    this.#stop.hidden = this.#running === null;
    this.#send.disabled = !this.#ready;
  }

  #clear() {
    this.#running?.abort();
    this.#turns = [];
    this.#box.replaceChildren(byId("welcome").content.cloneNode(true));
  }

  async #ask() {
    const text = this.#prompt.value.trim();
    const { model, options, weights, system } = this.#request();
    if (!text || model === undefined || this.#running) return;
    const turns = this.#turns;
    turns.push({ role: "user", content: text });
    const gated = isMixture(model.kind) || weights !== undefined;
    const body = {
      model: model.id,
      messages: [...(system ? [{ role: "system", content: system }] : []), ...turns],
      stream: true,
      stream_options: { include_usage: true },
      ...options,
      ...(gated ? { logprobs: true, return_mixture: "tokens" } : {}), // log-probabilities name each token's text
      ...(weights ? { mixture: weights } : {}),
    };
    const message = new AnswerMessage(model.id, weights ? "weights of the request" : model.kind, this.#look);
    this.#box.querySelector(".welcome")?.remove();
    this.#box.append(userMessage(text), message.element);
    this.#prompt.value = "";
    message.element.scrollIntoView({ block: "end" });
    const running = (this.#running = new AbortController());
    const hadFocus = document.activeElement === this.#send;
    this.#show();
    if (hadFocus) this.#stop.focus();
    const told = await this.#stream(message, body, running.signal);
    turns.push({ role: "assistant", content: message.answer.content });
    if (!message.answer.content) turns.splice(-2); // nothing came of it: it is no part of the conversation
    if (this.#running === running) {
      this.#running = null;
      const stopHadFocus = document.activeElement === this.#stop;
      this.#show();
      if (stopHadFocus) this.#prompt.focus();
    }
    byId("announcer").textContent = told;
    this.#ended();
  }

  /**
   * @param {AnswerMessage} message
   * @param {object} body
   * @param {AbortSignal} signal
   */
  async #stream(message, body, signal) {
    let told;
    try {
      for await (const chunk of this.#api.chat(body, signal)) this.#keepInView(() => message.take(chunk));
      this.#keepInView(() => (told = message.end()));
    } catch (error) {
      this.#keepInView(() => (told = message.fail(error, signal.aborted)));
    }
    return told ?? "";
  }

  /**
   * Change the conversation, and keep its end in view if it was.
   * @param {() => void} change
   */
  #keepInView(change) {
    const last = this.#box.lastElementChild;
    const inView = last && last.getBoundingClientRect().bottom < this.#composer.getBoundingClientRect().top + NEAR;
    change();
    if (inView) last.scrollIntoView({ block: "end" });
  }
}
