"""The pictures of a results file: time over tokens with the floor, and the ratio to the best peer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record

# Operation, and whether on straight axes: cost grows linearly from LINEAR_FROM tokens on.
PANELS = (
    ("route deepseek-v3", False),
    ("route deepseek-v3", True),
    ("route kimi-k2", False),
    ("router logits", False),
    ("plan + dispatch", False),
    ("combine", False),
    ("align 64", False),
    ("step deepseek-v3", False),
)
RATIOS = (*dict.fromkeys(name for name, _ in PANELS), "layer")
LINEAR_FROM = 4096
OURS = "#0b6e4f"
COLORS = {"vLLM": "#7a3e9d", "FlashInfer": "#c77d0a", "torch": "#2f6db5", "XLA": "#6b705c"}
OTHER, STYLES = "#b23a48", ("-", ":", "-.", "--")


def straight_line(found: list[record.Data]) -> tuple[float, float, float] | None:
    """(microseconds at 0, microseconds a token, the largest deviation as a share), None for fewer than four sizes.

    Through the medians from LINEAR_FROM tokens on, deviations weighed as shares.
    """
    here = [(r["tokens"], r["jaxmoe"]["p50"]) for r in found if r["tokens"] >= LINEAR_FROM]
    if len(here) < 4:
        return None
    tokens, times = np.array(here, float).T
    slope, start = np.polyfit(tokens, times, 1, w=1 / times)
    return float(start), float(slope), float(np.abs((start + slope * tokens) / times - 1).max())


def draw_times(data: record.Data, target: Path) -> None:
    """Time over tokens: ours, the peers', and the floor."""
    from matplotlib.figure import Figure

    measured = record.operations(data)
    panels = [(name, straight) for name, straight in PANELS if name in measured]
    panels = [(n, s) for n, s in panels if not s or sum(r["tokens"] >= LINEAR_FROM for r in measured[n]) > 1]
    columns = max(1, min(4, len(panels)))
    lines = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(3.9 * columns, 3.9 * lines), layout="constrained")
    for number, (name, straight) in enumerate(panels):
        axis = figure.add_subplot(lines, columns, number + 1)
        found = [r for r in measured[name] if not straight or r["tokens"] >= LINEAR_FROM]
        for peer, style in _styles(found).items():
            if straight and peer.startswith(("torch", "XLA")):
                continue  # they would squeeze the others
            here = [(r["tokens"], r["peers"][peer]["p50"]) for r in found if peer in r["peers"]]
            axis.plot(*zip(*here, strict=True), marker="o", ms=3.5, lw=1.2, label=peer, **style)
        tokens = [r["tokens"] for r in found]
        ours = [r["jaxmoe"]["p50"] for r in found]
        axis.plot(tokens, ours, marker="o", ms=4.5, lw=2.4, color=OURS, label="jaxmoe")
        axis.plot(tokens, [r["floor_us"] for r in found], ls="--", color="0.45", label="floor")
        if straight:
            axis.set(title=f"{name}, straight axes", xlim=(0, None), ylim=(0, None))
        else:
            axis.set(title=name, xscale="log", yscale="log")
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=7)
        if number % columns == 0:
            axis.set_ylabel("microseconds a call")
    figure.suptitle(_title(data), fontsize=10)
    figure.savefig(target, dpi=100)


def _styles(found: list[record.Data]) -> dict[str, dict[str, Any]]:
    """How each peer is drawn: a library has one colour in every panel."""
    styles: dict[str, dict[str, Any]] = {}
    for peer in sorted({peer for r in found for peer in r["peers"]}):
        color = next((color for name, color in COLORS.items() if peer.startswith(name)), OTHER)
        number = sum(style["color"] == color for style in styles.values())
        styles[peer] = {"color": color, "ls": STYLES[number % len(STYLES)]}
    return styles


def draw_ratios(data: record.Data, target: Path) -> None:
    """How many times as long as ours the fastest peer takes, over tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axis = figure.subplots()
    measured = record.operations(data)
    for number, name in enumerate(name for name in RATIOS if name in measured):
        pairs = [(r["tokens"], r["jaxmoe"]["p50"], record.best_peer(r)) for r in measured[name]]
        here = [(tokens, best[1] / ours) for tokens, ours, best in pairs if best is not None]
        if here:
            marker = "osD^vPX*"[number % 8]
            axis.plot(*zip(*here, strict=True), ms=5, lw=1.6, label=name, color=f"C{number}", marker=marker)
    axis.axhline(1, color="0.45", ls="--")
    axis.set(xscale="log", xlabel="tokens", ylabel="time of the fastest peer over ours", ylim=(0, None))
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8, ncols=2)
    figure.suptitle(_title(data), fontsize=10)
    figure.savefig(target, dpi=100)


def _title(data: record.Data) -> str:
    return f"{data['machine']['gpu']}, medians inside a CUDA graph, {data['machine']['date'][:10]}"
