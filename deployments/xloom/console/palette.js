/**
 * An adapter's look: a hue, and a style of line. It keeps them on the whole page.
 */

const HUES = 8;
const LINES = 4;

export class Palette {
  /** @type {Map<string, number>} */
  #slots = new Map();

  /**
   * The classes of an adapter's look.
   * @param {string} name
   */
  of(name) {
    let slot = this.#slots.get(name);
    if (slot === undefined) {
      slot = this.#slots.size;
      this.#slots.set(name, slot);
    }
    return `hue-${slot % HUES} line-${(slot + Math.floor(slot / HUES)) % LINES}`;
  }
}
