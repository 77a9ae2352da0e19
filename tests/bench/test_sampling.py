from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from relevo.bench.cli import app
from relevo.bench.sampling import FILTERS


def test_the_command_measures_every_filter(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    options = ["sampling", "--vocab-size", "4000", "--batch", "2", "--rounds", "1", "--json", str(path)]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    figures = json.loads(path.read_text())
    assert [row["filter"] for row in figures] == list(FILTERS)
    assert all(row["flat_ms_per_row"] > 0 and row["peaked_ms_per_row"] > 0 for row in figures)
