/**
 * Which models there are, and the one that is chosen.
 */

import { byId, make } from "./element.js";

/** @typedef {import("./api.js").Model} Model */

const GROUPS = { base: "Base model", mixture: "Mixtures", lora: "Adapters" };

/**
 * Whether its answers have gates.
 * @param {string} kind
 */
export function isMixture(kind) {
  return kind !== "base" && kind !== "lora";
}

export class Models {
  #select = byId("model");
  #shown = "";
  /** @type {Model[]} */
  list = [];

  /** @param {Model[]} models */
  show(models) {
    this.list = models;
    const text = JSON.stringify(models.map(({ id, kind }) => [id, kind]));
    if (text === this.#shown) return;
    this.#shown = text;
    const before = this.#select.value;
    const groups = Object.entries(GROUPS).map(([group, label]) => {
      const own = models.filter(({ kind }) => (isMixture(kind) ? "mixture" : kind) === group);
      const options = own.map(({ id, kind }) =>
        make("option", { value: id }, isMixture(kind) ? `${id} (${kind})` : id),
      );
      return options.length ? [make("optgroup", { label }, ...options)] : [];
    });
    this.#select.replaceChildren(...groups.flat());
    const first = models.find(({ kind }) => isMixture(kind)) ?? models[0];
    this.#select.value = models.some(({ id }) => id === before) ? before : (first?.id ?? "");
    this.#select.dispatchEvent(new Event("change"));
  }

  /** @returns {Model | undefined} */
  get chosen() {
    return this.list.find(({ id }) => id === this.#select.value);
  }

  /** @returns {string[]} the plain adapters, by name */
  get adapters() {
    return this.list.filter(({ kind }) => kind === "lora").map(({ id }) => id);
  }
}
