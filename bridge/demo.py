"""`python -m jaxmoe demo`: trains a small model in JAX, then runs its MoE layers from PyTorch and compares."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

import bridge
from bridge import demo_torch
from jaxmoe import MoEParams
from jaxmoe.demo import training
from jaxmoe.demo.model import Block, ModelConfig
from jaxmoe.demo.picture import draw_load
from jaxmoe.demo.text import Text, baselines, load_text, windows
from jaxmoe.demo.training import Balance, History, TrainingConfig
from jaxmoe.implementation import IMPLEMENTATIONS, default_implementation

TOLERANCE = 1e-5  # of an output's length: float32 sums of a few hundred terms, in another order
TIE = 2e-6  # choices nearer to each other than this are ties: float32 rounding decides
HELD_OUT_WINDOWS = 32
SAMPLE_BYTES = 240


class View(NamedTuple):
    """The address of one buffer in JAX, as a torch tensor, and that tensor in JAX again."""

    name: str
    shape: tuple[int, ...]
    addresses: tuple[int, int, int]

    @property
    def same(self) -> bool:
        return len(set(self.addresses)) == 1


class Agreement(NamedTuple):
    """How a layer run through the bridge compares with plain PyTorch."""

    tokens: int
    equal: int  # tokens whose ids are all equal, in order
    ties: int  # tokens whose ids differ and whose choice hung on less than TIE
    absolute: float  # largest difference of an output, over the tokens whose ids are equal
    relative: float  # largest length of a token's difference over the length of its output

    @property
    def passed(self) -> bool:
        return self.equal + self.ties == self.tokens and self.equal > 0 and self.relative <= TOLERANCE


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo. Returns 0, or 1 where PyTorch and JAX do not agree or something was copied."""
    args = _arguments(argv)
    start = time.perf_counter()
    config, plan = ModelConfig(), TrainingConfig(steps=args.steps)
    text: Text = args.text
    # On GPUs float32 products are rounded to fewer bits unless asked not to be: too few to compare by.
    with jax.default_matmul_precision("float32"):
        held_out = jnp.asarray(windows(text.held_out, HELD_OUT_WINDOWS, config.context + 1))
        _describe(text, config, plan)
        history = training.train(text, held_out, config, plan, args.seed, args.implementation)
        _say_what_ran(history, args.implementation)
        loss, load, seen = training.evaluate(
            history.params, held_out, config=config, implementation=args.implementation
        )
        unbiased = training.measure(training.without_bias(history.params), held_out, config, args.implementation)
        _report_loss(text, history, float(loss))
        _report_sample(text, history, config, args)
        _report_balance(history, Balance(float(loss), np.asarray(load)), unbiased, plan)
        layers = [block["moe"] for block in history.params["blocks"]]
        passed = _report_agreement(layers, seen, config, args.implementation)
    picture = args.output / "expert_load.png"
    draw_load(history.load, plan.balance_from, config.routing.n_group, picture)
    print(f"\nPicture of the load over training: {picture}")
    print(f"{'All of it' if passed else 'FAILED; all of it'} took {time.perf_counter() - start:.0f} s.")
    return 0 if passed else 1


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jaxmoe demo",
        description="Trains a small byte-level language model with DeepSeek-V3-style MoE layers in JAX, then runs the "
        "trained layers from PyTorch on the same memory and compares them with plain PyTorch. Exits with 1 where they "
        "differ.",
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="what to learn; default: Python's own documentation")
    parser.add_argument("--steps", type=int, default=320, help="training steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("demo_output"), metavar="DIR", help="for the picture")
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, help="default: pallas where a GPU can, else xla")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and samples (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.steps < 5:
        parser.error(f"--steps: expected at least 5, got {args.steps}")
    if args.seed < 0:
        parser.error(f"--seed: expected 0 or more, got {args.seed}")
    default, why = default_implementation()
    if args.implementation == "pallas" != default:
        parser.error(f"--implementation: {why}")
    try:
        bridge.to_torch(jnp.zeros(1))  # a torch without GPU support cannot view what a GPU holds: better said now
        args.text = load_text(args.text, least=2 * (ModelConfig().context + 1))
        args.output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    return args


def _heading(title: str) -> None:
    print(f"\n{title}\n{'-' * len(title)}")


def _describe(text: Text, config: ModelConfig, plan: TrainingConfig) -> None:
    routing = config.routing
    device = jax.devices()[0]
    python = platform.python_version()
    print(f"Python {python}, jax {jax.__version__}, torch {torch.__version__}, on {device.device_kind}")
    _heading("Training in JAX")
    print(f"  text     {text.name}: {len(text.train):,} bytes to learn, {len(text.held_out):,} held out")
    print(f"  model    {config.layers} layers of width {config.width}, bytes in and out, float32")
    print(
        f"  experts  {routing.num_experts} in {routing.n_group} groups; a token goes to {routing.top_k} of them out of "
        f"{routing.topk_group} groups, and to {routing.n_shared_experts} shared"
    )
    print(f"  steps    {plan.steps} of {plan.batch} x {config.context} bytes; no balancing until {plan.balance_from}\n")


def _say_what_ran(history: History, implementation: str | None) -> None:
    default, why = default_implementation()
    if implementation in (None, default):
        ran = f"{default!r}, since {why}"
    else:
        ran = f"{implementation!r}, as asked for"
    print(f"\n  implementation: {ran}.\n  The training step holds {history.kernels} different Pallas GPU kernels.")


def _report_loss(text: Text, history: History, final: float) -> None:
    _heading("Bits per byte on held-out text")
    uniform = {"any byte as likely as any other": 8.0}
    rows = uniform | {f"from {name} alone": bits for name, bits in baselines(text).items()}
    rows |= {"this model when balancing began": history.before.loss, "this model at the end": final}
    for name, bits in rows.items():
        print(f"  {name:34}{bits:6.3f}")


def _report_sample(text: Text, history: History, config: ModelConfig, args: argparse.Namespace) -> None:
    _heading("What the model writes, after held-out text")
    prompt = text.held_out[: config.context]
    key = jax.random.key(args.seed)
    written = training.sample(
        history.params,
        jnp.asarray(prompt, jnp.int32),
        key,
        length=SAMPLE_BYTES,
        config=config,
        implementation=args.implementation,
    )
    show = lambda values: bytes(values.tolist()).decode(errors="replace").replace("\r", "")
    for line in f"{show(prompt[-60:])}[MODEL:]{show(np.asarray(written))}".splitlines():
        print(f"  | {line}")


def _report_balance(history: History, after: Balance, unbiased: Balance, plan: TrainingConfig) -> None:
    layers = len(after.load)
    rows = {
        f"before balancing (step {plan.balance_from})": history.before,
        f"after balancing (step {plan.steps})": after,
        "the same weights, bias set to 0": unbiased,
    }
    width = 10 * layers
    _heading("Load of the routed experts on held-out text")
    print(f"  {'':34}{'busiest / mean':>{width}}{'spread / mean':>{width}}{'idlest / mean':>{width}}{'bits':>8}")
    numbers = "".join(f"{f'layer {layer + 1}':>10}" for layer in range(layers))
    print(f"  {'':34}{numbers * 3}{'/ byte':>8}")
    for name, (loss, load) in rows.items():
        columns = [training.peak(load), training.variation(load), load.min(axis=-1) / load.mean(axis=-1)]
        print(f"  {name:34}{''.join(f'{value:10.2f}' for value in np.concatenate(columns))}{loss:8.3f}")
    print("  Perfectly even is 1, 0 and 1. The bias moves choices only; it is not part of the weights.")


def to_torch(params: MoEParams) -> bridge.MoEParams:
    """JAX's weights as torch tensors, in the same memory."""
    views = {name: bridge.to_torch(getattr(params, name)) for name in bridge.MoEParams._fields}
    return bridge.MoEParams(**views)


def there_and_back(name: str, array: jax.Array, tensor: torch.Tensor) -> View:
    """Where a JAX array lies, where its torch tensor lies, and where that lies as a JAX array."""
    addresses = (array.unsafe_buffer_pointer(), tensor.data_ptr(), bridge.to_jax(tensor).unsafe_buffer_pointer())
    return View(name, array.shape, addresses)


def compare(x: torch.Tensor, params: bridge.MoEParams, config: ModelConfig, implementation: str | None) -> Agreement:
    """Runs one layer through the bridge and in plain PyTorch, on the same tensors."""
    y, routing = bridge.moe(x, params, config.routing, implementation=implementation)
    expected, choice = demo_torch.moe(x, params, config.routing)
    equal = (routing.experts[:, : config.routing.top_k] == choice.ids).all(dim=1)
    difference = (y - expected)[equal].double()
    length = expected[equal].double().norm(dim=1)
    largest = lambda values: float(values.max()) if len(values) else float("nan")
    return Agreement(
        tokens=len(x),
        equal=int(equal.sum()),
        ties=int((~equal & (choice.margin < TIE)).sum()),
        absolute=largest(difference.abs().flatten()),
        relative=largest(difference.norm(dim=1) / length),
    )


def _report_agreement(
    layers: list[MoEParams], seen: list[Block], config: ModelConfig, implementation: str | None
) -> bool:
    """Prints addresses and agreement; whether all is as it should be."""
    views: list[View] = []
    results: list[Agreement] = []
    for number, (weights, block) in enumerate(zip(layers, seen, strict=True), 1):
        x, params = bridge.to_torch(block.x), to_torch(weights)
        views.append(there_and_back(f"layer {number} input", block.x, x))
        for name, tensor in params._asdict().items():
            views.append(there_and_back(f"layer {number} {name}", getattr(weights, name), tensor))
        results.append(compare(x, params, config, implementation))

    _heading("The same memory in both frameworks")
    row: Any = "  {:18}{:>16}{:>18}{:>18}{:>18}  {}".format
    print(row("buffer", "shape", "JAX", "torch", "JAX again", "copied?"))
    for view in views:
        shape = " x ".join(map(str, view.shape))
        print(row(view.name, shape, *map(hex, view.addresses), "no" if view.same else "YES"))

    _heading("The trained layers from PyTorch, on held-out text: bridge.moe against plain PyTorch")
    print(f"  {'':10}{'tokens':>8}{'ids equal':>20}{'ties':>6}{'largest difference':>20}{'relative':>10}  agree?")
    for number, r in enumerate(results, 1):
        share = f"{r.equal} ({r.equal / r.tokens:.2%})"
        verdict = "yes" if r.passed else "NO"
        print(f"  layer {number:<4}{r.tokens:8}{share:>20}{r.ties:6}{r.absolute:20.2e}{r.relative:10.1e}  {verdict}")
    print(f"  Agreement: ids equal but for ties (choices closer than {TIE:g}), outputs within {TOLERANCE:g} relative.")
    return all(view.same for view in views) and all(result.passed for result in results)
