/**
 * Server-sent events of a stream:
 * https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
 */

/** Takes text as it comes, cut anywhere, and gives the data of the events that are whole. */
export class EventParser {
  #rest = "";
  /** @type {string[]} */
  #data = [];

  /**
   * @param {string} text
   * @returns {string[]} data of the events that end in it
   */
  push(text) {
    const whole = [];
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/); // the last \r may be half of \r\n
    this.#rest = lines.pop() ?? "";
    for (const line of lines) {
      if (line === "" && this.#data.length > 0) {
        whole.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line.startsWith("data:")) {
        this.#data.push(line.slice(5).replace(/^ /, ""));
      }
    }
    return whole;
  }
}

/**
 * The data of each event of a response's body.
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<string>}
 */
export async function* eventsOf(body) {
  const parser = new EventParser();
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      yield* parser.push(value);
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever leaves early wants no more of it
  }
}
