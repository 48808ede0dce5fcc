"""`python -m jaxmoe audit`: what one forward pass of a DeepSeek-V3 MoE layer launches, beside transformers' own.

Five columns: the layer of Hugging Face transformers; the same after `bridge.huggingface.patch`, with its shared expert
apart and folded in; the layer made of jaxmoe's functions on tensors; and made of them in JAX, under jit.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import bridge
from bridge.counting import Counts, Forward, can_profile, count
from bridge.native.build import shape, target_of
from jaxmoe.command import audit as in_jax
from jaxmoe.config import MAX_EXPERTS

LIMITS = {"route": 1, "plan_dispatch": 2, "dispatch": 1, "combine": 1}  # launches of each; no cast, no copy
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TRANSFORMERS, PATCHED, FUSED, OWN, JAX = "transformers", "patched", "patched, fused", "jaxmoe", "jaxmoe in JAX"


@dataclass(frozen=True)
class Layer:
    """The sizes that may be chosen; the rest is as in DeepSeek-V3."""

    tokens: int
    hidden: int
    inner: int
    experts: int
    dtype: str

    @property
    def config(self) -> bridge.RoutingConfig:
        """With the shared expert as a slot."""
        return dataclasses.replace(bridge.presets["deepseek-v3"], num_experts=self.experts)


def _block(layer: Layer, device: str, *, patched: bool = False, fused: bool = False) -> Forward:
    """The layer of transformers."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=layer.hidden, moe_intermediate_size=layer.inner, n_routed_experts=layer.experts
    )
    config._experts_implementation = "grouped_mm"  # the default of a whole model
    dtype, before = DTYPES[layer.dtype], torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            block = DeepseekV3MoE(config).eval()
    finally:
        torch.set_default_dtype(before)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    bias = torch.zeros(layer.experts, device=device)  # of float32 in a loaded model too
    block.gate.register_buffer("e_score_correction_bias", bias)
    if patched:
        from bridge import huggingface

        huggingface.patch(block, fuse_shared_experts=fused)
    x = torch.randn(1, layer.tokens, layer.hidden, dtype=dtype, device=device)
    return lambda: block(x)


def _own(layer: Layer, device: str) -> Forward:
    """The layer of jaxmoe's functions: `bridge.moe`, but for the load."""
    config, dtype, ids = layer.config, DTYPES[layer.dtype], layer.config.num_expert_ids
    make = lambda *sizes: torch.empty(sizes, dtype=dtype, device=device).normal_(std=0.02)
    x, router = make(layer.tokens, layer.hidden), make(layer.experts, layer.hidden)
    bias = torch.zeros(layer.experts, device=device)
    gate_up, down = make(ids, 2 * layer.inner, layer.hidden).mT, make(ids, layer.hidden, layer.inner).mT

    def forward() -> torch.Tensor:
        routing = bridge.route(bridge.router_logits(x, router), bias, config=config, return_load=False)
        plan = bridge.plan_dispatch(routing.experts, ids)
        rows = bridge.experts(bridge.dispatch(x, plan), gate_up, down, plan.group_sizes)
        return bridge.combine(rows, plan, routing.weights)

    return forward


def _count_jax(layer: Layer, launches: dict[str, Counter[str]]) -> Counts:
    """The layer in JAX. `launches` says which kernels are whose."""
    dtype, ids = DTYPES[layer.dtype], layer.config.num_expert_ids
    kernels, others = in_jax.lowered(
        in_jax.layer(layer.config),
        shape(dtype, layer.tokens, layer.hidden),
        shape(dtype, layer.experts, layer.hidden),
        shape(torch.float32, layer.experts),
        shape(dtype, ids, 2 * layer.inner, layer.hidden),
        shape(dtype, ids, layer.hidden, layer.inner),
    )
    owner = {kernel: function for function, found in launches.items() for kernel in found}
    counts = Counts(
        operations=others,
        casts=Counter({op: number for op, number in others.items() if op == in_jax.CAST}),
        copies=Counter({op: number for op, number in others.items() if op in in_jax.COPIES}),
    )
    for kernel, number in kernels.items():
        counts.launches.setdefault(owner.get(kernel, kernel), Counter())[kernel] += number
    return counts


def left_out(layer: Layer, device: str) -> dict[str, str]:
    """The columns that cannot be counted here, and why."""
    if importlib.util.find_spec("transformers") is None:
        return dict.fromkeys((TRANSFORMERS, PATCHED, FUSED), "transformers is not installed")
    if device == "meta" and layer.dtype != "bfloat16":
        return {TRANSFORMERS: f"its experts call a torch function that fake tensors of {layer.dtype} do not have"}
    return {}


def count_all(layer: Layer, device: str) -> dict[str, Counts]:
    """The counts of every column that is not left out."""
    makers: dict[str, Callable[..., Forward]] = {
        TRANSFORMERS: _block,
        PATCHED: functools.partial(_block, patched=True),
        FUSED: functools.partial(_block, patched=True, fused=True),
        OWN: _own,
    }
    for name in left_out(layer, device):
        del makers[name]
    columns = {name: count(functools.partial(make, layer), device) for name, make in makers.items()}
    return columns | {JAX: _count_jax(layer, columns[OWN].launches)}


def broken(column: str, counts: Counts) -> list[str]:
    """Which limits a column breaks; transformers' own has none."""
    if column == TRANSFORMERS:
        return []
    found = []
    for function, most in LIMITS.items():
        launched = counts.launches.get(function, Counter()).total()
        # In a patched model the first product of the experts gathers, and nothing is dispatched.
        least, most = (0, 0) if function == "dispatch" and column in (PATCHED, FUSED) else (1, most)
        if not least <= launched <= most:
            wanted = most if least == most else f"{least} to {most}"
            found.append(f"launches of {function}: expected {wanted}, got {launched}")
    transfers = counts.transfers or Counter()
    copies = counts.copies + Counter({name: n for name, n in transfers.items() if name.startswith("Memcpy")})
    wrong = {"casts": counts.casts, "copies": copies}
    if counts.kernels is not None:
        wrong["kernels that the GPU did not run"] = counts.ours - counts.kernels
    if column != PATCHED:  # there torch runs the shared expert; all else is jaxmoe's
        wrong["other operations"] = counts.operations + transfers
        wrong["other kernels"] = (counts.kernels or Counter()) - counts.ours
    found += [f"{what}: expected none, got {_listed(counted)}" for what, counted in wrong.items() if counted]
    return [f"{column}: {what}" for what in found]


def _listed(counted: Counter[str]) -> str:
    return ", ".join(f"{number} {name}" if number > 1 else name for name, number in counted.most_common()) or "none"


def _table(columns: dict[str, Counts]) -> Iterator[str]:
    """The lines to print: the numbers of all columns side by side."""
    none = Counter[str]()
    of = lambda *names: lambda c: sum(c.launches.get(f, none).total() for f in names) if c.launches else None
    rows: dict[str, Callable[[Counts], int | None]] = {
        f"launches of {function} (1{f' or {most}' * (most > 1)})": of(function) for function, most in LIMITS.items()
    }
    rows |= {
        "launches of router_logits, experts": of("router_logits", "experts"),
        "other operations (a launch or more)": lambda c: c.operations.total(),
        "  of them casts (none)": lambda c: c.casts.total(),
        "  of them copies (none)": lambda c: c.copies.total(),
        "allocations": lambda c: c.allocations,
        "allocated bytes": lambda c: c.allocated_bytes,
        "kernels on the GPU": lambda c: None if c.kernels is None else c.kernels.total(),
        "memcpy and memset on the GPU": lambda c: None if c.transfers is None else c.transfers.total(),
    }
    yield " " * 36 + "".join(f"{name:>16}" for name in columns)
    for label, value in rows.items():
        cells = ("-" if (number := value(counts)) is None else f"{number:,}" for counts in columns.values())
        yield f"{label:36}" + "".join(f"{cell:>16}" for cell in cells)


def _names(counts: Counts) -> Iterator[str]:
    """The lines to print: what a column counted, by name."""
    named = {"jaxmoe's kernels": counts.ours, "other operations": counts.operations}
    for what, counted in (named | {"casts": counts.casts, "copies": counts.copies}).items():
        yield textwrap.fill(f"{what}: {_listed(counted)}", 118, initial_indent="  ", subsequent_indent="    ")
    seen = (counts.kernels or Counter()) + (counts.transfers or Counter())
    yield from (f"  on the GPU: {number:3} {name[:99]}" for name, number in seen.most_common())


def _device() -> tuple[str, str]:
    """Where to count, and how in words."""
    try:
        if not torch.cuda.is_available():
            raise ValueError("torch sees none")
        target_of(torch.cuda.current_device())
    except ValueError as error:
        kernels = f"jaxmoe's kernels as lowered for {in_jax.TARGET}; what an op allocates besides its results not seen"
        return "meta", f"No GPU ({error}): operations counted on fake tensors, {kernels}."
    seen = "seen by torch.profiler" if can_profile() else "not seen (torch.profiler shows none here), only launches"
    return "cuda", f"On {torch.cuda.get_device_name()}; kernels {seen}. In JAX: as lowered for {in_jax.TARGET}."


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jaxmoe audit",
        description="Counts launches, casts, copies and allocations in one forward pass of a DeepSeek-V3 MoE layer on "
        "jaxmoe, beside those of transformers' own. Returns 1 where jaxmoe's break the limits in parentheses.",
    )
    step = {"tokens": 1, "hidden": 8, "inner": 8, "experts": 8}
    defaults = {"tokens": 64, "hidden": 7168, "inner": 2048, "experts": 256}
    about = {
        "tokens": "in the pass",
        "hidden": "width of the model",
        "inner": "width of an expert",
        "experts": "routed",
    }
    for name, default in defaults.items():
        help = f"{about[name]}{', a multiple of 8' * (step[name] > 1)} (default: {default})"
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=help)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of tokens and weights (default: bfloat16)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="a file to write the counts to")
    args = parser.parse_args(argv)
    for name, multiple in step.items():
        value, least = getattr(args, name), 16 if name == "experts" else multiple
        if value < least or value % multiple:
            parser.error(f"--{name}: expected a multiple of {multiple} from {least} on, got {value}")
    if args.experts > MAX_EXPERTS:
        parser.error(f"--experts: expected at most {MAX_EXPERTS}, got {args.experts}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the counts. Returns 1 where a column of jaxmoe's breaks a limit."""
    args = _arguments(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take the GPU's memory from torch
    layer = Layer(args.tokens, args.hidden, args.inner, args.experts, args.dtype)
    device, how = _device()
    print(
        f"One forward pass of a DeepSeek-V3 MoE layer: {layer.tokens} tokens of width {layer.hidden}, "
        f"{layer.experts} experts of width {layer.inner}, {layer.dtype}."
    )
    print(textwrap.fill(how, 118), end="\n\n")
    columns = count_all(layer, device)
    for line in _table(columns):
        print(line)
    for name, counts in columns.items():
        print(f"\n{name}", *_names(counts), sep="\n")
    for name, why in left_out(layer, device).items():
        print(f"\n{name}: not counted, {why}")
    wrong = [what for name, counts in columns.items() for what in broken(name, counts)]
    if args.json is not None:
        counted = {name: vars(counts) for name, counts in columns.items()}
        report = {"layer": dataclasses.asdict(layer), "how": how, "columns": counted, "broken": wrong}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    for what in wrong:
        print(f"BROKEN: {what}", file=sys.stderr)
    return 1 if wrong else 0
