"""README's table, the pictures and the table of everything, from made-up results and from those that are kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pictures, record, report

ROOT = Path(__file__).parents[2]


def timings(operation: str, tokens: int, ours: float, **peers: float) -> dict[str, Any]:
    times = lambda p50: {"p20": p50 / 2, "p50": p50, "p80": p50 * 2}
    return {
        "operation": operation,
        "tokens": tokens,
        "floor_us": 1.25,
        "jaxmoe": times(ours),
        "peers": {name: times(p50) for name, p50 in peers.items()},
        "missing": {},
        "run": 0,
    }


@pytest.fixture
def data() -> dict[str, Any]:
    """What `bench` writes, made up: all panels of the pictures, other operations, a failure, what measures alone."""
    machine = {
        "gpu": "Card X",
        "driver": "1.2.3",
        "versions": {"jax": "0.11.2", "torch": "2.11"},
        "date": "2026-11-21T10:20:30+00:00",
        "commit": "abc1234",
        "note": "a note",
        "copy_bytes_per_second": 2.5e12,
        "matmul_flops_per_second": 8e14,
        "empty_launch_us": 1.25,
    }
    sizes = (1, 64, 4096, 10000, 16384, 40960)
    results = [
        *(timings(name, tokens, 2.0 + tokens / 1000, Peer=3.0) for name in pictures.RATIOS for tokens in sizes),
        timings("route kimi-k2, other", 4096, 8.0, Peer=12.0, Other=4.0),
        timings("load", 1, 1.5) | {"missing": {"Peer": "RuntimeError: a | b"}},
        {"operation": "load", "tokens": 64, "error": "AssertionError: wrong", "peers": {}, "run": 1},
    ]
    later = {**machine, "commit": "def5678"}
    host = {"microseconds a call": {"bridge.route": 9.5}, "run": 1}
    layers = {"patched": {"decode, graph": {"p20": 1.0, "p50": 2.0, "p80": 3.0}, "decode": {"error": "why not"}}}
    return {"machine": later, "runs": [machine, later], "results": results, "host": host, "huggingface": layers}


def test_table(data: dict[str, Any]) -> None:
    """Medians, the ratio to the fastest peer the right way up (slower is above 1), and the conditions."""
    text, table = report.table(data).split("\n\n")
    names, rule, *rows = table.splitlines()
    assert names == "| tokens | 1 | 64 | 4,096 | 40,960 | peers |"
    assert rows[0] == "| route deepseek-v3 | 2.00 (1.50x) | 2.06 (1.45x) | 6.10 (0.49x) | 43.0 (0.07x) | Peer |"
    assert len(rows) == len({*report.SHOWN} & {r["operation"] for r in data["results"]})
    assert names.count("|") == rule.count("|") == rows[0].count("|")
    machine = ("Card X", "driver 1.2.3", "jax 0.11.2", "torch 2.11", "a note", "2026-11-21", "2.50 TB/s", "800 TFLOP/s")
    for condition in (*machine, "Commit abc1234, def5678"):
        assert condition in text


def test_everything(data: dict[str, Any]) -> None:
    """Every timing, what was not timed and why, how cost grows, what measures by itself."""
    text = report.everything(data)
    assert (
        "| route kimi-k2, other | 4096 | 8.00 (4.00 to 16.00) | 1.25 | Peer 12.00 (1.50x), Other 4.00 (0.50x) |" in text
    )
    assert "| load | 1 | 1.50 (0.75 to 3.00) | 1.25 |  | Peer: RuntimeError: a / b |" in text
    assert "* load at 64 tokens: AssertionError: wrong" in text
    assert "* route deepseek-v3: 2.0 + 1.000 per 1,000 tokens, at most 0.0% off" in text
    assert "## host\n\n* microseconds a call" in text
    assert "* patched\n  * decode, graph: 2.0\n  * decode: {'error': 'why not'}" in text


def test_straight_line() -> None:
    found = [timings("x", tokens, 1.0 + tokens * 0.01) for tokens in (1, 4096, 8192, 16384, 32768)]
    start, slope, deviation = pictures.straight_line(found) or (0.0, 0.0, 1.0)
    assert (start, slope) == pytest.approx((1.0, 0.01))
    assert deviation < 1e-9
    found[-1]["jaxmoe"]["p50"] *= 2
    assert (pictures.straight_line(found) or (0.0, 0.0, 0.0))[2] > 0.1
    assert pictures.straight_line(found[:4]) is None


def make(data: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the report in a folder of its own; what stands in README then."""
    source, readme = folder / "bench.json", folder / "README.md"
    source.write_text(json.dumps(data))
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    monkeypatch.setattr(report, "ROOT", folder)
    monkeypatch.setattr(report, "DOCS", folder / "docs")
    assert report.main([str(source)]) == 0
    for name in ("performance.png", "ratios.png"):
        assert (folder / "docs" / name).read_bytes().startswith(b"\x89PNG")
    return readme.read_text()


def test_readme_and_pictures(data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what stands between the marks is replaced, however often the report is made."""
    text = make(data, tmp_path, monkeypatch)
    for draw in ("draw_times", "draw_ratios"):
        monkeypatch.setattr(pictures, draw, lambda *_: None)
    assert report.main([str(tmp_path / "bench.json")]) == 0
    assert (tmp_path / "README.md").read_text() == text
    assert text == f"before\n{report.BEGIN}\n{report.table(data)}\n{report.END}\nafter\n"
    assert (tmp_path / "table.md").read_text() == report.everything(data)


def test_results_that_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files in the repository can be read, those of the first form too."""
    if not (ROOT / "benchmarks" / "results").exists():
        pytest.skip("a source distribution has no results")
    files = sorted((ROOT / "benchmarks" / "results").glob("*/bench.json"))
    assert files
    assert any("runs" not in json.loads(file.read_text()) for file in files)
    for file in files:
        data = record.load(file)
        assert all(r["run"] < len(data["runs"]) for r in data["results"])
        drawn = file in (files[0], files[-1])  # a picture takes seconds
        text = make(data, tmp_path, monkeypatch) if drawn else f"\n{report.table(data)}"
        for name in record.operations(data):
            assert (f"\n| {name} |" in text) == (name in report.SHOWN)


def test_nothing_to_draw(data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of one operation that has no panel."""
    data["results"] = [timings("load", 1, 1.5)]
    make(data, tmp_path, monkeypatch)
