/**
 * The user's API key: in this tab alone, until it is closed.
 */

const NAME = "xloom.key";

export const key = {
  /** @returns {string} empty: none */
  get() {
    return sessionStorage.getItem(NAME) ?? "";
  },
  /** @param {string} value empty: forget it */
  set(value) {
    if (value) sessionStorage.setItem(NAME, value);
    else sessionStorage.removeItem(NAME);
  },
};
