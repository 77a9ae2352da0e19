// One request: where its time went, span by span, and why it went where it went.

import { ApiError, call } from "./api.js";
import { element } from "./dom.js";
import { count, ms } from "./format.js";
import { facts } from "./details.js";
import { placementNode } from "./placement.js";
import { stateNode, wayNode } from "./requests.js";

const REFRESH_MS = 1000;
const ROLES = { router: "router", prefill: "prefill", decode: "decode", kvtransfer: "kv", kv: "kv" };
// What the time to the first token is made of, in this order.
const PARTS = [
  ["receive", "router"],
  ["tokenize", "router"],
  ["place", "router"],
  ["queue", "prefill"],
  ["fetch", "kv"],
  ["prefill", "prefill"],
  ["relay", "decode"],
];

/** Opens the dialog for `request`, as the snapshot or, with its id alone, the chat knows it. */
export function openWaterfall(sheet, request, nameOf, find = () => request) {
  let timer = null;
  let isClosed = false;
  const body = sheet.open(`Request ${request.id}`, () => {
    isClosed = true;
    clearTimeout(timer);
  });
  body.append(element("p", { class: "note" }, "Asking the router…"));
  const load = async () => {
    const shown = find() ?? request;
    try {
      const found = await (await call(`debug/route/${encodeURIComponent(request.id)}`)).json();
      if (isClosed) return;
      const record = found.find((each) => each.request_id === request.id) ?? found[0];
      const open = new Set([...body.querySelectorAll("details[open]")].map((each) => each.dataset.key));
      body.replaceChildren(...draw(shown, record, nameOf));
      for (const each of body.querySelectorAll("details")) each.open = open.has(each.dataset.key);
    } catch (error) {
      if (isClosed) return;
      if (!(error instanceof ApiError)) throw error;
      const hint =
        error.status === 404 ? "The router keeps the last 1,000; with several router processes, another one has it." : error.message;
      body.replaceChildren(summary(shown, nameOf), element("p", { class: "error" }, hint));
    }
    if (shown.state && shown.state !== "ended") timer = setTimeout(load, REFRESH_MS);
  };
  load();
}

function draw(request, record, nameOf) {
  const seen = { ...request, num_prompt_tokens: request.num_prompt_tokens ?? record.num_prompt_tokens };
  const last = record.routes.at(-1)?.candidates[0];
  if (!seen.decode && last) Object.assign(seen, { prefill: last.prefill, decode: last.decode });
  return [
    summary(seen, nameOf),
    timingsNode(record.timings),
    spansNode(record.spans?.length ? record.spans : plainSpans(seen, record), Boolean(record.spans?.length)),
    ...record.routes.map((route, nth) => placementNode(route, nth, record.routes.length, nameOf)),
  ].filter(Boolean);
}

function summary(request, nameOf) {
  const cached = request.num_cached_tokens ? `, ${request.num_cached_tokens} of them cached` : "";
  return facts([
    ["State", request.state && stateNode(request)],
    ["Failed", request.state === "ended" && stateNode(request).title],
    ["Prompt", request.num_prompt_tokens !== undefined && count(request.num_prompt_tokens, "token") + cached],
    ["Output", request.num_output_tokens !== undefined && count(request.num_output_tokens, "token")],
    ["First token", request.ttft_ms && `after ${ms(request.ttft_ms)}`],
    ["A token", request.tpot_ms && ms(request.tpot_ms)],
    ["Way", wayNode(request, nameOf)],
  ]);
}

/** One bar of the parts of the time to the first token, and what each is. */
function timingsNode(timings) {
  if (!timings) return null;
  const parts = PARTS.filter(([name]) => timings[name] !== undefined && timings[name] !== null);
  const total = timings.ttft ?? parts.reduce((sum, [name]) => sum + timings[name], 0);
  const bar = element("div", { class: "stack", "aria-hidden": "true" });
  const legend = element("ul", { class: "terms" });
  parts.forEach(([name, role], nth) => {
    const piece = element("span", { class: `of-${role} tone-${nth % 2}` });
    piece.style.width = `${(100 * timings[name]) / total}%`;
    bar.append(piece);
    legend.append(
      element("li", { class: `of-${role} tone-${nth % 2}` }, element("span", { class: "swatch" }), name, " ", element("b", {}, ms(timings[name]))),
    );
  });
  return element("section", {}, element("h3", {}, `First token after ${ms(total)}`), bar, legend);
}

function spansNode(spans, areReal) {
  const end = Math.max(1e-3, ...spans.map((span) => span.start_ms + span.duration_ms));
  const depths = [];
  for (const { parent } of spans) depths.push(parent === null || parent === undefined ? 0 : (depths[parent] ?? 0) + 1);
  const rows = spans.map((span, nth) => spanRow(span, end, nth, depths[nth]));
  const note = areReal ? null : element("p", { class: "note" }, "No spans were recorded for it; this is what the router itself saw.");
  return element("section", { class: "spans" }, element("h3", {}, "Where its time went"), note, axis(end), element("ol", {}, ...rows));
}

/** Without a trace: until the first token, and from there to the end. */
function plainSpans(request, record) {
  const ttft = request.ttft_ms ?? record.routes.at(-1)?.actual_ttft_ms ?? 0;
  const spans = [{ name: "to the first token", service: "prefill", start_ms: 0, duration_ms: ttft }];
  if (request.total_ms > ttft) {
    spans.push({ name: "further tokens", service: "decode", start_ms: ttft, duration_ms: request.total_ms - ttft });
  }
  return spans;
}

function spanRow(span, end, nth, depth) {
  const piece = element("span", { class: "piece" });
  piece.style.left = `${(100 * span.start_ms) / end}%`;
  piece.style.width = `max(2px, ${(100 * span.duration_ms) / end}%)`;
  const line = [
    element("span", { class: `span-name depth-${Math.min(depth, 3)}` }, span.name, element("small", {}, ` ${span.instance || span.service}`)),
    element("span", { class: "track", "aria-hidden": "true" }, piece),
    element("span", { class: "span-time" }, ms(span.duration_ms)),
  ];
  const role = `of-${span.name.startsWith("kv.") ? "kv" : ROLES[span.service] ?? "router"}`;
  const attributes = Object.entries(span.attributes ?? {});
  if (!attributes.length) return element("li", { class: `span ${role}` }, element("div", { class: "line" }, ...line));
  const list = facts([
    ["starts after", ms(span.start_ms)],
    ...attributes.map(([name, value]) => [name, element("code", {}, typeof value === "string" ? value : JSON.stringify(value))]),
  ]);
  return element(
    "li",
    { class: `span ${role}` },
    element("details", { "data-key": `${nth} ${span.name}` }, element("summary", { class: "line" }, ...line), list),
  );
}

function axis(end) {
  const step = [1, 2, 5, 10].map((factor) => factor * 10 ** Math.floor(Math.log10(end / 4))).find((each) => end / each <= 5);
  const ticks = [];
  for (let at = 0; at <= end * 0.97; at += step) {
    const tick = element("span", {}, at ? ms(at) : "0");
    tick.style.left = `${(100 * at) / end}%`;
    ticks.push(tick);
  }
  return element("div", { class: "axis", "aria-hidden": "true" }, element("div", {}, ...ticks));
}
