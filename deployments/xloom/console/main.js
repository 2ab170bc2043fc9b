/**
 * The page: its parts, and what goes between them.
 */

import { Api, ApiError } from "./api.js";
import { Chat } from "./chat.js";
import { Deployment } from "./deployment.js";
import { byId } from "./element.js";
import { key } from "./key.js";
import { Models } from "./models.js";
import { Palette } from "./palette.js";
import { Weights } from "./weights.js";

const PERIOD_MS = 3000; // between two looks at the deployment

const api = new Api(key.get);
const palette = new Palette();
const look = (/** @type {string} */ name) => palette.of(name);
const models = new Models();
/** @type {number | undefined} */
let timer;
const weights = new Weights(look);
const deployment = new Deployment();
const chat = new Chat(api, look, request, watch);

/** What the user has set. */
function request() {
  const length = byId("max-tokens").valueAsNumber || 128;
  const options = { max_tokens: length, temperature: byId("temperature").valueAsNumber || 0 };
  return { model: models.chosen, options, weights: weights.value, system: byId("system").value.trim() };
}

function showWeights() {
  const model = models.chosen;
  if (model === undefined) return;
  weights.show(model.id, model.kind, model.kind === "base" ? models.adapters : (model.adapters ?? []));
  showSummary();
}

function showSummary() {
  const set = weights.value;
  const what = set ? "weights of the request" : (models.chosen?.kind ?? "");
  byId("request-summary").textContent = models.chosen ? `${models.chosen.id} · ${what}` : "";
}

/**
 * @param {"good" | "bad" | "waiting"} state
 * @param {string} text
 */
function connected(state, text) {
  const shown = byId("connection");
  shown.dataset.state = state;
  if (shown.textContent !== text) shown.textContent = text;
}

/** @param {ApiError} refusal of the key, or of its absence */
function askForKey(refusal) {
  byId("key-panel").hidden = false;
  byId("key-refusal").textContent = `${refusal.message} (${refusal.status} ${refusal.code})`;
  byId("forget-key").hidden = true;
  connected("bad", "No access");
  deployment.clear("Its state needs the key.");
  models.show([]);
  chat.ready = false;
}

/** Look at the deployment once. */
async function refresh() {
  const list = await api.models();
  byId("key-panel").hidden = true;
  byId("forget-key").hidden = !key.get();
  const status = await api.status().catch((error) => {
    if (error.status === 0) throw error;
    return null; // a proxy may let /v1 through and no more
  });
  models.show(list);
  showWeights();
  chat.ready = list.length > 0;
  if (status) deployment.show(status);
  else deployment.clear("Its state is not let through to here.");
  const ready = status === null || status.replicas.length > 0;
  connected(ready ? "good" : "waiting", ready ? "Connected" : "No replica is ready");
}

async function watch() {
  clearTimeout(timer);
  try {
    if (!document.hidden) await refresh();
  } catch (error) {
    if (error instanceof ApiError && (error.status === 401 || error.status === 403)) {
      askForKey(error);
      return; // until there is another key
    }
    connected("bad", error instanceof Error ? error.message : "The endpoint can't be reached.");
  }
  clearTimeout(timer);
  timer = setTimeout(watch, PERIOD_MS);
}

byId("model").addEventListener("change", showWeights);
byId("weights").addEventListener("weights", showSummary);
byId("key-form").addEventListener("submit", (/** @type {Event} */ event) => {
  event.preventDefault();
  key.set(byId("key").value.trim());
  byId("key").value = "";
  watch();
});
byId("forget-key").addEventListener("click", () => {
  key.set("");
  watch();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) watch();
});
const wide = matchMedia("(min-width: 56rem)");
const unfold = () => (byId("request-details").open = wide.matches);
wide.addEventListener("change", unfold);
unfold();
watch();
