// The stream of snapshots: kept alive, with what is to be said while it is not.

import { ApiError, call, events } from "./api.js";

const SILENCE_MS = 6000; // a snapshot comes every second
const MAX_PAUSE_MS = 5000;
const MAX_SAMPLES = 300;

/**
 * Calls on.snapshot(snapshot, samples) as they come, on.lost(message, seconds) when the stream breaks and with each
 * attempt, on.refused(message) when the key is not taken (and stops). Returns a function that stops it.
 */
export function watch(on) {
  const stopping = new AbortController();
  run(on, stopping.signal);
  return () => stopping.abort();
}

async function run(on, signal) {
  let pauseMs = 500;
  while (!signal.aborted) {
    let message = "The router has closed the connection.";
    try {
      await follow(on, signal, () => (pauseMs = 500));
    } catch (error) {
      if (signal.aborted) return;
      if (error instanceof ApiError && error.status === 401) return on.refused(error.message);
      message = error instanceof ApiError ? error.message : "The router does not answer.";
    }
    on.lost(message, pauseMs / 1000);
    await new Promise((resolve) => setTimeout(resolve, pauseMs));
    pauseMs = Math.min(MAX_PAUSE_MS, pauseMs * 1.6);
  }
}

/** One connection, to its end. */
async function follow(on, signal, worked) {
  const connection = new AbortController();
  const stop = () => connection.abort();
  signal.addEventListener("abort", stop);
  let silence = setTimeout(stop, SILENCE_MS);
  let samples = [];
  try {
    const response = await call("debug/fleet/stream", { signal: connection.signal });
    for await (const { event, data } of events(response)) {
      clearTimeout(silence);
      silence = setTimeout(stop, SILENCE_MS);
      if (event === "history") samples = JSON.parse(data);
      if (event !== "fleet") continue;
      const snapshot = JSON.parse(data);
      const { sample } = snapshot;
      if (sample && sample.at !== samples.at(-1)?.at) samples = [...samples, sample].slice(-MAX_SAMPLES);
      worked();
      on.snapshot(snapshot, samples);
    }
  } finally {
    clearTimeout(silence);
    signal.removeEventListener("abort", stop);
    stop();
  }
}
