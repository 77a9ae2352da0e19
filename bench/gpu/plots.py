"""Plots of what was measured, where matplotlib is installed."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.gpu.figures import BATCHES, BYTES, COPY, LLAMA, MATRIX, MOE, QWEN


def write_plots(report: dict[str, Any], folder: Path) -> list[Path]:
    """TPOT by batch size beside its bound; shares of the device's rates. None without matplotlib."""
    if find_spec("matplotlib") is None:
        return []
    import_module("matplotlib").use("Agg")
    pyplot: Any = import_module("matplotlib.pyplot")
    entries = {entry["key"]: entry for entry in report["figures"] if entry["ratio"] is not None}
    title = f"{report['about']['device']}, {report['about']['date']}{', tiny shapes' if report['tiny'] else ''}"
    share_plot = _share_plot(pyplot, entries, title, folder, with_targets=not report["tiny"])
    return [_decode_plot(pyplot, entries, title, folder), share_plot]


def _decode_plot(pyplot: Any, entries: dict[str, Any], title: str, folder: Path) -> Path:
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for shape in (LLAMA, QWEN, MOE):
        points = [(n, entries[key]) for n in BATCHES if (key := f"{shape}/tpot_{n}") in entries]
        if not points:
            continue
        sizes = [n for n, _ in points]
        (line,) = axes.plot(sizes, [entry["value"] for _, entry in points], marker="o", label=shape)
        least = [entry["value"] / entry["ratio"] for _, entry in points]
        axes.plot(sizes, least, linestyle=":", color=line.get_color(), label=f"{shape}, {BYTES.removeprefix('× ')}")
    axes.set(xscale="log", yscale="log", xlabel="requests in the batch", ylabel="TPOT, ms")
    figure.suptitle(title)
    axes.set_xticks(BATCHES, [str(n) for n in BATCHES])
    axes.tick_params(axis="x", which="minor", bottom=False)
    if axes.lines:
        axes.legend(fontsize="small")
    return _save(pyplot, figure, folder / "decode.png")


def _share_plot(pyplot: Any, entries: dict[str, Any], title: str, folder: Path, *, with_targets: bool) -> Path:
    shares = [entry for entry in entries.values() if entry["bound"] in (COPY, MATRIX)]
    figure, axes = pyplot.subplots(figsize=(8, 0.4 * len(shares) + 1.5), layout="constrained")
    for row, entry in enumerate(reversed(shares)):
        axes.barh(row, 100 * entry["ratio"], color="C0" if entry["bound"] == COPY else "C1")
        if with_targets and entry["target"] is not None:
            axes.plot([100 * entry["target"]] * 2, [row - 0.4, row + 0.4], color="black")
    axes.set_yticks(range(len(shares)), [f"{entry['label']}, {entry['bound']}" for entry in reversed(shares)])
    axes.set(xlabel="% (black: target)" if with_targets else "%")
    figure.suptitle(title)
    return _save(pyplot, figure, folder / "shares.png")


def _save(pyplot: Any, figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
