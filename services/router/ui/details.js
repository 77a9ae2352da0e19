// What is known of a worker, and of the model, as lists of facts.

import { element } from "./dom.js";
import { amount, bytes, clock, count, ms } from "./format.js";

export function describeWorker(sheet, worker) {
  const body = sheet.open(worker.id);
  body.append(
    ...(worker.complaint ? [element("p", { class: "error" }, worker.complaint)] : []),
    facts([
      ["Role", worker.role],
      ["State", worker.state],
      ["Address", code(worker.address)],
      ["Incarnation", worker.incarnation && code(worker.incarnation)],
      ["Model", worker.model],
      ["KV agent", worker.agent ? code(worker.agent) : "none: it takes part in no split"],
      ["Requests", `${worker.num_running} running, ${worker.num_waiting} waiting, ${worker.num_requests} of this router's`],
      ["Room for", count(worker.max_num_seqs, "sequence")],
      ["Waiting tokens", amount(worker.num_waiting_tokens)],
      ["KV pool", `${amount(worker.num_free_blocks)} of ${count(worker.num_blocks, "block")} free or evictable`],
      ["Named blocks", amount(worker.num_named_blocks)],
      ["A block", `${worker.block_size} tokens, ${bytes(worker.block_bytes)}`],
      ["Prefill speed", worker.prefill_tokens_per_second && `${amount(worker.prefill_tokens_per_second)} tokens/s`],
      ["A step", worker.step_ms && ms(worker.step_ms)],
      ["Step in progress", worker.step_age_seconds && `for ${ms(1000 * worker.step_age_seconds)}`],
      ["Blocks come in at", worker.transfer_bytes_per_second && `${bytes(worker.transfer_bytes_per_second)}/s`],
    ]),
  );
}

export function describeModel(sheet, { router, workers }) {
  const body = sheet.open(router.models[0]);
  const known = workers.find((worker) => worker.block_size);
  body.append(
    facts([
      ["Also answers to", router.models.slice(1).join(", ")],
      ["Context", router.max_model_len && `${count(router.max_model_len, "token")}, prompt and answer together`],
      ["Vocabulary", router.vocab_size && count(router.vocab_size, "token")],
      ["A KV block", known && `${known.block_size} tokens, ${bytes(known.block_bytes)}`],
      ["KV of a token", known && bytes(known.block_bytes / known.block_size)],
      ["Router since", clock(router.started_at)],
      ["Version", router.version],
      ["Watching", count(router.num_viewers, "page")],
    ]),
  );
}

/** A list of [name, value]; what has no value is left out. */
export function facts(rows) {
  const list = element("dl", { class: "facts" });
  for (const [name, value] of rows) {
    if (value) list.append(element("dt", {}, name), element("dd", {}, value));
  }
  return list;
}

function code(text) {
  return element("code", {}, text);
}
