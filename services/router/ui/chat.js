// The playground: a conversation, with sampling controls, streamed, and stopped when its reader wants.

import { ApiError, call, events } from "./api.js";
import { element, setText } from "./dom.js";
import { count, ms } from "./format.js";
import { makeSettings } from "./settings.js";

const EXAMPLES = ["What does os.path.join do?", "Explain what a KV cache is.", "Write a haiku about relay races."];

/** Draws into `parent`. open(id): the waterfall of an answer. onRefused(message): the key is not taken any more. */
export function makeChat(parent, { open, onRefused }) {
  const log = element("div", { class: "log", role: "log", "aria-label": "Conversation", tabindex: "0" });
  const input = element("textarea", { id: "message", rows: "1", placeholder: "Ask something", "aria-label": "Message", maxlength: "100000" });
  const send = element("button", { type: "submit", class: "primary" }, "Send");
  const stop = element("button", { type: "button", class: "primary", id: "stop", hidden: true, onclick: () => running?.abort() }, "Stop");
  const clear = element("button", { type: "button", class: "quiet small", onclick: restart }, "New chat");
  const note = element("p", { class: "note" });
  const form = element("form", { class: "composer" }, input, send, stop);
  const settings = makeSettings();
  let messages = [];
  let model = null;
  let running = null;

  parent.append(
    element("header", {}, element("h2", { id: "chat-title" }, "Chat"), note, clear),
    settings.node,
    log,
    form,
  );
  showEmpty();

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = input.value.trim();
    if (text && !running && settings.check()) ask(text);
  });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  input.addEventListener("input", grow);
  parent.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });

  return {
    show({ router }) {
      model = router.models[0];
      setText(note, router.max_model_len ? `${count(router.max_model_len, "token")} of context` : "");
    },
    /** Nothing of it stays: somebody else may come with another key. */
    forget: restart,
  };

  async function ask(text) {
    messages.push({ role: "user", content: text });
    input.value = "";
    grow();
    log.querySelector(".empty")?.remove();
    log.append(element("div", { class: "turn is-user" }, element("span", { class: "unseen" }, "You: "), text));
    const answer = addAnswer();
    running = new AbortController();
    setBusy(true);
    const ownMessages = messages;
    try {
      await stream(answer, running.signal);
      answer.done();
    } catch (error) {
      if (error.name === "AbortError") answer.done("stopped");
      else if (error instanceof ApiError && error.status === 401) return onRefused(error.message);
      else answer.fail(error instanceof ApiError ? error.message : "The connection broke in the middle of the answer.");
    } finally {
      running = null;
      setBusy(false);
    }
    if (messages !== ownMessages) return; // another chat has begun
    if (answer.text) messages.push({ role: "assistant", content: answer.text });
    else messages.pop(); // it was not answered: the next question stands alone
    if (document.activeElement === stop || document.activeElement === document.body) input.focus();
  }

  async function stream(answer, signal) {
    const body = { model, messages: settings.withSystem(messages), stream: true, stream_options: { include_usage: true }, ...settings.values() };
    const response = await call("v1/chat/completions", { body, signal });
    let isDone = false;
    for await (const { data } of events(response)) {
      if (data === "[DONE]") isDone = true;
      if (isDone) continue; // to the connection's end, so that it can be used again
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(500, chunk.error.message);
      answer.take(chunk);
    }
    if (!isDone) throw new ApiError(0, "The router ended the answer before it was done.");
  }

  function addAnswer() {
    const started = performance.now();
    const textNode = element("div", { class: "text" });
    const meta = element("p", { class: "meta" });
    log.append(element("div", { class: "turn is-model" }, element("span", { class: "unseen" }, "Answer: "), textNode, meta));
    keepAtEnd(true);
    let firstAt = null;
    let usage = null;
    let numChunks = 0;
    const answer = {
      id: null,
      text: "",
      finish: null,
      take(chunk) {
        answer.id = chunk.id;
        if (chunk.usage) usage = chunk.usage;
        const choice = chunk.choices[0];
        if (!choice) return;
        answer.finish = choice.finish_reason ?? answer.finish;
        if (!choice.delta.content) return;
        firstAt ??= performance.now();
        numChunks += 1;
        answer.text += choice.delta.content;
        const stays = isAtEnd();
        textNode.append(choice.delta.content);
        keepAtEnd(stays);
      },
      done(how = answer.finish === "length" ? "stopped at its limit" : "") {
        const seconds = (performance.now() - (firstAt ?? started)) / 1000;
        const tokens = usage?.completion_tokens ?? numChunks;
        const facts = [
          how,
          firstAt && `first token ${ms(firstAt - started)}`,
          tokens > 1 && `${count(tokens, "token")}, ${(tokens / Math.max(seconds, 1e-3)).toFixed(0)} tok/s`,
        ];
        meta.append(facts.filter(Boolean).join(" · "));
        if (!answer.text) textNode.append(element("span", { class: "note" }, "(nothing was said)"));
        if (answer.id) {
          const look = element("button", { type: "button", class: "link", "aria-haspopup": "dialog", onclick: () => open(answer.id) }, "Where its time went");
          meta.append(" ", look);
        }
        keepAtEnd(true);
      },
      fail(message) {
        meta.append(element("span", { class: "error" }, message));
        keepAtEnd(true);
      },
    };
    return answer;
  }

  function setBusy(isBusy) {
    log.setAttribute("aria-busy", String(isBusy)); // screen readers wait for the whole answer
    const hadFocus = document.activeElement === send;
    send.hidden = isBusy;
    stop.hidden = !isBusy;
    if (hadFocus && isBusy) stop.focus();
  }

  function restart() {
    running?.abort();
    messages = [];
    showEmpty();
    input.focus();
  }

  function showEmpty() {
    const examples = EXAMPLES.map((text) =>
      element("li", {}, element("button", { type: "button", class: "example", onclick: () => !running && settings.check() && ask(text) }, text)),
    );
    log.replaceChildren(
      element(
        "div",
        { class: "empty" },
        element("strong", {}, "Talk to the model"),
        "and watch which way each request takes.",
        element("ul", {}, ...examples),
      ),
    );
  }

  function isAtEnd() {
    return log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  }

  function keepAtEnd(wanted) {
    if (wanted) log.scrollTop = log.scrollHeight;
  }

  function grow() {
    input.style.height = "auto";
    input.style.height = `${Math.min(160, input.scrollHeight + 2)}px`;
  }
}
