// What flows between the cards: a line for each pair, and dots on it that move as fast as there is much of it.

import { drawing } from "./dom.js";

const FADE = 0.55; // of what was shown, a second later: a burst is seen, and not only a flash of it
const ROUND = 12; // of a lane's corners

/** Draws below the cards in `parent`; show(snapshot, cards by id, columns by role). */
export function makeFlows(parent) {
  const svg = drawing("svg", { class: "flows", "aria-hidden": "true" });
  parent.append(svg);
  const lines = new Map(); // by id
  let latest = null;
  let frame = null;
  let before = 0;

  const draw = () => {
    if (!latest) return;
    svg.setAttribute("viewBox", `0 0 ${parent.clientWidth} ${parent.clientHeight}`);
    const wanted = findLines(parent, ...latest);
    for (const [id, line] of lines) {
      if (wanted.has(id)) continue;
      line.node.remove();
      lines.delete(id);
    }
    for (const [id, { path, kind, strength, isBack }] of wanted) {
      const line = lines.get(id) ?? addLine(svg, lines, id);
      line.strength = Math.max(strength, line.strength * FADE) < 0.03 ? 0 : Math.max(strength, line.strength * FADE);
      line.isBack = isBack;
      line.node.setAttribute("class", `flow is-${kind}${line.strength ? " is-on" : ""}`);
      line.base.setAttribute("d", path);
      line.dots.setAttribute("d", path);
      line.base.setAttribute("stroke-width", (1.25 + 2.25 * line.strength).toFixed(2));
      line.dots.setAttribute("stroke-width", (3.5 + 2.5 * line.strength).toFixed(2));
    }
    if (frame === null && [...lines.values()].some((line) => line.strength) && !isStill()) {
      before = performance.now();
      frame = requestAnimationFrame(move);
    }
  };

  const move = (now) => {
    frame = null;
    const seconds = Math.min(0.1, (now - before) / 1000);
    before = now;
    let isMoving = false;
    for (const line of lines.values()) {
      if (!line.strength) continue;
      isMoving = true;
      line.offset = (line.offset + (line.isBack ? 1 : -1) * (30 + 90 * line.strength) * seconds) % 22;
      line.dots.setAttribute("stroke-dashoffset", line.offset.toFixed(2));
    }
    if (isMoving && !isStill()) frame = requestAnimationFrame(move);
  };

  new ResizeObserver(draw).observe(parent);
  return {
    show(...snapshot) {
      latest = snapshot;
      draw();
    },
  };
}

function isStill() {
  return matchMedia("(prefers-reduced-motion: reduce)").matches;
}

function addLine(svg, lines, id) {
  const base = drawing("path", { class: "base" });
  const dots = drawing("path", { class: "dots", "stroke-dasharray": "0.01 22" });
  const node = drawing("g", {}, base, dots);
  svg.append(node);
  const line = { node, base, dots, strength: 0, offset: 0, isBack: false };
  lines.set(id, line);
  return line;
}

/** id → { path, kind, strength 0…1, isBack }, for what the snapshot says flows. */
function findLines(parent, snapshot, cards, columns) {
  const { workers, agents } = snapshot;
  const box = boxes(parent);
  const flows = rates(workers, agents);
  const isNarrow = getComputedStyle(parent).getPropertyValue("--narrow").trim() === "1";
  const found = new Map();
  if (isNarrow) return narrowLines(box, columns, flows);
  const router = box(cards.get("router").firstChild);
  const decodes = [];
  const isAlone = columns.get("prefill").node.hidden && columns.get("kv").node.hidden;
  for (const worker of workers) {
    const card = box(cards.get(worker.address).firstChild);
    const flow = flows.get(worker.address);
    if (worker.role === "prefill") {
      found.set(`prompt ${worker.address}`, { path: across(router, card), kind: "prompt", strength: flow.prompt });
    } else if (isAlone) {
      found.set(`prompt ${worker.address}`, { path: across(router, card, -9), kind: "prompt", strength: flow.prompt });
      found.set(`tokens ${worker.address}`, { path: across(router, card, 9), kind: "tokens", strength: flow.tokens, isBack: true });
    } else {
      decodes.push({ id: worker.address, card, flow });
    }
    const agent = cards.get(`agent ${worker.agent}`);
    if (!agent) continue;
    const arena = box(agent.firstChild);
    const path = worker.role === "prefill" ? across(card, arena) : across(arena, card);
    found.set(`kv ${worker.address}`, { path, kind: "kv", strength: flow.kv, isBack: flow.isOffer });
  }
  if (decodes.length) addLanes(found, router, decodes, parent.clientHeight);
  return found;
}

/** On a phone the roles are below one another: one line from each to the next, and two lanes at the sides. */
function narrowLines(box, columns, flows) {
  const found = new Map();
  const all = [...flows.values()];
  const most = (role, of) => Math.max(0, ...all.filter((flow) => flow.role === role).map((flow) => flow[of]));
  const at = (role) => (columns.get(role).node.hidden ? null : box(columns.get(role).node.querySelector("ul")));
  const router = at("router");
  const decode = at("decode");
  const down = (from, to) => `M${(from.left + from.right) / 2},${from.bottom}V${to.top}`;
  if (at("prefill")) {
    found.set("prompt prefill", { path: down(router, at("prefill")), kind: "prompt", strength: most("prefill", "prompt") });
    if (at("kv")) found.set("kv prefill", { path: down(at("prefill"), at("kv")), kind: "kv", strength: most("prefill", "kv") });
  }
  if (at("kv")) found.set("kv decode", { path: down(at("kv"), decode), kind: "kv", strength: most("decode", "kv") });
  const lane = (side, x) =>
    `M${router[side]},${router.middle}H${x + (side === "left" ? ROUND : -ROUND)}Q${x},${router.middle} ${x},${router.middle + ROUND}` +
    `V${decode.middle - ROUND}Q${x},${decode.middle} ${x + (side === "left" ? ROUND : -ROUND)},${decode.middle}H${decode[side]}`;
  found.set("prompt decode", { path: lane("left", router.left - 13), kind: "prompt", strength: most("decode", "prompt") });
  found.set("tokens decode", { path: lane("right", router.right + 13), kind: "tokens", strength: most("decode", "tokens"), isBack: true });
  return found;
}

/** By worker: how much of each kind, 0…1, on a scale of magnitudes. */
function rates(workers, agents) {
  const found = new Map();
  for (const worker of workers) {
    const { flow } = worker;
    found.set(worker.address, {
      role: worker.role,
      prompt: magnitude(flow.prompt_tokens_per_second, 4.5),
      tokens: magnitude(flow.output_tokens_per_second, 4),
      kv: 0,
      isOffer: false,
    });
  }
  for (const agent of agents) {
    const { in_bytes_per_second: into = 0, out_bytes_per_second: out = 0 } = agent.flow ?? {};
    const attached = workers.filter((worker) => worker.agent === agent.address);
    const prefills = attached.filter((worker) => worker.role === "prefill" && worker.flow.computed_tokens_per_second);
    const decodes = attached.filter((worker) => worker.role === "decode" && worker.flow.output_tokens_per_second);
    share(found, prefills, into);
    share(found, decodes, out);
    if (!out && !prefills.length) {
      share(found, decodes, into); // decode offers what it has computed
      for (const worker of decodes) found.get(worker.address).isOffer = true;
    }
  }
  return found;
}

function share(found, workers, bytesPerSecond) {
  for (const worker of workers) {
    found.get(worker.address).kv = magnitude(bytesPerSecond / workers.length / 1e4, 4.5);
  }
}

function magnitude(number, decades) {
  return Math.min(1, Math.log10(1 + number) / decades);
}

function boxes(parent) {
  const origin = parent.getBoundingClientRect();
  return (node) => {
    const { left, right, top, bottom } = node.getBoundingClientRect();
    const x = -origin.left;
    const y = -origin.top;
    return { left: left + x, right: right + x, top: top + y, bottom: bottom + y, middle: (top + bottom) / 2 + y };
  };
}

function across(from, to, shift = 0) {
  const middle = (from.right + to.left) / 2;
  const [y, end] = [from.middle + shift, to.middle + shift];
  return `M${from.right},${y}C${middle},${y} ${middle},${end} ${to.left},${end}`;
}

/**
 * Between the router and decode, around everything else: prompts that decode computes itself come over the top, tokens go
 * back below. One lane for all, and from it a branch to each card.
 */
function addLanes(found, router, decodes, height) {
  const [first, last] = [decodes[0].card, decodes.at(-1).card];
  const most = (of) => Math.max(...decodes.map(({ flow }) => flow[of]));
  const x = router.right - 30;
  const over = { lane: 6, turn: first.right + 12, shift: 20 };
  const under = { lane: height - 6, turn: first.right + 25, shift: 8 };
  const entry = last.top + over.shift;
  found.set("prompt lane", {
    path:
      `M${x},${router.top}V${over.lane + ROUND}Q${x},${over.lane} ${x + ROUND},${over.lane}H${over.turn - ROUND}` +
      `Q${over.turn},${over.lane} ${over.turn},${over.lane + ROUND}V${entry - 8}Q${over.turn},${entry} ${over.turn - 8},${entry}H${last.right}`,
    kind: "prompt",
    strength: most("prompt"),
  });
  const exit = first.middle + under.shift;
  found.set("tokens lane", {
    path:
      `M${first.right},${exit}H${under.turn - 8}Q${under.turn},${exit} ${under.turn},${exit + 8}V${under.lane - ROUND}` +
      `Q${under.turn},${under.lane} ${under.turn - ROUND},${under.lane}H${x + ROUND}Q${x},${under.lane} ${x},${under.lane - ROUND}V${router.bottom}`,
    kind: "tokens",
    strength: most("tokens"),
  });
  for (const { id, card, flow } of decodes) {
    const [y, back] = [card.top + over.shift, card.middle + under.shift];
    if (card !== last) found.set(`prompt ${id}`, { path: `M${over.turn},${y}H${card.right}`, kind: "prompt", strength: flow.prompt });
    if (card !== first) found.set(`tokens ${id}`, { path: `M${card.right},${back}H${under.turn}`, kind: "tokens", strength: flow.tokens });
  }
}
