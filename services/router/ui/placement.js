// Why a request went where it went: what each candidate would have cost.

import { element } from "./dom.js";
import { ms } from "./format.js";
import { wayNode } from "./requests.js";

const MAX_CANDIDATES = 8;
// Of a candidate's cost, in this order; `weight` is what cost has beyond them (design: a · uncached).
const TERMS = [
  ["wait_ms", "wait", "router"],
  ["fetch_ms", "fetch cached KV", "kv"],
  ["uncached_ms", "compute the rest", "prefill"],
  ["transfer_ms", "transfer", "kv"],
  ["handover_ms", "hand-over", "kv"],
  ["admit_ms", "admit", "decode"],
  ["weight_ms", "weight of what is not cached", "prefill"],
  ["slowdown_ms", "slow-down of others", "router"],
];
const WHY_NOT = { lost: "not reachable", leaving: "leaving", draining: "draining", stuck: "stuck", tripped: "breaker open" };

/** One try of `total`, of which it is the nth. */
export function placementNode(route, nth, total, nameOf) {
  const shown = route.candidates.slice(0, MAX_CANDIDATES).map((candidate) => ({
    ...candidate,
    weight_ms: Math.max(0, candidate.cost_ms - candidate.ttft_ms - candidate.slowdown_ms),
  }));
  const longest = Math.max(1e-3, ...shown.map(sum));
  const title = total > 1 ? `Why there: try ${nth + 1} of ${total}` : "Why there";
  const actual = route.actual_ttft_ms === null ? "" : `, it took ${ms(route.actual_ttft_ms)}`;
  const used = TERMS.filter(([name]) => shown.some((candidate) => candidate[name] > 0.005));
  const left = route.candidates.length - shown.length + route.omitted;
  return element(
    "section",
    { class: "placement" },
    element("h3", {}, title),
    element("p", { class: "note" }, `First token predicted after ${ms(route.predicted_ttft_ms)}${actual}. Cheapest first.`),
    route.refused ? element("p", { class: "error" }, `Left for another: ${route.refused}`) : null,
    element("ol", {}, ...shown.map((candidate, index) => candidateRow(candidate, index, longest, nameOf))),
    left > 0 ? element("p", { class: "note" }, `and ${left} more`) : null,
    element(
      "ul",
      { class: "terms" },
      ...used.map((term) => element("li", { class: kind(term) }, element("span", { class: "swatch" }), term[1])),
    ),
    passedOver(route.passed_over, nameOf),
  );
}

function candidateRow(candidate, index, longest, nameOf) {
  const bar = element("span", { class: "stack", "aria-hidden": "true" });
  for (const term of TERMS) {
    const piece = element("span", { class: kind(term), title: `${term[1]}: ${ms(candidate[term[0]])}` });
    piece.style.width = `${(100 * candidate[term[0]]) / longest}%`;
    bar.append(piece);
  }
  const spoken = TERMS.filter(([name]) => candidate[name] > 0.005).map(([name, what]) => `${what} ${ms(candidate[name])}`);
  return element(
    "li",
    { class: index === 0 ? "candidate is-best" : "candidate" },
    wayNode(candidate, nameOf),
    bar,
    element("span", { class: "span-time" }, ms(candidate.cost_ms)),
    element("span", { class: "unseen" }, spoken.join(", ")),
  );
}

function passedOver(found, nameOf) {
  const rows = Object.entries(found ?? {});
  if (!rows.length) return null;
  const text = rows.map(([address, why]) => `${nameOf(address)} (${WHY_NOT[why] ?? why})`).join(", ");
  return element("p", { class: "note" }, `No candidates: ${text}`);
}

function kind([name, , role]) {
  return `of-${role} term-${name.replace("_ms", "")}`;
}

function sum(candidate) {
  return TERMS.reduce((total, [name]) => total + candidate[name], 0);
}
