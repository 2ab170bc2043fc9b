/**
 * Weights of the request: a slider and a number for each adapter. They replace a mixture's gates, or mix adapters on
 * the base model.
 */

import { byId, make } from "./element.js";
import { written } from "./gates.js";

const SHOWN = 8; // adapters of the base model that have a slider from the start; more are added by hand
const SLIDER = { min: -1, max: 2, step: 0.05 };
const MOST = 100; // by size, as the endpoint takes them

export class Weights {
  #box = byId("weights");
  #on = byId("weights-on");
  #rows = byId("weights-rows");
  #add = byId("weights-add");
  #look;
  /** @type {string[]} */
  #adapters = [];
  #isBase = false;
  #shown = "";
  /** @type {Map<string, {row: HTMLElement, slider: HTMLInputElement, number: HTMLInputElement}>} */
  #controls = new Map();

  /** @param {(name: string) => string} look an adapter's classes */
  constructor(look) {
    this.#look = look;
    this.#on.addEventListener("change", () => this.#tell());
    byId("weights-even").addEventListener("click", () => this.#setAll(1 / Math.max(1, this.#controls.size)));
    byId("weights-zero").addEventListener("click", () => this.#setAll(0));
    this.#add.addEventListener("change", () => {
      const name = this.#add.value;
      if (!name) return;
      this.#addRow(name, 0);
      this.#offer();
      this.#controls.get(name)?.slider.focus();
    });
  }

  /**
   * Show the sliders that go with a model; what is set stays while they are the same.
   * @param {string} model
   * @param {string} kind "base", or a mixture's; of any other there is nothing to set
   * @param {string[]} adapters what can be weighted
   */
  show(model, kind, adapters) {
    const asked = JSON.stringify([model, kind, adapters]);
    if (asked === this.#shown) return;
    this.#shown = asked;
    this.#isBase = kind === "base";
    this.#adapters = adapters;
    this.#controls.clear();
    this.#rows.replaceChildren();
    this.#on.checked = false;
    this.#box.hidden = kind === "lora" || adapters.length === 0;
    const label = this.#isBase ? "Mix adapters on the base model" : "Set them, instead of its own gates";
    byId("weights-label").textContent = label;
    const first = this.#isBase && adapters.length > SHOWN ? adapters.slice(0, 2) : adapters;
    for (const name of first) this.#addRow(name, this.#isBase ? 0 : 1 / first.length);
    this.#offer();
    this.#tell();
  }

  /** @returns {Record<string, number> | undefined} the request's `mixture`; undefined: none is set */
  get value() {
    if (this.#box.hidden || !this.#on.checked) return undefined;
    const set = [...this.#controls].map(([name, { number }]) => [name, Number(number.value) || 0]);
    const used = set.filter(([, weight]) => weight !== 0); // an adapter that is left out has weight 0
    if (used.length) return Object.fromEntries(used);
    return this.#isBase ? undefined : Object.fromEntries(set);
  }

  /**
   * @param {string} name
   * @param {number} weight
   */
  #addRow(name, weight) {
    const id = `weight-${this.#controls.size}`;
    const value = String(Number(weight.toFixed(3)));
    const slider = make("input", { type: "range", id, ...SLIDER, value });
    const number = make("input", {
      type: "number", min: -MOST, max: MOST, step: "any", value, "aria-label": `Weight of ${name}, as a number`,
    });
    slider.addEventListener("input", () => {
      number.value = slider.value;
      this.#touched();
    });
    number.addEventListener("input", () => {
      slider.value = number.value;
      this.#touched();
    });
    const row = make(
      "div", { class: `weight ${this.#look(name)}` },
      make("span", { class: "swatch", "aria-hidden": "true" }), make("label", { for: id, title: name }, name),
      number, slider,
    );
    this.#controls.set(name, { row, slider, number });
    this.#rows.append(row);
  }

  /** Offer the adapters that have no slider yet. */
  #offer() {
    const left = this.#adapters.filter((name) => !this.#controls.has(name));
    byId("weights-add-row").hidden = left.length === 0;
    const options = left.map((name) => make("option", { value: name }, name));
    this.#add.replaceChildren(make("option", { value: "" }, "Another adapter…"), ...options);
  }

  /** @param {number} weight */
  #setAll(weight) {
    for (const { slider, number } of this.#controls.values()) {
      number.value = slider.value = String(Number(weight.toFixed(3)));
    }
    this.#touched();
  }

  #touched() {
    this.#on.checked = true;
    this.#tell();
  }

  #tell() {
    let sum = 0;
    for (const { number } of this.#controls.values()) sum += Number(number.value) || 0;
    byId("weights-sum").textContent = `Sum ${written(sum)}`;
    this.#box.classList.toggle("off", !this.#on.checked);
    this.#box.dispatchEvent(new CustomEvent("weights"));
  }
}
