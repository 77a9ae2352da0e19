"""What deploy/ configures: by the programs that read it, and every figure that it names is one that we have."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.test_metrics import documented

DEPLOY = Path(__file__).parents[1] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not there: apt-get install prometheus"
)


def expressions() -> list[str]:
    board = json.loads((DEPLOY / "grafana/dashboards/relevo.json").read_text())
    rules = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return found + [rule["expr"] for group in rules["groups"] for rule in group["rules"]]


@pytest.mark.parametrize(
    "command",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")],
)
@needs_promtool
def test_prometheus_takes_it(command: tuple[str, ...]) -> None:
    done = subprocess.run(["promtool", *command], cwd=PROMETHEUS, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_dashboards_queries_are_queries(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{number}", "expr": each} for number, each in enumerate(expressions())]
    file = tmp_path / "panels.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_figure_that_is_asked_for_exists() -> None:
    known: dict[str, str] = {}
    for heading in ("Agent", "Workers", "Router"):
        known |= documented(heading)
    asked = {name for each in expressions() for name in re.findall(r"\brelevo_\w+", each)}
    assert asked
    for name in asked:
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        assert name in known or known.get(base) == "histogram", f"{name} is not exported"


def test_every_file_is_yaml() -> None:
    files = list(DEPLOY.rglob("*.y*ml"))
    assert files
    for file in files:
        assert isinstance(yaml.safe_load(file.read_text()), dict), file
