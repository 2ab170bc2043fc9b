/**
 * The strip: gates over tokens, as stacked areas. For the eye and the pointer; the tokens are for the keyboard.
 */

import { makeSvg } from "./element.js";
import { areas } from "./gates.js";

const WIDEST = 18; // CSS pixels of one token

export class Strip {
  #cursor;
  #count;

  /**
   * @param {number[][]} tokens [token][adapter]
   * @param {string[]} classes of the adapters
   * @param {string} label what it shows, in words
   * @param {{over: (token: number) => void, pick: (token: number) => void}} tell over -1: the pointer has left
   */
  constructor(tokens, classes, label, tell) {
    this.#count = tokens.length;
    const { paths, top, bottom } = areas(tokens, classes.length);
    const height = top - bottom || 1;
    this.#cursor = makeSvg("rect", { class: "cursor", y: 0, width: 1, height, visibility: "hidden" });
    /** @type {SVGSVGElement} */
    this.element = makeSvg(
      "svg",
      {
        class: "strip", role: "img", "aria-label": label, preserveAspectRatio: "none",
        viewBox: `0 0 ${this.#count} ${height}`, width: this.#count * WIDEST,
      },
      ...paths.map((d, i) => makeSvg("path", { d, class: classes[i] })),
      ...(bottom < 0 ? [makeSvg("line", { class: "zero", x1: 0, x2: this.#count, y1: top, y2: top })] : []),
      this.#cursor,
    );
    this.element.addEventListener("pointermove", (event) => tell.over(this.#tokenAt(event)));
    this.element.addEventListener("pointerleave", () => tell.over(-1));
    this.element.addEventListener("click", (event) => tell.pick(this.#tokenAt(event)));
  }

  /** @param {number} token the one to mark; -1: none */
  point(token) {
    this.#cursor.setAttribute("visibility", token < 0 ? "hidden" : "visible");
    if (token >= 0) this.#cursor.setAttribute("x", String(token));
  }

  /** @param {MouseEvent} event */
  #tokenAt(event) {
    const box = this.element.getBoundingClientRect();
    const at = Math.floor(((event.clientX - box.left) / box.width) * this.#count);
    return Math.min(this.#count - 1, Math.max(0, at));
  }
}
