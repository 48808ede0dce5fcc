"""`python -m benchmarks.report RESULT.json`: README's table, the pictures, and all figures beside the file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks import pictures, record

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BEGIN, END = "<!-- begin: python -m benchmarks.report -->", "<!-- end -->"
# README's rows and columns; those that were not measured are left out.
SHOWN = (
    "route deepseek-v3",
    "route kimi-k2",
    "route deepseek-v2",
    "route qwen3-next",
    "route + load deepseek-v3",
    "router logits",
    "plan + dispatch",
    "permute, vLLM's form",
    "align 64",
    "align 64, vLLM's form",
    "combine",
    "unpermute, vLLM's form",
    "step deepseek-v3",
    "plan + dispatch, an eighth of the experts here",
    "plan + dispatch, an eighth of the experts here, max_rows",
    "permute, vLLM's form, an eighth of the experts here",
    "unpermute, vLLM's form, an eighth of the experts here",
    "layer",
    "behind routing, an eighth of the experts here",
)
COLUMNS = (1, 64, 512, 4096, 40960)


def conditions(data: record.Data) -> list[str]:
    """What the figures were measured on and how, as lines of Markdown."""
    machine = data["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    copy, empty = machine["copy_bytes_per_second"] / 1e12, machine["empty_launch_us"]
    commits = ", ".join(dict.fromkeys(run["commit"] for run in data["runs"]))
    floor = f"Floor (in the pictures, and in table.md): bytes over the card's measured copy bandwidth ({copy:.2f} TB/s)"
    if "matmul_flops_per_second" in machine:
        floor += f", operations over that of its bfloat16 product ({machine['matmul_flops_per_second'] / 1e12:.0f} "
        floor += "TFLOP/s)"
    floor += f", or an empty launch ({empty:.2f}), whichever is more."
    return [
        f"{machine['gpu']}, driver {machine['driver']}, {versions}; {machine['note']}.",
        f"Commit {commits}, {machine['date'][:10]}.",
        f"Microseconds a call, medians inside a CUDA graph, inputs rotated. {floor}",
    ]


def table(data: record.Data) -> str:
    """A selection for README: our time, and what the fastest peer's is of it."""
    measured = record.operations(data)
    chosen = {name: measured[name] for name in SHOWN if name in measured}
    columns = [tokens for tokens in COLUMNS if any(r["tokens"] == tokens for found in chosen.values() for r in found)]
    lines = [
        *conditions(data),
        "In parentheses how many times as long the fastest of the peers takes.",
        "",
        f"| tokens | {' | '.join(f'{tokens:,}' for tokens in columns)} | peers |",
        f"|---|{'---:|' * len(columns)}---|",
    ]
    for name, found in chosen.items():
        cells = {r["tokens"]: _cell(r) for r in found}
        peers = "; ".join(dict.fromkeys(peer for r in found for peer in r["peers"]))
        lines.append(f"| {name} | {' | '.join(cells.get(tokens, '') for tokens in columns)} | {peers} |")
    return "\n".join(lines)


def _cell(r: record.Data) -> str:
    ours, best = r["jaxmoe"]["p50"], record.best_peer(r)
    shown = f"{ours:.{2 if ours < 10 else 1 if ours < 100 else 0}f}"
    return shown if best is None else f"{shown} ({best[1] / ours:.2f}x)"


def everything(data: record.Data) -> str:
    """All figures as Markdown: each operation at each size, the floor, each peer with its time over ours."""
    lines = [
        "Written by `python -m benchmarks.report`.",
        "",
        *conditions(data),
        "",
        "| operation | tokens | jaxmoe (p20 to p80) | floor | peers (their time over ours) | not timed |",
        "|---|---:|---:|---:|---|---|",
    ]
    for found in record.operations(data).values():
        for r in found:
            ours = r["jaxmoe"]
            shown = f"{ours['p50']:.2f} ({ours['p20']:.2f} to {ours['p80']:.2f})"
            rate = f", {ours['tflops']:.0f} TFLOP/s" if "tflops" in ours else ""
            peers = [f"{name} {t['p50']:.2f} ({t['p50'] / ours['p50']:.2f}x)" for name, t in r["peers"].items()]
            missing = "; ".join(f"{name}: {why}" for name, why in r.get("missing", {}).items()).replace("|", "/")
            cells = (r["operation"], r["tokens"], shown + rate, f"{r['floor_us']:.2f}", ", ".join(peers), missing)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    if wrong := [r for r in data["results"] if "error" in r]:
        lines += ["", "Not timed:", *(f"* {r['operation']} at {r['tokens']} tokens: {r['error']}" for r in wrong)]
    if growth := list(_growth(data)):
        lines += ["", f"Cost from {pictures.LINEAR_FROM} tokens on, as a straight line through the medians:", *growth]
    for kind in ("host", "huggingface"):
        if kind in data:
            lines += ["", f"## {kind}", "", *section(data[kind])]
    return "\n".join(lines) + "\n"


def _growth(data: record.Data) -> list[str]:
    lines = []
    for name, found in record.operations(data).items():
        if line := pictures.straight_line(found):
            start, slope, deviation = line
            lines.append(f"* {name}: {start:.1f} + {slope * 1000:.3f} per 1,000 tokens, at most {deviation:.1%} off")
    return lines


def section(values: dict[str, Any]) -> list[str]:
    """What `host` or `huggingface` measured, a line each; of timings the median."""
    lines = []
    for name, value in values.items():
        if isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()):
            lines += [f"* {name}", *(f"  {line}" for line in section(value))]
        elif isinstance(value, dict) and "p50" in value:
            lines.append(f"* {name}: {value['p50']:.1f}")
        else:
            lines.append(f"* {name}: {value}")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Draws the pictures, puts the table between README's marks, and writes everything beside the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("result", type=Path, help="a JSON file that `python -m jaxmoe bench` wrote")
    path = parser.parse_args(argv).result
    data = record.load(path)
    DOCS.mkdir(parents=True, exist_ok=True)
    pictures.draw_times(data, DOCS / "performance.png")
    pictures.draw_ratios(data, DOCS / "ratios.png")
    path.with_name("table.md").write_text(everything(data))
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END, 1)[1]
    readme.write_text(f"{before}{BEGIN}\n{table(data)}\n{END}{after}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
