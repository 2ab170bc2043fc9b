/**
 * What gates come to: the strongest adapter, its share, and the shapes of a chart. Plain functions of plain data.
 */

/**
 * The adapter with the largest gate by size, the first of equals; -1 where all are 0.
 * @param {number[]} gates
 */
export function strongest(gates) {
  let best = -1;
  for (let i = 0; i < gates.length; i++) {
    if (gates[i] !== 0 && (best < 0 || Math.abs(gates[i]) > Math.abs(gates[best]))) best = i;
  }
  return best;
}

/**
 * How much of all gates the strongest is, in five levels.
 * @param {number[]} gates
 * @returns {number} 1 (up to a fifth) to 5; 0 where all are 0
 */
export function level(gates) {
  const best = strongest(gates);
  if (best < 0) return 0;
  const all = gates.reduce((sum, gate) => sum + Math.abs(gate), 0);
  return Math.min(5, Math.max(1, Math.ceil((5 * Math.abs(gates[best])) / all - 1e-9)));
}

/** @param {number} gate */
export function written(gate) {
  return (Math.abs(gate) < 0.005 ? 0 : gate).toFixed(2).replace("-", "−");
}

/**
 * @param {string[]} adapters
 * @param {number[]} gates
 */
export function inWords(adapters, gates) {
  return adapters.map((name, i) => `${name} ${written(gates[i])}`).join(", ");
}

/**
 * Gates over tokens as stacked areas, one a adapter: what is negative hangs below zero.
 * @param {number[][]} tokens [token][adapter]
 * @param {number} adapters
 * @returns {{paths: string[], top: number, bottom: number}} SVG paths, a token a unit of x; y grows downwards
 */
export function areas(tokens, adapters) {
  /** @type {[number, number][][]} [adapter][token]: from, to */
  const spans = Array.from({ length: adapters }, () => []);
  let top = 0;
  let bottom = 0;
  for (const gates of tokens) {
    let above = 0;
    let below = 0;
    for (let i = 0; i < adapters; i++) {
      const gate = gates[i] ?? 0;
      if (gate >= 0) {
        spans[i].push([above, above + gate]);
        above += gate;
      } else {
        spans[i].push([below, below + gate]);
        below += gate;
      }
    }
    top = Math.max(top, above);
    bottom = Math.min(bottom, below);
  }
  const y = (/** @type {number} */ value) => +(top - value).toFixed(4);
  const paths = spans.map((row) => {
    const there = row.map(([, to], x) => `${x ? "V" : "M0 "}${y(to)}H${x + 1}`);
    const back = row.map(([from], x) => `V${y(from)}H${x}`).reverse();
    return row.length ? `${there.join("")}${back.join("")}Z` : "";
  });
  return { paths, top, bottom };
}
