// Light or dark: the system's choice until somebody makes another, which this browser keeps.

const THEME = "relevo-theme";
const system = matchMedia("(prefers-color-scheme: dark)");

export function makeTheme(button) {
  const show = () => {
    const chosen = localStorage.getItem(THEME);
    if (chosen) document.documentElement.dataset.theme = chosen;
    else delete document.documentElement.dataset.theme;
    button.setAttribute("aria-pressed", String(isDark(chosen)));
  };
  button.addEventListener("click", () => {
    const next = isDark(localStorage.getItem(THEME)) ? "light" : "dark";
    if ((next === "dark") === system.matches) localStorage.removeItem(THEME); // as the system has it: follow it again
    else localStorage.setItem(THEME, next);
    show();
  });
  system.addEventListener("change", show);
  show();
}

function isDark(chosen) {
  return chosen ? chosen === "dark" : system.matches;
}
