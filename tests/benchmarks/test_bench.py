"""The parts of the benchmarks that need no GPU: the refusal, the report, how many inputs are rotated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report, timing
from jaxmoe.__main__ import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to time")
def test_bench_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what is missing and writes no file: times of anything else would pass for a GPU's."""
    path = tmp_path / "result.json"
    assert main(["bench", "--output", str(path)]) == 2
    printed = capsys.readouterr()
    assert "needs a CUDA or ROCm GPU that torch sees" in printed.err
    assert printed.out == ""
    assert not path.exists()


def record(operation: str, tokens: int, ours: float, **peers: float) -> dict[str, Any]:
    times = lambda p50: {"p20": p50 / 2, "p50": p50, "p80": p50 * 2}
    return {
        "operation": operation,
        "tokens": tokens,
        "floor_us": 1.25,
        "jaxmoe": times(ours),
        "peers": {name: times(p50) for name, p50 in peers.items()},
    }


@pytest.fixture
def data() -> dict[str, Any]:
    """What `bench` writes, made up: all panels of the picture, another operation, a peer at one size only."""
    return {
        "machine": {
            "gpu": "Card X",
            "driver": "1.2.3",
            "versions": {"jax": "0.11.2", "torch": "2.11"},
            "date": "2026-11-21T10:20:30+00:00",
            "commit": "abc1234",
            "note": "a note",
            "copy_bytes_per_second": 2.5e12,
            "empty_launch_us": 1.25,
        },
        "results": [
            *(record(panel, tokens, 2.0, Peer=3.0) for panel in report.PANELS for tokens in (1, 64)),
            record("route kimi-k2", 4096, 8.0, Peer=12.0, Other=4.0),
            record("load", 1, 1.5),
        ],
    }


def test_table(data: dict[str, Any]) -> None:
    """Medians, the ratio the right way up (a slower peer is above 1), a row for each record, and the conditions."""
    text, table = report.table(data).split("\n\n")
    names, rule, *rows = table.splitlines()
    assert len(rows) == len(data["results"])
    assert rows[0] == "| route deepseek-v3 | 1 | 2.00 | 1.25 | Peer 3.0 (1.50x) |"
    assert rows[-2:] == [
        "| route kimi-k2 | 4096 | 8.00 | 1.25 | Peer 12.0 (1.50x), Other 4.0 (0.50x) |",
        "| load | 1 | 1.50 | 1.25 |  |",
    ]
    assert names.count("|") == rule.count("|") == rows[0].count("|")
    machine = ("Card X", "driver 1.2.3", "jax 0.11.2", "torch 2.11", "a note", "abc1234", "2026-11-21", "2.50 TB/s")
    for condition in machine:
        assert condition in text


def test_readme_and_picture(data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what stands between the marks is replaced, however often the report is made."""
    source, readme, picture = tmp_path / "result.json", tmp_path / "README.md", tmp_path / "docs" / "picture.png"
    source.write_text(json.dumps(data))
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "PICTURE", picture)
    for _ in range(2):
        assert report.main([str(source)]) == 0
        assert readme.read_text() == f"before\n{report.BEGIN}\n{report.table(data)}\n{report.END}\nafter\n"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("bytes_of_one", "calls", "beyond", "sets"),
    [
        (1 << 30, 20, 160 << 20, 2),  # more than the cache by itself: still another set for the next call
        (40 << 20, 20, 160 << 20, 4),
        ((40 << 20) - 1, 20, 160 << 20, 5),  # rounded up: four would just fit
        (512, 20, 160 << 20, 20),  # never more than there are calls to use them
        (0, 20, 160 << 20, 20),  # no division by zero
        (1, 1, 10, 2),
    ],
)
def test_input_sets(bytes_of_one: int, calls: int, beyond: int, sets: int) -> None:
    """Enough input sets that one call does not find in the cache what the last one left, and no more than needed."""
    assert timing.input_sets(bytes_of_one, calls=calls, beyond=beyond) == sets


def test_input_sets_of_the_benchmarks() -> None:
    """The sizes that are timed, with the defaults: 40960 tokens of 256 bfloat16 logits are 20 MiB."""
    assert timing.input_sets(40960 * 256 * 2) == 8
