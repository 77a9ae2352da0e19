// Numbers for people. Each of value + unit: { value: "1.2", unit: "s" }.

export const NOTHING = "–";

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export function duration(ms) {
  if (ms === null || ms === undefined) return { value: NOTHING, unit: "" };
  if (ms > 0 && ms < 0.05) return { value: "< 0.1", unit: "ms" };
  if (ms < 10) return { value: ms.toFixed(1), unit: "ms" };
  if (ms < 1000) return { value: ms.toFixed(0), unit: "ms" };
  if (ms < 60_000) return { value: (ms / 1000).toFixed(ms < 10_000 ? 2 : 1), unit: "s" };
  return { value: (ms / 60_000).toFixed(1), unit: "min" };
}

export function rate(perSecond, unit) {
  if (perSecond === null || perSecond === undefined) return { value: NOTHING, unit: "" };
  return { value: amount(perSecond), unit: `${unit}/s` };
}

export function amount(number) {
  if (number >= 1e6) return `${(number / 1e6).toFixed(1)}M`;
  if (number >= 1e4) return `${(number / 1e3).toFixed(number >= 1e5 ? 0 : 1)}k`;
  if (number < 10 && !Number.isInteger(number)) return number.toFixed(1);
  return whole.format(number);
}

export function bytes(number) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  let step = 0;
  while (number >= 1000 && step < units.length - 1) {
    number /= 1000;
    step += 1;
  }
  return `${number >= 100 || step === 0 ? number.toFixed(0) : number.toFixed(1)} ${units[step]}`;
}

export function together({ value, unit }) {
  return unit ? `${value} ${unit}` : value;
}

export const ms = (number) => together(duration(number));

export function count(number, one, many = `${one}s`) {
  return `${whole.format(number)} ${number === 1 ? one : many}`;
}

export function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString("en-GB");
}

/** Of a request: chatcmpl-0123456789abcdef…-0 → 01234567, or 01234567·2 for a choice that is not the first. */
export function shortId(id) {
  const found = /^(?:chatcmpl|cmpl)-([^-]+)-(\d+)$/.exec(id);
  if (!found) return id.slice(0, 12);
  return found[1].slice(0, 8) + (found[2] === "0" ? "" : `·${found[2]}`);
}
