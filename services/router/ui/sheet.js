// The one dialog: its title and body are somebody's until it is closed.

import { setText } from "./dom.js";

export function makeSheet(dialog) {
  const title = dialog.querySelector("h2");
  const body = dialog.querySelector("#sheet-body");
  let onClose = () => {};
  dialog.querySelector("#sheet-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // beside it
  });
  dialog.addEventListener("close", () => {
    onClose();
    onClose = () => {};
    body.replaceChildren();
  });
  return {
    get isOpen() {
      return dialog.open;
    },
    open(text, closed = () => {}) {
      if (dialog.open) dialog.close();
      onClose = closed;
      setText(title, text);
      body.replaceChildren();
      dialog.showModal();
      dialog.scrollTop = 0;
      return body;
    },
    close: () => dialog.close(),
  };
}
