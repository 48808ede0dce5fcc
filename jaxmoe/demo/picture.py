"""The picture of the demo: how the load of the experts changes over training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from jaxmoe.demo.training import peak

HIGHEST = 4.0  # times the mean; the colours end here


def draw_load(load: np.ndarray[Any, Any], balance_from: int, n_group: int, path: Path) -> None:
    """Saves the load [steps, layers, E] as a PNG: a heat map of each layer, its busiest expert below."""
    steps, layers, num_experts = load.shape
    relative = load / load.mean(axis=2, keepdims=True)
    figure = Figure(figsize=(5.6 * layers + 0.8, 6.4), layout="constrained")
    axes = figure.subplots(2, layers, squeeze=False, sharex=True, sharey="row", height_ratios=[2.2, 1])
    for layer, (heat, line) in enumerate(axes.T):
        image = heat.imshow(
            relative[:, layer].T,
            aspect="auto",
            interpolation="nearest",
            cmap="RdBu_r",
            norm=TwoSlopeNorm(1.0, 0.0, HIGHEST),
            extent=(-0.5, steps - 0.5, num_experts - 0.5, -0.5),
        )
        for first in range(num_experts // n_group, num_experts, num_experts // n_group):
            heat.axhline(first - 0.5, color="black", linewidth=0.6)
        heat.set_title(f"layer {layer + 1}")
        heat.set_yticks(range(0, num_experts, max(1, num_experts // 8)))
        line.plot(peak(load[:, layer]), color="#b2182b", linewidth=1.3)
        line.axhline(1, color="gray", linewidth=0.8)
        line.set(xlabel="training step", ylim=(0, 1.25 * peak(load).max()), xlim=(-0.5, steps - 0.5))
        line.text(balance_from, 0.98, " balancing starts", transform=line.get_xaxis_transform(), va="top")
        line.spines[["top", "right"]].set_visible(False)
        for ax in (heat, line):
            ax.axvline(balance_from - 0.5, color="black", linestyle="--", linewidth=1.2)
    axes[0, 0].set_ylabel("expert (lines between groups)")
    axes[1, 0].set_ylabel("busiest expert over mean\n(1 = perfectly even)")
    bar = figure.colorbar(image, ax=axes[0], extend="max", ticks=[0, 0.5, 1, 2, 3, 4])
    bar.set_label("tokens of an expert over the mean")
    figure.suptitle("Load of the routed experts while the model trains", fontsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
