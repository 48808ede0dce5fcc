"""`python -m benchmarks.report RESULT.json`: the README's table and picture, from a file that `bench` wrote."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "performance.png"
BEGIN, END = "<!-- begin: python -m benchmarks.report -->", "<!-- end -->"
PANELS = ("route deepseek-v3", "route kimi-k2", "plan + dispatch", "combine")


def table(data: dict[str, Any]) -> str:
    """The results as a Markdown table: ours, the floor, and each peer with its time over ours."""
    machine = data["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    copy, empty = machine["copy_bytes_per_second"] / 1e12, machine["empty_launch_us"]
    lines = [
        f"{machine['gpu']}, driver {machine['driver']}, {versions}; {machine['note']}.",
        f"Commit {machine['commit']}, {machine['date'][:10]}.",
        "Microseconds a call, medians inside a CUDA graph, inputs rotated. Floor: bytes over the card's measured copy",
        f"bandwidth ({copy:.2f} TB/s), or an empty launch ({empty:.2f}) where that is more.",
        "",
        "| operation | tokens | jaxmoe | floor | peers (their time over ours) |",
        "|---|---:|---:|---:|---|",
    ]
    for r in data["results"]:
        ours = r["jaxmoe"]["p50"]
        peers = ", ".join(f"{name} {t['p50']:.1f} ({t['p50'] / ours:.2f}x)" for name, t in r["peers"].items())
        lines.append(f"| {r['operation']} | {r['tokens']} | {ours:.2f} | {r['floor_us']:.2f} | {peers} |")
    return "\n".join(lines)


def draw(data: dict[str, Any], target: Path) -> None:
    """Time over tokens: ours, the peers', and the floor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.9), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    colors = {"jaxmoe": "#0b6e4f", "FlashInfer": "#c77d0a"}
    for axis, panel in zip(axes, PANELS, strict=True):
        records = [r for r in data["results"] if r["operation"] == panel]
        tokens = [r["tokens"] for r in records]
        for peer in sorted({name for r in records for name in r["peers"]}):
            here = [(r["tokens"], r["peers"][peer]["p50"]) for r in records if peer in r["peers"]]
            axis.plot(*zip(*here, strict=True), marker="o", ms=4, color=colors.get(peer, "#7a3e9d"), label=peer)
        ours = [r["jaxmoe"]["p50"] for r in records]
        axis.plot(tokens, ours, marker="o", ms=5, lw=2.4, color=colors["jaxmoe"], label="jaxmoe")
        axis.plot(tokens, [r["floor_us"] for r in records], ls="--", color="0.45", label="floor")
        axis.set(xscale="log", yscale="log", title=panel, xlabel="tokens")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("microseconds a call")
    machine = data["machine"]
    figure.suptitle(f"{machine['gpu']}, medians inside a CUDA graph, {machine['date'][:10]}", fontsize=10)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=100)


def main(argv: list[str] | None = None) -> int:
    """Draws the picture and puts the table between the README's marks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("result", type=Path, help="a JSON file that `python -m jaxmoe bench` wrote")
    data = json.loads(parser.parse_args(argv).result.read_text())
    draw(data, PICTURE)
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END, 1)[1]
    readme.write_text(f"{before}{BEGIN}\n{table(data)}\n{END}{after}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
