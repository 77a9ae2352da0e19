"""docs/metrics.md is what the processes export, word for word."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.metrics_page import metrics_page

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"


def documented(heading: str) -> dict[str, str]:
    """Name → type, of the table below a heading."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| `(relevo_\w+)` \| (\w+) \|", section, re.M))


async def test_the_page_is_what_the_code_exports() -> None:
    """If not: python -m tests.support.metrics_page > docs/metrics.md"""
    assert PAGE.read_text() == await metrics_page()


async def test_every_figure_says_what_it_is_and_has_a_name_in_the_fields_manner() -> None:
    page = await metrics_page()
    for section in page.split("\n## ")[1:]:
        rows = re.findall(r"^\| `(\w+)` \| (\w+) \| [^|]*\| (.*) \|$", section, re.M)
        assert len(rows) > 10
        assert len({name for name, _, _ in rows}) == len(rows), "a name stands there twice"
        for name, kind, meaning in rows:
            assert name.endswith("_total") == (kind == "counter") and len(meaning) > 5, name
