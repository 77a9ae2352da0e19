// Sampling controls and the system prompt. What is left empty is the model's own default.

import { element } from "./dom.js";

const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05 },
  { name: "top_p", label: "Top-p", min: 0.01, max: 1, step: 0.01 },
  { name: "top_k", label: "Top-k", min: 0, max: 1_000_000, step: 1 },
  { name: "min_p", label: "Min-p", min: 0, max: 1, step: 0.01 },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.05, max: 2, step: 0.05 },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1 },
  { name: "max_tokens", label: "Most tokens", min: 1, max: 1_000_000, step: 1, value: 256 },
  { name: "seed", label: "Seed", min: 0, max: Number.MAX_SAFE_INTEGER, step: 1 },
];

/** node: to be put somewhere. values(): for the request's body. check(): whether they make sense; else it shows which does not. */
export function makeSettings() {
  const inputs = new Map(FIELDS.map((field) => [field.name, makeInput(field)]));
  const system = element("textarea", { id: "system", rows: "2", placeholder: "None" });
  const node = element(
    "details",
    { class: "settings" },
    element("summary", {}, "Sampling and system prompt"),
    element("label", { for: "system" }, "System prompt"),
    system,
    element(
      "div",
      { class: "grid" },
      ...FIELDS.map(({ name, label }) => element("div", {}, element("label", { for: `set-${name}` }, label), inputs.get(name))),
    ),
  );
  return {
    node,
    values() {
      const given = [...inputs].filter(([, input]) => input.value !== "");
      return Object.fromEntries(given.map(([name, input]) => [name, Number(input.value)]));
    },
    withSystem(messages) {
      const content = system.value.trim();
      return content ? [{ role: "system", content }, ...messages] : messages;
    },
    check() {
      const wrong = [...inputs.values()].find((input) => !input.checkValidity());
      if (!wrong) return true;
      node.open = true;
      wrong.reportValidity();
      return false;
    },
  };
}

function makeInput({ name, min, max, step, value = "" }) {
  return element("input", { id: `set-${name}`, type: "number", min, max, step, value, placeholder: "default", inputmode: "decimal" });
}
