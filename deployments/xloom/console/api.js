/**
 * The endpoint's API, with the user's key.
 */

import { eventsOf } from "./events.js";

/** What the endpoint refuses, or why it can't be asked. */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {string} code stable, of docs/errors.md; empty where the endpoint gave none
   * @param {number} status of HTTP; 0: no answer, or an error inside of a stream
   */
  constructor(message, code = "", status = 0) {
    super(message);
    this.code = code;
    this.status = status;
  }
}

/**
 * @typedef {object} Model
 * @property {string} id
 * @property {string} kind "base", "lora", or a mixture's: "xlora", "arrow", "fixed", "linear"
 * @property {string[]} [adapters] of a mixture
 */

export class Api {
  #base = document.baseURI;
  #key;

  /** @param {() => string} key the user's, or an empty text */
  constructor(key) {
    this.#key = key;
  }

  /** @returns {Promise<Model[]>} */
  async models() {
    return (await this.#json("v1/models")).data;
  }

  /** @returns {Promise<any>} what `/xloom/status` answers */
  async status() {
    return this.#json("xloom/status");
  }

  /**
   * The chunks of a streamed chat completion. Throws `ApiError`, and an `AbortError` after `signal`.
   * @param {object} body
   * @param {AbortSignal} signal
   * @returns {AsyncGenerator<any>}
   */
  async *chat(body, signal) {
    const response = await this.#send("v1/chat/completions", {
      method: "POST",
      body: JSON.stringify(body),
      headers: { "Content-Type": "application/json" },
      signal,
    });
    if (response.body === null) throw new ApiError("The endpoint sent no stream.");
    let whole = false;
    for await (const data of eventsOf(response.body)) {
      whole ||= data === "[DONE]";
      if (whole) continue; // to the end of the body, so that the connection is kept
      const chunk = JSON.parse(data);
      if (chunk.error) throw errorOf(chunk, 0);
      yield chunk;
    }
    if (!whole) throw new ApiError("The stream broke off before its end.");
  }

  /** @param {string} path */
  async #json(path) {
    return (await this.#send(path, {})).json();
  }

  /**
   * @param {string} path below the page's own folder, so that it works behind a proxy's prefix
   * @param {RequestInit} options
   */
  async #send(path, options) {
    const key = this.#key();
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    let response;
    try {
      response = await fetch(new URL(path, this.#base), { cache: "no-store", ...options, headers });
    } catch (error) {
      if (options.signal?.aborted) throw error;
      throw new ApiError("The endpoint can't be reached.");
    }
    if (!response.ok) throw errorOf(await response.json().catch(() => null), response.status);
    return response;
  }
}

/**
 * An error of OpenAI's shape, as far as it has it.
 * @param {any} answer
 * @param {number} status
 */
function errorOf(answer, status) {
  const error = answer?.error ?? {};
  const said = typeof error.message === "string" && error.message;
  const message = said || `The endpoint answered ${status}.`;
  return new ApiError(message, typeof error.code === "string" ? error.code : "", status);
}
