// Puts the page together: the key if one is asked for, the stream, and what is drawn of it.

import { ApiError, call, key } from "./api.js";
import { makeChat } from "./chat.js";
import { describeModel } from "./details.js";
import { setText } from "./dom.js";
import { makeFigures } from "./figures.js";
import { makeFleet } from "./fleet.js";
import { count } from "./format.js";
import { watch } from "./live.js";
import { makeRequests } from "./requests.js";
import { makeSheet } from "./sheet.js";
import { makeTheme } from "./theme.js";
import { openWaterfall } from "./waterfall.js";

const at = (id) => document.getElementById(id);

makeTheme(at("theme"));
const sheet = makeSheet(at("sheet"));
const showFigures = makeFigures(at("figures"));
const showFleet = makeFleet(at("topology"), sheet);
let latest = null;
let stop = () => {};

const nameOf = (address) => latest?.workers.find((worker) => worker.address === address)?.id ?? address;
const findRequest = (id) => latest?.requests.find((request) => request.id === id || request.id.startsWith(`${id}-`));
const openRequest = (request) => openWaterfall(sheet, request, nameOf, () => findRequest(request.id));
const showRequests = makeRequests(at("request-list"), at("requests-note"), openRequest);
const chat = makeChat(at("chat"), { open: (id) => openRequest(findRequest(id) ?? { id }), onRefused: askForKey });

at("about").addEventListener("click", () => describeModel(sheet, latest));
at("forget-key").addEventListener("click", () => {
  key.forget();
  chat.forget();
  askForKey("");
});
at("gate-form").addEventListener("submit", (event) => {
  event.preventDefault();
  tryKey(at("key").value.trim());
});
start();

function start() {
  stop();
  stop = watch({ snapshot: show, lost: showLost, refused: askForKey });
}

function show(snapshot, samples) {
  latest = snapshot;
  at("gate").hidden = true;
  at("main").hidden = false;
  at("banner").hidden = true;
  document.body.classList.remove("is-stale");
  at("forget-key").hidden = !key.get();
  at("about").hidden = false;
  setText(at("about"), snapshot.router.models[0]);
  showHealth(snapshot);
  showFigures(samples);
  showFleet(snapshot);
  showRequests(snapshot);
  chat.show(snapshot);
}

function showHealth({ router, workers }) {
  const amiss = workers.filter((worker) => worker.state !== "ready");
  const state = !router.ready ? "lost" : amiss.length ? "troubled" : "serving";
  at("health").dataset.state = state;
  const workersText = count(workers.length, "worker");
  const texts = {
    serving: ["Serving", ` · ${workersText}`],
    troubled: ["Serving", ` · ${amiss.length} of ${workersText} not ready`],
    lost: ["No worker can serve", ""],
  };
  setText(at("health-text"), texts[state][0]);
  setText(at("health-more"), texts[state][1]);
  at("health").title = router.trouble ?? "";
}

function showLost(message, seconds) {
  at("health").dataset.state = "lost";
  setText(at("health-text"), "Disconnected");
  setText(at("health-more"), "");
  document.body.classList.add("is-stale");
  at("banner").hidden = false;
  setText(at("banner"), `${message} Trying again${seconds >= 1 ? ` in ${Math.round(seconds)} s` : ""}…`);
}

function askForKey(message) {
  stop();
  sheet.close();
  const had = key.get();
  key.forget();
  at("main").hidden = true;
  at("banner").hidden = true;
  at("about").hidden = true;
  at("forget-key").hidden = true;
  at("health").dataset.state = "connecting";
  setText(at("health-text"), "Locked");
  setText(at("health-more"), "");
  at("gate").hidden = false;
  setText(at("gate-error"), had ? message : "");
  at("key").value = "";
  at("key").focus();
}

/** Asked first, so that a wrong one is said at once. */
async function tryKey(text) {
  if (!/^[\x21-\x7e]+$/.test(text)) return setText(at("gate-error"), "A key is made of letters, digits and signs, without spaces.");
  key.set(text);
  try {
    await call("debug/fleet");
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401) return askForKey("That key is not one of this router's.");
    setText(at("gate-error"), error.message);
    return;
  }
  setText(at("gate-error"), "");
  start();
}
