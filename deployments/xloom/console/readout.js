/**
 * The readout: a bar for each adapter, of the token pointed at or else the mean of all. It is the legend as well.
 */

import { make, makeSvg } from "./element.js";
import { strongest, written } from "./gates.js";

export class Readout {
  #title = make("p", { class: "readout-title" });
  /** @type {{item: HTMLElement, bar: SVGElement, rect: SVGElement, value: HTMLElement}[]} */
  #rows;
  #scale;

  /**
   * @param {string[]} adapters
   * @param {string[]} classes of the adapters
   * @param {number} largest of all gates, by size: the bars' full length
   */
  constructor(adapters, classes, largest) {
    this.#scale = 100 / Math.max(1, largest);
    this.#rows = adapters.map((name, i) => {
      const rect = makeSvg("rect", { width: 0, height: 10 });
      const bar = makeSvg(
        "svg", { class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" }, rect,
      );
      const value = make("span", { class: "value" });
      const item = make(
        "li", { class: classes[i] },
        make("span", { class: "swatch" }), make("span", { class: "adapter", title: name }, name), bar, value,
      );
      return { item, bar, rect, value };
    });
    /** @type {HTMLElement} */
    this.element = make(
      "div", { class: "readout" }, this.#title, make("ul", { class: "legend" }, ...this.#rows.map((row) => row.item)),
    );
  }

  /**
   * @param {(string | Node)[]} title
   * @param {number[]} gates
   */
  show(title, gates) {
    this.#title.replaceChildren(...title);
    const best = strongest(gates);
    this.#rows.forEach(({ item, bar, rect, value }, i) => {
      const gate = gates[i] ?? 0;
      rect.setAttribute("width", String(Math.min(100, Math.abs(gate) * this.#scale)));
      bar.classList.toggle("negative", gate < 0);
      item.classList.toggle("strongest", i === best);
      value.textContent = written(gate);
    });
  }
}
