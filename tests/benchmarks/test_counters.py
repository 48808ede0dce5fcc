"""What `benchmarks.counters` makes of ncu's output (made up here; ncu needs a GPU)."""

from __future__ import annotations

import csv
import io

import pytest

from benchmarks import counters

LAUNCHED = [("route x 64", "route"), ("plan 64", "plan_count"), ("plan 64", "plan_place")]


def printed(kernels: list[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    writer.writerow(["ID", "Kernel Name", "Metric Name", "Metric Unit", "Metric Value"])
    for i, kernel in enumerate(kernels):
        for j, metric in enumerate(counters.METRICS):
            writer.writerow(
                [i, kernel, metric, "%" if "pct" in metric else "ns" if "time" in metric else "", 10 * i + j]
            )
    return f"==PROF== Connected to process 1\n{text.getvalue()}"


def test_table() -> None:
    head, rule, *rows = counters.table(printed([kernel for _, kernel in LAUNCHED]), LAUNCHED)
    assert head.count("|") == rule.count("|") == len(counters.METRICS) + 3
    assert rows[1].startswith("| plan 64 | plan_count | 10 ns | 11 | 12 | 13 | 14 |")
    assert [row.split(" | ")[1] for row in rows] == ["route", "plan_count", "plan_place"]


def test_other_launches_than_those_counted() -> None:
    with pytest.raises(RuntimeError, match=r"ncu saw .'route', 'copy'., launched were"):
        list(counters.table(printed(["route", "copy"]), LAUNCHED))
