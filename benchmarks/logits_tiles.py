"""router_logits with other tiles than those that `config_for` takes, beside torch: to choose them by.

    python -m benchmarks.logits_tiles [--seconds 90]

First what `config_for` takes (marked *) and the peers at every number of tokens, then the candidates until the time is
up. H = 7168, E = 256; "tensor" is bfloat16 by bfloat16, "parts" bfloat16 by float32. What is wrong is not timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks import tiles, timing
from benchmarks.operation import expect
from bridge.native import routing
from kernels_pallas import router_logits as kernels
from kernels_pallas.router_logits import Config

Tensor = torch.Tensor
H, E, SETS = 7168, 256, 48
TOKENS = (1, 4, 8, 16, 64, 512, 4096, 16384, 40960)
DTYPES = {"tensor": torch.bfloat16, "parts": torch.float32}  # of the weight


def _plain(tokens: int, experts: int, depth: int, warps: int) -> tuple[Config, int]:
    return Config(tokens, experts, depth, warps, 1, True), 1


def _tile(tokens: int, experts: int, depth: int, warps: int, stages: int, slices: int) -> tuple[Config, int]:
    return Config(tokens, experts, depth, warps, stages), slices


_ONE = [_plain(1, 1, 4096, 16), _plain(1, 2, 4096, 16), _plain(1, 1, 1024, 4)]
_FEW = [_plain(4, 2, 4096, 16), _plain(1, 1, 4096, 16)]
_LARGE = [_tile(128, 256, 64, 8, 3, 1), _tile(128, 128, 64, 8, 3, 1), _tile(128, 128, 64, 4, 3, 1)]
CANDIDATES = {
    ("tensor", 1): _ONE,
    ("tensor", 4): [*_FEW, _tile(64, 32, 128, 4, 4, 14)],
    ("tensor", 8): [_tile(64, 32, 128, 4, 4, 14), _plain(8, 2, 2048, 8), _tile(16, 32, 128, 4, 5, 14)],
    ("tensor", 16): [_plain(4, 2, 2048, 8), _plain(8, 2, 2048, 8), _plain(4, 4, 2048, 8), _tile(16, 32, 128, 4, 5, 14)],
    ("tensor", 64): [
        _tile(64, 32, 128, 4, 5, 14),
        _tile(64, 32, 128, 4, 4, 8),
        _tile(64, 16, 128, 4, 5, 8),
        _tile(64, 64, 64, 4, 5, 28),
        _tile(32, 32, 128, 4, 5, 8),
        _tile(16, 16, 512, 4, 5, 1),
    ],
    ("tensor", 512): [_tile(128, 256, 64, 8, 4, 16), _tile(128, 128, 64, 8, 4, 8)],
    ("tensor", 4096): [
        _tile(128, 256, 64, 8, 3, 4),
        _tile(128, 128, 64, 8, 4, 2),
        _tile(128, 128, 64, 8, 3, 4),
        _tile(64, 128, 64, 4, 4, 1),
    ],
    ("tensor", 16384): _LARGE,
    ("tensor", 40960): [*_LARGE, _tile(128, 256, 32, 8, 6, 1)],
    ("parts", 1): _ONE,
    ("parts", 4): [*_FEW, _tile(64, 64, 64, 4, 4, 28)],
    ("parts", 8): [_tile(64, 64, 64, 4, 4, 28), _tile(32, 64, 64, 4, 5, 28), _tile(64, 64, 64, 4, 4, 16)],
    ("parts", 16): [_plain(4, 2, 2048, 8), _plain(8, 2, 2048, 8), _tile(32, 64, 64, 4, 5, 28)],
    ("parts", 64): [_tile(64, 64, 64, 4, 4, 16), _tile(32, 64, 64, 4, 5, 14), _tile(64, 32, 64, 4, 4, 16)],
    ("parts", 512): [_tile(128, 64, 32, 4, 4, 8), _tile(128, 128, 32, 8, 4, 16), _tile(128, 64, 64, 4, 3, 8)],
    ("parts", 4096): [_tile(128, 64, 32, 4, 4, 1), _tile(128, 64, 64, 4, 3, 2), _tile(128, 128, 64, 8, 3, 4)],
    ("parts", 16384): [_tile(128, 64, 32, 4, 4, 1), _tile(128, 64, 64, 4, 3, 1), _tile(128, 64, 64, 8, 3, 1)],
    ("parts", 40960): [_tile(128, 64, 64, 4, 3, 1), _tile(128, 64, 64, 8, 3, 1)],
}


def _ours(config: Config, slices: int) -> Callable[[Tensor, Tensor], Tensor]:
    def run(x: Tensor, weight: Tensor) -> Tensor:
        out = x.new_empty((len(x), E), dtype=torch.float32)
        routing.launch_router_logits(x, weight, out, config, slices)
        return out

    return run


def _label(config: Config, slices: int) -> str:
    tile = f"{config.tokens} x {config.experts} x {config.depth}, {config.num_warps} warps, {config.num_stages} stages"
    return f"{'plain ' * config.plain}{tile}, {slices} slices"


def _measure(name: str, function: Callable[[Tensor, Tensor], Tensor], x: list[Tensor], weight: list[Tensor]) -> None:
    """Prints a line: the time, or what is wrong."""
    tokens = len(x[0])
    some = torch.arange(0, tokens, max(1, tokens // 512), device="cuda")

    def check() -> None:
        got = function(x[0], weight[0])
        error = float((got[some].double() - x[0][some].double() @ weight[0].double().T).abs().max())
        expect(error < 1e-3, f"off by {error:.1e}")
        expect(torch.equal(got, function(x[0], weight[0])), "not the same twice")

    label = f"{tokens:6} {str(weight[0].dtype).removeprefix('torch.'):9} {name}"
    call = lambda i: function(x[i % len(x)], weight[i % SETS])
    tiles.line(label, call, check, calls=SETS if tokens <= 512 else 6, seconds=0.12)


def main() -> None:
    """Prints the times."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=90.0)
    end = time.perf_counter() + parser.parse_args().seconds
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{torch.cuda.get_device_name()}, an empty launch {timing.empty_launch():.2f} us")
    full = [torch.randn(E, H, device="cuda") * H**-0.5 for _ in range(SETS)]
    weights = {kind: [weight.to(dtype) for weight in full] for kind, dtype in DTYPES.items()}

    def inputs(tokens: int) -> list[Tensor]:
        number = max(2, min(SETS, (160 << 20) // (tokens * H * 2)))
        return [torch.randn(tokens, H, device="cuda", dtype=torch.bfloat16) for _ in range(number)]

    for tokens in TOKENS:
        x = inputs(tokens)
        for kind, weight in weights.items():
            config = kernels.config_for(tokens, E, H, kind, "cuda")
            slices = kernels.slices_for(tokens, E, H, config)
            _measure(f"* {_label(config, slices)}", _ours(config, slices), x, weight)
            if kind == "tensor":
                mm = lambda a, b: torch.mm(a, b.T, out_dtype=torch.float32)
                _measure("torch.mm(out_dtype=float32)", mm, x, weight)
            _measure("F.linear(x.float(), w.float())", lambda a, b: F.linear(a.float(), b.float()), x, weight)
    for (kind, tokens), candidates in CANDIDATES.items():
        x = inputs(tokens)
        for config, slices in candidates:
            if time.perf_counter() > end:
                print(f"the time is up before {kind} at {tokens} tokens")
                return
            _measure(_label(config, slices), _ours(config, slices), x, weights[kind])


if __name__ == "__main__":
    main()
