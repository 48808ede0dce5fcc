"""grouped_matmul and gated_matmul with other tiles than those that `config_for` takes: to choose them by.

    python -m benchmarks.matmul_tiles [--seconds 90]

The two products of an expert, of DeepSeek-V3's sizes: "gated" [M, 7168] by [E, 4096, 7168], "down" [M, 2048] by
[E, 7168, 2048], and "plain", the first without an activation. E = 32, M = 32768 in even shares or not, or 512 (decode).
What `config_for` takes is marked *; what is wrong is not timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, cast
from unittest import mock

import torch

import bridge
from benchmarks import matmuls, stated, tiles
from bridge.native import experts
from kernels_pallas import grouped_matmul as kernels
from kernels_pallas.grouped_matmul import Config

Tensor = torch.Tensor
WIDTH, INNER, EXPERTS = matmuls.WIDTH, matmuls.INNER, matmuls.EXPERTS
PLAIN = [
    Config(128, 256, 64, 8, 8, 4),
    Config(128, 256, 64, 8, 8, 3),
    Config(128, 256, 64, 4, 8, 4),
    Config(128, 256, 64, 16, 8, 4),
    Config(128, 256, 64, 16, 8, 3),
    Config(128, 128, 64, 8, 4, 4),
    Config(128, 128, 64, 8, 8, 4),
    Config(128, 128, 128, 8, 8, 3),
    Config(64, 256, 64, 8, 4, 4),
]
GATED = [dataclasses.replace(config, columns=config.columns // 2) for config in PLAIN]
FEW = [
    Config(32, 128, 128, 8, 4, 4),
    Config(32, 64, 128, 8, 4, 4),
    Config(32, 64, 256, 8, 4, 3),
    Config(16, 128, 128, 8, 4, 4),
    Config(64, 64, 128, 8, 4, 4),
    Config(32, 256, 64, 8, 8, 4),
]
FEW_GATED = [dataclasses.replace(config, columns=max(config.columns // 2, 32)) for config in FEW]


def _functions() -> dict[str, tuple[int, Tensor, Callable[..., Tensor], Callable[..., Tensor]]]:
    """depth, weight, ours, what it should be."""
    make = lambda *sizes: torch.randn(*sizes, device="cuda", dtype=torch.bfloat16) * sizes[-1] ** -0.5
    gate_up, down = make(EXPERTS, 2 * INNER, WIDTH).mT, make(EXPERTS, WIDTH, INNER).mT

    def gated(rows: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
        gate, up = stated.grouped_matmul(rows, weight, sizes).float().chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up

    def ours(rows: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
        out = rows.new_empty(len(rows), INNER)
        experts.gated_matmul(rows, weight, sizes, "silu", out)
        return out

    def product(rows: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
        return bridge.grouped_matmul(rows, weight, sizes)

    return {
        "plain": (WIDTH, gate_up, product, stated.grouped_matmul),
        "gated": (WIDTH, gate_up, ours, gated),
        "down": (INNER, down, product, stated.grouped_matmul),
    }


def _measure(label: str, product: Callable[[Tensor], Tensor], rows: list[Tensor], want: Tensor, flops: float) -> None:
    """Prints a line: the time, or what is wrong."""
    check = lambda: stated.check_close(product(rows[0]), want, matmuls.LIMIT, "product")
    call = lambda i: product(rows[i % 2])
    tiles.line(label, call, check, calls=4 if len(want) > 4096 else 20, seconds=0.15, flops=flops)


def main() -> None:
    """Prints the times."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=90.0)
    end = time.perf_counter() + parser.parse_args().seconds
    torch.manual_seed(0)
    chosen = kernels.config_for
    functions = _functions()
    for (num_rows, kind), name in itertools.product(
        ((32768, "even"), (32768, "uneven"), (512, "uneven")), ("gated", "down", "plain")
    ):
        depth, weight, ours, reference = functions[name]
        sizes = matmuls.shares(kind, num_rows, EXPERTS)
        rows = [torch.randn(num_rows, depth, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
        want = reference(rows[0], weight, sizes).float()
        width = INNER if name == "gated" else weight.shape[2]
        star = chosen(num_rows, EXPERTS, depth, width, rows[0].dtype, "cuda", gated=name == "gated")
        many, few = (GATED, FEW_GATED) if name == "gated" else (PLAIN, FEW)
        candidates = many if num_rows > 4096 else few
        low = lambda config, star=star: star.last_rows if config.rows == star.rows else 0
        for config in [star, *(dataclasses.replace(config, last_rows=low(config)) for config in candidates)]:
            if time.perf_counter() > end:
                print("the time is up")
                return
            label = f"{num_rows:6} {kind:7} {name:6}{' *' if config is star else '  '} {dataclasses.astuple(config)}"
            product = functools.partial(ours, weight=weight, sizes=sizes)
            cast(Any, experts._planned).cache_clear()  # which remembers the tile before
            with mock.patch.object(kernels, "config_for", lambda *args, config=config, **options: config):
                _measure(label, product, rows, want, flops=2 * rows[0].numel() * weight.shape[2])


if __name__ == "__main__":
    main()
