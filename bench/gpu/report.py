"""What was found: one table to read, and JSON to keep."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from bench.gpu import figures
from bench.gpu.figures import Figure, is_met, ratio_text, target_text
from bench.gpu.parts import Bench, Part

HEADINGS = ("figure", "measured", "against its bound", "target", "met")


def describe(device: torch.device, backend: str) -> dict[str, str]:
    """Of device and software, for the heading."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    packages = {package: _version(package) for package in ("torch", "triton", "transformers")}
    cuda = {"cuda": str(torch.version.cuda)} if device.type == "cuda" else {}
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"device": name, "date": date, "backend": backend, "python": platform.python_version(), **packages, **cuda}


def make_report(bench: Bench, plan: Sequence[Part], about: dict[str, str], seconds: float) -> dict[str, Any]:
    """Plain data, for JSON."""
    return {
        "about": about,
        "tiny": bench.tiny,
        "seconds": round(seconds, 1),
        "checks": [{"name": check.name, "ok": check.ok, "detail": check.detail} for check in bench.checks],
        "figures": [_figure(bench, figure) for part in plan for figure in part.figures],
        "parts": [{"name": name, "seconds": round(took, 2)} for name, took in bench.seconds.items()],
    }


def _figure(bench: Bench, figure: Figure) -> dict[str, Any]:
    found = bench.measured.get(figure.key)
    known = {"key": figure.key, "label": figure.label, "unit": figure.unit, "bound": figure.bound}
    wanted = {"target": figure.target, "moonshot": figure.moonshot}
    if found is None:
        reason = bench.missing.get(figure.key, "the run ended before")
        return known | wanted | {"value": None, "ratio": None, "met": None, "not_measured": reason}
    judged = found.ratio is not None and not bench.tiny
    met = is_met(figure, found.ratio, figure.target) if judged and found.ratio is not None else None
    return known | wanted | {"value": found.value, "ratio": found.ratio, "met": met, "remark": found.remark}


def print_report(report: dict[str, Any]) -> None:
    about = report["about"]
    passed = sum(check["ok"] is True for check in report["checks"])
    print(f"\n{about['device']} · {about['date']} · backend {about['backend']}")
    print(
        " · ".join(
            f"{name} {about[name]}" for name in ("python", "torch", "triton", "transformers", "cuda") if name in about
        )
    )
    print(f"{report['seconds']:.0f} s; {passed} of {len(report['checks'])} correctness checks passed")
    for check in report["checks"]:
        if check["ok"] is not True:
            print(f"  {'FAILED' if check['ok'] is False else 'not run'}: {check['name']}: {check['detail']}")
    if report["tiny"]:
        print("Tiny shapes, whatever the labels name: these figures only show that everything runs; no target applies.")
    by_key = {figure.key: figure for figure in all_figures()}
    rows = [_row(entry, by_key[entry["key"]], tiny=report["tiny"]) for entry in report["figures"]]
    widths = [max(len(row[i]) for row in (HEADINGS, *rows)) for i in range(len(HEADINGS))]
    print()
    for row in (HEADINGS, tuple("─" * width for width in widths), *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for entry in report["figures"]:
        if entry.get("remark"):
            print(f"{entry['label']}: {entry['remark']}")


def all_figures() -> list[Figure]:
    models = (figures.LLAMA, figures.QWEN, figures.MOE)
    single = (figures.MACHINE, figures.KERNELS, figures.THROUGHPUT, figures.GENERATE, figures.CONTINUOUS)
    of_models = [group(model) for model in models for group in (figures.decode_figures, figures.prefill_figures)]
    return [figure for group in (*single, figures.HANDOVER, *of_models) for figure in group]


def _row(entry: dict[str, Any], figure: Figure, *, tiny: bool) -> tuple[str, ...]:
    target = "" if tiny else target_text(figure)
    if entry["value"] is None:
        return figure.label, f"not measured: {entry['not_measured']}", "", target, ""
    ratio = "" if entry["ratio"] is None else ratio_text(figure, entry["ratio"])
    met = {None: "", True: "met", False: "not met"}[entry["met"]]
    if entry["met"] and is_met(figure, entry["ratio"], figure.moonshot):
        met = "met, moonshot too"
    return figure.label, f"{_number(entry['value'])} {figure.unit}", ratio, target, met


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def write_json(report: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
