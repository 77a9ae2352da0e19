// The last requests: one row each, which opens its waterfall.

import { KeyedList, element, setText } from "./dom.js";
import { NOTHING, amount, clock, ms, shortId } from "./format.js";

const COLUMNS = [
  ["Request", ""],
  ["State", ""],
  ["Prompt", "number on-wide"],
  ["Output", "number"],
  ["First token", "number on-wide"],
  ["A token", "number on-wide a-token"],
  ["Total", "number on-wide total"],
  ["Time", "at-end time"],
  ["Way", "at-end way-cell"],
];
const MAX_ROWS = 25;
const FINE = new Set(["stop", "length", "closed"]);
const OUTCOMES = { stop: "done", length: "done, at its limit", closed: "closed" };

/** Draws into `parent`; returns show(snapshot). open(request, nameOf): the waterfall. */
export function makeRequests(parent, note, open) {
  const body = element("tbody");
  const table = element(
    "table",
    { class: "requests" },
    element("thead", {}, element("tr", {}, ...COLUMNS.map(([title, kind]) => element("th", { scope: "col", class: kind }, title)))),
    body,
  );
  const empty = element(
    "div",
    { class: "empty" },
    element("strong", {}, "Nothing has been asked yet"),
    "Say something in the chat, or send a request to /v1/chat/completions.",
  );
  parent.append(empty, table);
  let longest = 1;
  let nameOf = (address) => address;
  const list = new KeyedList(body, (request) => makeRow(request, () => longest, () => nameOf, open));
  return (snapshot) => {
    const { requests, workers } = snapshot;
    const names = new Map(workers.map((worker) => [worker.address, worker.id]));
    nameOf = (address) => names.get(address) ?? address;
    for (const request of requests) request.lasting = lasting(request, snapshot.at);
    const ordered = requests.map((request) => request.lasting).sort((one, other) => one - other);
    longest = Math.max(1, ordered[Math.floor(0.9 * ordered.length)] ?? 1); // one that took very long is cut off
    list.show(requests.slice(0, MAX_ROWS), (request) => request.id);
    empty.hidden = requests.length > 0;
    table.hidden = !requests.length;
    setText(note, requests.length ? "newest first; choose one to see where its time went" : "");
  };
}

function lasting(request, now) {
  return request.total_ms ?? Math.max(0, 1000 * (now - request.placed_at));
}

/** What to call the state, for colour and for people. */
export function stateOf(request) {
  if (request.state !== "ended") return { kind: request.state, text: request.state === "waiting" ? "first token" : "streaming" };
  if (FINE.has(request.outcome)) return { kind: "done", text: OUTCOMES[request.outcome] };
  return { kind: "failed", text: "failed", why: request.outcome };
}

export function stateNode(request) {
  const { kind, text, why } = stateOf(request);
  return element("span", { class: "state", "data-state": kind, title: why ?? null }, element("span", { class: "dot" }), text);
}

export function wayNode({ prefill, decode }, nameOf) {
  const stop = (role, address) =>
    element("span", { class: `way of-${role}` }, element("span", { class: "dot" }), nameOf(address));
  if (!decode) return element("span", { class: "way" }, NOTHING);
  return prefill
    ? element("span", { class: "way" }, stop("prefill", prefill), element("span", { class: "arrow" }, "→"), stop("decode", decode))
    : element("span", { class: "way" }, stop("decode", decode));
}

function makeRow(first, longest, nameOf, open) {
  let request = first;
  const cells = COLUMNS.map(([title, kind]) => element("td", { class: kind, "data-label": title }));
  const button = element("button", { type: "button", "aria-haspopup": "dialog" }, shortId(first.id));
  const bar = element("div", { class: "spanbar", "aria-hidden": "true" });
  const parts = [element("span", { class: "of-prefill" }), element("span", { class: "of-decode" })];
  bar.append(...parts);
  cells[0].append(button);
  button.title = `${first.id}, at ${clock(first.placed_at)}`;
  cells[7].append(bar);
  const row = element("tr", { onclick: () => open(request, nameOf()) }, ...cells);
  let way = "";
  let state = "";
  return {
    node: row,
    update(next) {
      request = next;
      const cached = next.num_cached_tokens ? ` (${amount(next.num_cached_tokens)} cached)` : "";
      if (state !== (state = next.state + next.outcome)) cells[1].replaceChildren(stateNode(next));
      setText(cells[2], amount(next.num_prompt_tokens) + cached);
      setText(cells[3], `${amount(next.num_output_tokens)}`);
      setText(cells[4], ms(next.ttft_ms));
      setText(cells[5], ms(next.tpot_ms));
      setText(cells[6], ms(next.total_ms));
      const untilFirst = next.ttft_ms ?? next.lasting;
      const scale = 100 / Math.max(longest(), next.lasting > longest() ? next.lasting : 0);
      parts[0].style.width = `${scale * untilFirst}%`;
      parts[1].style.width = `${scale * (next.lasting - untilFirst)}%`;
      parts[1].hidden = next.ttft_ms === null;
      if (way !== (way = `${next.prefill} ${next.decode}`)) cells[8].replaceChildren(wayNode(next, nameOf()));
    },
  };
}
