// The four figures at the top: now, and the last five minutes as a chart.

import { drawing, element, setText } from "./dom.js";
import { NOTHING, amount, clock, duration, ms, rate, together } from "./format.js";

const MAX_SECONDS = 300;
const MIN_SECONDS = 60;
const WIDTH = 300; // of the drawing; it is stretched to the card
const HEIGHT = 84;
const TOP = 14;
const BOTTOM = 4;

const FIGURES = [
  {
    title: "Time to first token",
    role: "prefill",
    lines: [{ of: "ttft_p50" }, { of: "ttft_p95" }],
    value: (samples) => duration(latest(samples, "ttft_p50")),
    beside: (samples) => `median · p95 ${ms(latest(samples, "ttft_p95"))}`,
    at: (sample) => `median ${ms(sample.ttft_p50)} · p95 ${ms(sample.ttft_p95)}`,
    scale: (top) => ms(top),
  },
  {
    title: "Time per token",
    role: "decode",
    lines: [{ of: "tpot_p50" }, { of: "tpot_p95" }],
    value: (samples) => duration(latest(samples, "tpot_p50")),
    beside: (samples) => `median · p95 ${ms(latest(samples, "tpot_p95"))}`,
    at: (sample) => `median ${ms(sample.tpot_p50)} · p95 ${ms(sample.tpot_p95)}`,
    scale: (top) => ms(top),
  },
  {
    title: "Throughput",
    role: "decode",
    lines: [{ of: "output_tokens_per_second" }],
    value: (samples) => rate(mean(samples, "output_tokens_per_second", 3), "tok"),
    beside: (samples) => `${amount(mean(samples, "prompt_tokens_per_second", 10) ?? 0)} prompt tok/s`,
    at: (sample) => `${amount(sample.output_tokens_per_second)} out, ${amount(sample.prompt_tokens_per_second)} in tok/s`,
    scale: (top) => `${amount(top)} tok/s`,
  },
  {
    title: "In flight",
    role: "router",
    lines: [{ of: "running" }, { of: "queued", alarm: true }],
    value: (samples) => ({ value: samples.length ? String(samples.at(-1).running) : NOTHING, unit: "running" }),
    beside: (samples) =>
      `${samples.at(-1)?.queued ?? 0} queued · ${amount(mean(samples, "requests_per_second", 10) ?? 0)} req/s`,
    at: (sample) => `${sample.running} running · ${sample.queued} queued`,
    scale: (top) => String(Math.round(top)),
  },
];

/** Draws into `parent`; returns show(samples). */
export function makeFigures(parent) {
  const cards = FIGURES.map(makeCard);
  parent.append(...cards.map((card) => card.node));
  return (samples) => cards.forEach((card) => card.show(samples));
}

function makeCard(figure) {
  const value = element("span");
  const unit = element("span", { class: "unit" });
  const beside = element("p", { class: "beside" });
  const chart = drawing("svg", {
    class: `chart of-${figure.role}`,
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    preserveAspectRatio: "none",
    role: "img",
  });
  let shown = [];
  let pointed = null;

  const draw = () => {
    const now = figure.value(shown);
    setText(value, now.value);
    setText(unit, now.unit);
    setText(beside, pointed ? `${clock(pointed.at)} · ${figure.at(pointed)}` : figure.beside(shown));
    const width = chart.clientWidth || WIDTH;
    chart.setAttribute("viewBox", `0 0 ${width} ${chart.clientHeight || HEIGHT}`);
    chart.setAttribute("aria-label", `${figure.title}, up to the last five minutes: now ${together(now)}, ${figure.beside(shown)}`);
    chart.replaceChildren(...plot(figure, shown, pointed, width, chart.clientHeight || HEIGHT));
  };
  chart.addEventListener("pointermove", (event) => {
    const box = chart.getBoundingClientRect();
    const seconds = span(shown) * (1 - (event.clientX - box.left) / box.width);
    pointed = nearest(shown, seconds);
    draw();
  });
  chart.addEventListener("pointerleave", () => {
    pointed = null;
    draw();
  });
  new ResizeObserver(draw).observe(chart);

  return {
    node: element(
      "article",
      { class: "figure" },
      element("h2", {}, figure.title),
      element("p", { class: "value" }, value, unit),
      beside,
      chart,
    ),
    show(samples) {
      shown = samples;
      draw();
    },
  };
}

function plot(figure, samples, pointed, width, height) {
  const end = samples.at(-1)?.at ?? 0;
  const all = samples.flatMap((sample) => figure.lines.map((line) => sample[line.of] ?? 0));
  const top = niceTop(Math.max(0, ...all));
  const seconds = span(samples);
  const x = (sample) => width * (1 - (end - sample.at) / seconds);
  const y = (number) => height - BOTTOM - (height - TOP - BOTTOM) * Math.min(1, number / top);
  const parts = [
    drawing("line", { class: "grid", x1: 0, x2: width, y1: TOP, y2: TOP }),
    drawing("text", { x: 6, y: TOP - 4 }, all.length && top > 0 ? figure.scale(top) : ""),
    drawing("text", { x: width - 6, y: TOP - 4, "text-anchor": "end" }, seconds > 90 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds)} s`),
  ];
  figure.lines.forEach((line, nth) => {
    for (const run of runs(samples, line.of)) {
      const points = run.map((sample) => `${x(sample).toFixed(1)},${y(sample[line.of]).toFixed(1)}`);
      if (points.length === 1) points.push(`${(x(run[0]) + 1.5).toFixed(1)},${y(run[0][line.of]).toFixed(1)}`);
      if (line.alarm && run.every((sample) => !sample[line.of])) continue;
      if (nth === 0) {
        const area = `M${points.join("L")}L${x(run.at(-1)).toFixed(1)},${height}L${x(run[0]).toFixed(1)},${height}Z`;
        parts.push(drawing("path", { class: "area", d: area }));
      }
      const kind = line.alarm ? "alarm" : nth === 0 ? "first" : "second";
      parts.push(drawing("path", { class: kind, d: `M${points.join("L")}` }));
    }
  });
  if (pointed) parts.push(drawing("line", { class: "cursor", x1: x(pointed), x2: x(pointed), y1: TOP, y2: height }));
  return parts;
}

/** Seconds that the charts show: what there is, up to five minutes. */
function span(samples) {
  const seconds = samples.length ? samples.at(-1).at - samples[0].at : 0;
  return Math.min(MAX_SECONDS, Math.max(MIN_SECONDS, seconds));
}

/** Stretches of samples that have the figure. */
function runs(samples, of) {
  const found = [];
  let run = [];
  for (const sample of samples) {
    if (sample[of] !== null) run.push(sample);
    else if (run.length) {
      found.push(run);
      run = [];
    }
  }
  if (run.length) found.push(run);
  return found;
}

function niceTop(highest) {
  if (highest <= 0) return 1;
  const step = 10 ** Math.floor(Math.log10(highest));
  return [1, 1.5, 2, 3, 5, 7.5, 10].map((factor) => factor * step).find((top) => top >= highest);
}

/** The newest that is known, if it is not older than half a minute. */
function latest(samples, of) {
  for (let index = samples.length - 1; index >= Math.max(0, samples.length - 30); index -= 1) {
    if (samples[index][of] !== null) return samples[index][of];
  }
  return null;
}

function mean(samples, of, count) {
  const last = samples.slice(-count);
  return last.length ? last.reduce((sum, sample) => sum + sample[of], 0) / last.length : null;
}

function nearest(samples, secondsAgo) {
  if (!samples.length) return null;
  const at = samples.at(-1).at - secondsAgo;
  return samples.reduce((best, sample) => (Math.abs(sample.at - at) < Math.abs(best.at - at) ? sample : best));
}
