"""Training, evaluation and sampling of the demo's model."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from jaxmoe.demo import model
from jaxmoe.demo.model import Block, ModelConfig, Params
from jaxmoe.demo.text import Text, batches
from jaxmoe.routing import update_bias
from kernels_pallas.targets import custom_call_target

BITS = float(1 / np.log(2))


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. Balancing starts late on purpose, at step `balance_from`: so one run shows both."""

    steps: int
    batch: int = 4
    learning_rate: float = 4e-3
    bias_rate: float = 0.015  # DeepSeek-V3 took 0.001, for many more steps

    @property
    def balance_from(self) -> int:
        return self.steps * 2 // 5

    def bias_rate_at(self, index: int) -> float:
        """Falls to zero at the end, so that the bias comes to rest."""
        return self.bias_rate * (1 - index / self.steps) if index >= self.balance_from else 0.0

    def optimizer(self) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, max(1, self.steps // 20), self.steps)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95))


class State(NamedTuple):
    params: Params
    optimizer: Any


def _loss(
    params: Params, tokens: jax.Array, config: ModelConfig, implementation: str | None
) -> tuple[jax.Array, list[Block]]:
    """Bits per byte."""
    logits, seen = model.apply(params, tokens[:, :-1], config, implementation)
    return BITS * optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean(), seen


def _routed_load(seen: list[Block], config: ModelConfig) -> jax.Array:
    """int32 [layers, E]: the shared expert, which takes every token, is left out."""
    return jnp.stack([block.load[: config.routing.num_experts] for block in seen])


@functools.partial(jax.jit, static_argnames=("config", "training", "implementation"), donate_argnums=0)
def step(
    state: State,
    tokens: jax.Array,
    bias_rate: jax.Array,
    *,
    config: ModelConfig,
    training: TrainingConfig,
    implementation: str | None,
) -> tuple[State, jax.Array, jax.Array]:
    """One step, in the buffers of the old state: (state, loss in bits per byte, load [layers, E])."""
    (loss, seen), grads = jax.value_and_grad(_loss, has_aux=True)(state.params, tokens, config, implementation)
    updates, optimizer = training.optimizer().update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    # The bias has no gradient: balancing alone moves it, not even the weight decay.
    for block, old, saw in zip(params["blocks"], state.params["blocks"], seen, strict=True):
        block["moe"] = replace(block["moe"], bias=update_bias(old["moe"].bias, saw.load, rate=bias_rate))
    return State(params, optimizer), loss, _routed_load(seen, config)


@functools.partial(jax.jit, static_argnames=("config", "implementation"))
def evaluate(
    params: Params, tokens: jax.Array, *, config: ModelConfig, implementation: str | None
) -> tuple[jax.Array, jax.Array, list[Block]]:
    """(bits per byte, load [layers, E], what each MoE layer saw) on tokens [windows, context + 1]."""
    loss, seen = _loss(params, tokens, config, implementation)
    return loss, _routed_load(seen, config), seen


class Balance(NamedTuple):
    """How the tokens of one text were spread, and how well the text was predicted meanwhile."""

    loss: float  # bits per byte
    load: np.ndarray[Any, Any]  # int32 [layers, E]


class History(NamedTuple):
    """A whole training run."""

    params: Params
    loss: np.ndarray[Any, Any]  # float [steps], bits per byte
    load: np.ndarray[Any, Any]  # int32 [steps, layers, E]
    before: Balance  # on held-out text when balancing began
    kernels: int  # Pallas kernels in the compiled step


def measure(params: Params, tokens: jax.Array, config: ModelConfig, implementation: str | None) -> Balance:
    """Runs the model on tokens [windows, context + 1]."""
    loss, load, _ = evaluate(params, tokens, config=config, implementation=implementation)
    return Balance(float(loss), np.asarray(load))


def without_bias(params: Params) -> Params:
    """The same parameters, routed by the scores alone."""
    unbiased = lambda moe: replace(moe, bias=jnp.zeros_like(moe.bias))
    return {**params, "blocks": [{**block, "moe": unbiased(block["moe"])} for block in params["blocks"]]}


def peak(load: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The busiest expert's load over the mean, along the last axis: 1 is perfectly even."""
    return load.max(axis=-1) / load.mean(axis=-1)


def variation(load: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The standard deviation of the load over its mean, along the last axis: 0 is perfectly even."""
    return load.std(axis=-1) / load.mean(axis=-1)


def train(
    text: Text,
    held_out: jax.Array,
    config: ModelConfig,
    training: TrainingConfig,
    seed: int,
    implementation: str | None,
) -> History:
    """Trains with a progress bar and a table of the loss. The same seed gives the same run on the same machine."""
    params = model.init(jax.random.key(seed), config)
    state = State(params, training.optimizer().init(params))
    pieces = batches(text.train, training.batch, config.context + 1, seed)
    options = {"config": config, "training": training, "implementation": implementation}
    kernels = step.lower(state, next(pieces), np.float32(0), **options).as_text().count(custom_call_target())
    losses: list[float] = []
    loads: list[np.ndarray[Any, Any]] = []
    every = max(1, training.steps // 8)  # a row of the table, over the steps since the last one
    row = "  {:>5}  {:>13}  {:>34}".format
    print(row("step", "bits per byte", "busiest expert over mean, by layer"))
    with tqdm(total=training.steps, desc="  training", unit="step", disable=None, leave=False) as bar:
        for index in range(training.steps):
            if index == training.balance_from:
                before = measure(state.params, held_out, config, implementation)
                bar.write(f"  {index:5}  -- balancing starts --")
            state, loss, load = step(state, next(pieces), np.float32(training.bias_rate_at(index)), **options)
            losses.append(float(loss))
            loads.append(np.asarray(load))
            bar.update()
            bar.set_postfix_str(f"{losses[-1]:.2f} bits per byte")
            if index % every == 0 or index == training.steps - 1:
                busiest = ", ".join(f"{value:.1f}x" for value in peak(np.sum(loads[-every:], axis=0)))
                bar.write(row(index, f"{np.mean(losses[-every:]):.3f}", busiest))
    return History(state.params, np.array(losses), np.stack(loads), before, kernels)


@functools.partial(jax.jit, static_argnames=("length", "config", "implementation"))
def sample(
    params: Params,
    prompt: jax.Array,
    key: jax.Array,
    *,
    length: int,
    config: ModelConfig,
    implementation: str | None,
    temperature: float = 0.7,
) -> jax.Array:
    """int32 [length]: bytes drawn one after another behind `prompt`, int32 [context]."""

    def draw(window: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, _ = model.apply(params, window[None], config, implementation)
        byte = jax.random.categorical(key, logits[0, -1] / temperature).astype(jnp.int32)
        return jnp.append(window[1:], byte), byte

    return jax.lax.scan(draw, prompt, jax.random.split(key, length))[1]
