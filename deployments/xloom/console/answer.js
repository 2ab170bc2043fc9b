/**
 * One streamed answer as it grows: its text, its tokens, and in the end its gates.
 */

/**
 * @typedef {object} Mixture What an answer says of the mixture it is of.
 * @property {string} name
 * @property {string} routing
 * @property {string[]} adapters
 * @property {Record<string, number>} gates mean over the answer's tokens
 * @property {Record<string, number> | null} prompt_gates
 * @property {number} tokens
 * @property {number} prompt_tokens that were computed; `prompt_gates` is their mean
 * @property {number} cached_prompt_tokens that came from the prefix cache, and have no gates
 * @property {number[][]} [token_gates] [token][adapter]
 */

/** @typedef {{kind: "reasoning" | "content", text: string}} Part */

export class Answer {
  /** @type {Part[]} in the order in which they came */
  parts = [];
  /** @type {string[]} texts of the tokens */
  tokens = [];
  /** @type {Mixture | null} */
  mixture = null;
  /** @type {string | null} */
  finish = null;
  /** @type {number | null} tokens generated */
  count = null;

  /** All text, in the order in which it came. */
  get text() {
    return this.parts.map((part) => part.text).join("");
  }

  /** What counts as the model's turn in the conversation. */
  get content() {
    return this.parts.filter((part) => part.kind === "content").map((part) => part.text).join("");
  }

  /**
   * Take a chunk of a chat completion.
   * @param {any} chunk
   * @returns {Part[]} the text it brought
   */
  take(chunk) {
    if (chunk.usage) this.count = chunk.usage.completion_tokens;
    const choice = chunk.choices?.[0];
    if (choice === undefined) return [];
    for (const token of choice.logprobs?.content ?? []) this.tokens.push(token.token);
    this.mixture = choice.mixture ?? this.mixture;
    this.finish = choice.finish_reason ?? this.finish;
    const delta = choice.delta ?? {};
    /** @type {Part[]} */
    const brought = [];
    const reasoning = delta.reasoning ?? delta.reasoning_content;
    if (reasoning) brought.push({ kind: "reasoning", text: reasoning });
    if (delta.content) brought.push({ kind: "content", text: delta.content });
    for (const { kind, text } of brought) {
      const last = this.parts.at(-1);
      if (last?.kind === kind) last.text += text;
      else this.parts.push({ kind, text });
    }
    return brought;
  }
}
