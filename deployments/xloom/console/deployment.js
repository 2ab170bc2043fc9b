/**
 * The deployment as the router sees it: replicas with their queues and pages, and what is served.
 */

import { byId, make } from "./element.js";
import { counted } from "./mixture_view.js";

const UNITS = ["B", "kB", "MB", "GB", "TB"];

export class Deployment {
  #shown = "";

  /** @param {any} status what `/xloom/status` answers */
  show(status) {
    const text = JSON.stringify(status);
    if (text === this.#shown) return;
    this.#shown = text;
    const { replicas, adapters } = status;
    let waiting = 0;
    for (const { stats } of replicas) waiting += stats.waiting;
    const flight = counted(status.router.in_flight, "request");
    byId("deployment-note").textContent = status.start_failure
      ? `No replica: ${status.start_failure}`
      : `${flight} under way in this router, ${waiting} waiting in replicas.`;
    byId("replicas").replaceChildren(
      make("h3", {}, counted(replicas.length, "replica")), ...replicas.map(replicaCard),
    );
    byId("adapters").replaceChildren(...served(adapters, replicas.length));
  }

  /** @param {string} why there is nothing to show */
  clear(why) {
    this.#shown = "";
    byId("deployment-note").textContent = why;
    byId("replicas").replaceChildren();
    byId("adapters").replaceChildren();
  }
}

/** @param {any} replica */
function replicaCard({ id, node, state, stats }) {
  const { running, waiting, kv_pages_used: used, kv_pages_total: total, preemptions, adapters } = stats;
  const facts = { Running: running, Waiting: waiting, Preempted: preemptions, "Adapters held": adapters.length };
  const pages = make("meter", {
    min: 0, max: Math.max(1, total), high: 0.9 * total, value: used, "aria-label": "KV pages in use",
  });
  const figures = Object.entries({ ...facts, "KV pages": `${used} of ${total}` }).flatMap(([name, value]) => [
    make("dt", {}, name), make("dd", {}, String(value)),
  ]);
  return make(
    "article", { class: "replica", "aria-label": `Replica ${id}` },
    make(
      "p", { class: "name" },
      make("span", { title: `on node ${node}` }, id), make("span", { class: "state", "data-state": state }, state),
    ),
    make("dl", { class: "figures" }, ...figures), pages,
  );
}

/**
 * @param {any[]} adapters
 * @param {number} replicas
 */
function served(adapters, replicas) {
  const mixtures = adapters.filter((each) => each.kind !== "lora");
  const plain = adapters.filter((each) => each.kind === "lora");
  const line = (/** @type {any} */ each) => {
    const facts = [
      each.kind !== "lora" && each.kind,
      each.adapters?.length && `of ${each.adapters.join(", ")}`,
      `rank ${each.rank}`,
      sized(each.size),
      `in ${each.replicas} of ${counted(replicas, "replica")}`,
    ];
    return make(
      "li", {}, make("span", { class: "name" }, each.name), " ",
      make("span", { class: "quiet", title: each.source }, facts.filter(Boolean).join(" · ")),
    );
  };
  const list = (/** @type {string} */ noun, /** @type {any[]} */ entries) => [
    make("h3", {}, counted(entries.length, noun)), make("ul", { class: "served" }, ...entries.map(line)),
  ];
  return [...list("mixture", mixtures), ...list("adapter", plain)];
}

/** @param {number} bytes */
function sized(bytes) {
  let unit = 0;
  for (; bytes >= 1000 && unit < UNITS.length - 1; unit++) bytes /= 1000;
  return `${bytes.toFixed(bytes < 10 && unit ? 1 : 0)} ${UNITS[unit]}`;
}
