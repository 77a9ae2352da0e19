// The topology: router → prefill → KV arenas → decode, each a card, with what flows between them drawn over it.

import { KeyedList, element, setText } from "./dom.js";
import { amount, bytes, count, ms } from "./format.js";
import { makeFlows } from "./flows.js";
import { describeWorker } from "./details.js";

const COLUMNS = [
  { role: "router", title: "Router" },
  { role: "prefill", title: "Prefill" },
  { role: "kv", title: "KV arena" },
  { role: "decode", title: "Decode" },
];

const STATES = {
  ready: "ready",
  serving: "serving",
  lost: "not reachable",
  leaving: "leaving",
  draining: "draining",
  stuck: "stuck in a step",
  tripped: "breaker open",
};

/** Draws into `parent`; returns show(snapshot). sheet: where a worker's details open. */
export function makeFleet(parent, sheet) {
  const flows = makeFlows(parent);
  const columns = new Map();
  for (const { role, title } of COLUMNS) {
    const list = element("ul");
    const node = element("section", { class: `column of-${role}`, "aria-label": title }, element("h3", {}, title), list);
    parent.append(node);
    columns.set(role, { node, list: new KeyedList(list, (item) => makeCard(item, sheet)) });
  }
  return (snapshot) => {
    const items = describe(snapshot);
    for (const { role } of COLUMNS) {
      const { node, list } = columns.get(role);
      node.hidden = !items[role].length && role !== "decode";
      list.show(items[role], (item) => item.id);
    }
    parent.dataset.columns = COLUMNS.filter(({ role }) => !columns.get(role).node.hidden).length;
    const cards = new Map();
    for (const { list } of columns.values()) for (const [id, card] of list.rows) cards.set(id, card.node);
    flows.show(snapshot, cards, columns);
  };
}

function describe({ router, workers, agents, sample }) {
  const of = (role) => workers.filter((worker) => worker.role === role).map(workerCard);
  return {
    router: [routerCard(router, sample)],
    prefill: of("prefill"),
    kv: agents.map((agent, nth) => arenaCard(agent, agents.length > 1 ? `arena ${nth + 1}` : "arena")),
    decode: of("decode"),
  };
}

function routerCard(router, sample) {
  return {
    id: "router",
    name: "router",
    state: "ready",
    rows: [
      [String(router.num_running), "running"],
      [String(router.num_queued), "queued"],
      [`${amount(sample?.output_tokens_per_second ?? 0)} tok/s`, "to clients"],
      [ms(router.loop_lag_ms), "loop lag"],
    ],
  };
}

function workerCard(worker) {
  const used = worker.num_blocks - worker.num_free_blocks;
  const cached = Math.max(0, Math.min(worker.num_named_blocks, worker.num_blocks) - used);
  const speed =
    worker.role === "prefill"
      ? [worker.prefill_tokens_per_second ? `${amount(worker.prefill_tokens_per_second)} tok/s` : "–", "speed"]
      : [worker.step_ms ? ms(worker.step_ms) : "–", "a step"];
  const waiting = worker.num_waiting ? ` · ${worker.num_waiting} waiting` : "";
  return {
    id: worker.address,
    name: worker.id,
    state: worker.state,
    worker,
    bar: {
      label: "KV pool",
      total: worker.num_blocks,
      parts: [
        ["in use", used, "solid"],
        ["cached", cached, "soft"],
      ],
      unit: worker.block_bytes,
    },
    rows: [[String(worker.num_running), `running${waiting}`], speed],
  };
}

function arenaCard(agent, name) {
  const slots = agent.slots;
  const { in_bytes_per_second: into = 0, out_bytes_per_second: out = 0 } = agent.flow ?? {};
  return {
    id: `agent ${agent.address}`,
    name,
    state: agent.state,
    bar: slots && {
      label: "Arena",
      total: slots.num_slots,
      parts: [
        ["pinned", slots.num_pinned, "solid"],
        ["being written", slots.num_granted, "striped"],
        ["cached", slots.num_sealed - slots.num_pinned, "soft"],
      ],
      unit: slots.slot_bytes,
    },
    rows: [
      [`${bytes(into)}/s`, "in"],
      [`${bytes(out)}/s`, "out"],
    ],
  };
}

function makeCard(item, sheet) {
  const name = element("span", { class: "name" });
  const state = element("span", { class: "badge" });
  const bar = element("span", { class: "bar", "aria-hidden": "true" });
  const barText = element("span", { class: "bar-text" });
  const rows = element("span", { class: "rows" });
  const content = [element("span", { class: "title" }, element("span", { class: "dot" }), name, state), bar, barText, rows];
  let shown = item;
  const open = () => describeWorker(sheet, shown.worker);
  const card = item.worker
    ? element("button", { type: "button", class: "card", "aria-haspopup": "dialog", onclick: open }, ...content)
    : element("div", { class: "card" }, ...content);

  return {
    node: element("li", {}, card),
    update(next) {
      shown = next;
      setText(name, next.name);
      setText(state, ["ready", "serving"].includes(next.state) ? "" : STATES[next.state] ?? next.state);
      card.dataset.state = next.state;
      bar.hidden = barText.hidden = !next.bar?.total;
      if (next.bar?.total) showBar(bar, barText, next.bar);
      const lines = next.rows.map(([value, what]) => `${value}\u0000${what}`);
      if (rows.dataset.shown !== lines.join("\u0001")) {
        rows.dataset.shown = lines.join("\u0001");
        rows.replaceChildren(
          ...next.rows.map(([value, what]) => element("span", {}, element("b", {}, value), ` ${what}`)),
        );
      }
    },
  };
}

function showBar(bar, text, { label, total, parts, unit }) {
  while (bar.children.length < parts.length) bar.append(element("span"));
  parts.forEach(([, number, kind], nth) => {
    bar.children[nth].className = kind;
    bar.children[nth].style.width = `${(100 * number) / total}%`;
  });
  const cached = parts.find(([what]) => what === "cached")[1];
  const used = parts.reduce((sum, [, number]) => sum + number, 0) - cached;
  const most = used / total < 0.01 ? `${percent(cached / total)} cached` : `${percent(used / total)} used`;
  setText(text, `${bytes(total * unit)}, ${most}`);
  const details = parts.map(([what, number]) => `${count(number, "block")} (${bytes(number * unit)}) ${what}`);
  bar.parentNode.title = `${label} of ${count(total, "block")}: ${details.join(", ")}`;
}

function percent(share) {
  if (share > 0 && share < 0.01) return "< 1 %";
  return `${(100 * share).toFixed(0)} %`;
}
