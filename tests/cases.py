# ruff: noqa: E501
"""One table of cases, each with the reason it exists, for the reference, the interpreter and the GPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe import RoutingConfig, presets
from kernels_pallas.launch import next_power_of_2

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


def normal(seed: int, *shape: int, dtype: Any = F32, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) * scale, F32).astype(dtype)


def spoiled(seed: int, tokens: int, experts: int) -> jax.Array:
    """Rows with NaN and infinities of every kind, each next to ordinary rows."""
    x = np.array(normal(seed, tokens, experts))
    rng = np.random.default_rng(seed)
    kinds: list[Callable[[np.ndarray], None]] = [
        lambda row: row.fill(np.nan),
        lambda row: row.__setitem__(rng.integers(experts), np.nan),
        lambda row: row.__setitem__(slice(0, None, 2), np.nan),
        lambda row: row.__setitem__(rng.integers(experts), np.inf),
        lambda row: row.__setitem__(rng.integers(experts), -np.inf),
        lambda row: row.fill(-np.inf),
        lambda row: row.fill(np.inf),
        lambda row: row.__setitem__(slice(1, None), -np.inf),
        lambda row: None,
    ]
    for token in range(tokens):
        kinds[token % len(kinds)](x[token])
    return jnp.asarray(x)


@dataclass(frozen=True)
class Case:
    """One way to route."""

    why: str
    config: RoutingConfig
    bias: Any = F32  # dtype, None for no bias
    dtype: Any = F32  # of the logits
    tokens: int = 6
    logits: Callable[[int, int], jax.Array] | None = None  # (tokens, experts) -> logits
    bias_values: Callable[[int], jax.Array] | None = None

    def inputs(self, tokens: int | None = None) -> tuple[jax.Array, jax.Array | None]:
        count = self.tokens if tokens is None or self.tokens == 0 else tokens
        experts = self.config.num_experts
        x = self.logits(count, experts) if self.logits else normal(1, count, experts, scale=2.0)
        bias = None
        if self.bias is not None:
            bias = self.bias_values(experts) if self.bias_values else normal(2, experts, scale=0.2)
            bias = bias.astype(self.bias)
        return x.astype(self.dtype), bias

    @property
    def most_together(self) -> int:
        """How many tokens' slots fit on the lanes of a warp of CUDA's, up to the eight that one takes at most."""
        return min(8, 32 // next_power_of_2(self.config.num_slots))


C = functools.partial(RoutingConfig)
V3 = presets["deepseek-v3"]
SMALL = C(num_experts=24, top_k=4, n_group=4, topk_group=2, routed_scaling_factor=2.5)
fill = lambda value: lambda tokens, experts: jnp.full((tokens, experts), value, F32)
coarse = lambda tokens, experts: jnp.round(normal(3, tokens, experts) * 2) / 2

CASES = [
    Case("DeepSeek-V3: groups by their top two, bias, shared expert", V3, dtype=BF16),
    Case("DeepSeek-V2: softmax, groups by maximum, not renormalised", presets["deepseek-v2"], bias=None, dtype=BF16),
    Case("Kimi-K2: no groups, E is no power of two", presets["kimi-k2"]),
    Case("softmax alone, renormalised: Qwen3-MoE", C(num_experts=128, top_k=8, scoring_func="softmax"), bias=None),
    Case("softmax with a bias: Ernie", C(num_experts=64, top_k=6, scoring_func="softmax", n_shared_experts=2)),
    Case("sqrtsoftplus: DeepSeek-V4", C(num_experts=64, top_k=6, scoring_func="sqrtsoftplus", routed_scaling_factor=1.5)),
    Case("sqrtsoftplus, not renormalised", C(num_experts=16, top_k=3, scoring_func="sqrtsoftplus", renormalize=False)),
    Case("sigmoid, not renormalised", C(num_experts=16, top_k=3, renormalize=False)),
    Case("sigmoid without a bias", C(num_experts=32, top_k=4, n_group=4, topk_group=2), bias=None),
    Case("softmax in groups by top two, without a bias", C(num_experts=24, top_k=4, n_group=4, topk_group=2,
         scoring_func="softmax", group_score="top2"), bias=None),
    Case("groups by maximum, though there is a bias", C(num_experts=24, top_k=4, n_group=4, topk_group=2, group_score="max")),
    Case("odd E", C(num_experts=13, top_k=5)),
    Case("odd number of odd groups", C(num_experts=45, top_k=6, n_group=9, topk_group=4)),
    Case("one expert", C(num_experts=1, top_k=1)),
    Case("K = E", C(num_experts=8, top_k=8)),
    Case("K = all the experts that the groups leave", C(num_experts=24, top_k=12, n_group=4, topk_group=2)),
    Case("8 experts in 8 groups: AITER #2369", C(num_experts=8, top_k=4, n_group=8, topk_group=4)),
    Case("all groups kept", C(num_experts=16, top_k=4, n_group=4, topk_group=4)),
    Case("E = 60", C(num_experts=60, top_k=4)),
    Case("E = 72, k = 6, groups of 9", C(num_experts=72, top_k=6, n_group=8, topk_group=3)),
    Case("E = 288, groups of 36: more than a warp", C(num_experts=288, top_k=8, n_group=8, topk_group=4)),
    Case("E = 512, k = 10: Qwen3-Next", C(num_experts=512, top_k=10, scoring_func="softmax"), bias=None, dtype=BF16),
    Case("E = 512, k = 22: Nemotron-3-Super", C(num_experts=512, top_k=22)),
    Case("E = 768", C(num_experts=768, top_k=8)),
    Case("E = 896, k = 16, two shared: Kimi-K3", presets["kimi-k3"]),
    Case("E = 1024 and k = 32, the limits", C(num_experts=1024, top_k=32)),
    Case("1024 groups of one", C(num_experts=1024, top_k=8, n_group=1024, topk_group=16)),
    Case("no tokens", SMALL, tokens=0),
    Case("one token", SMALL, tokens=1),
    Case("all logits equal: every tie to the lower index", SMALL, bias=None, logits=fill(0.25)),
    Case("many ties", SMALL, logits=coarse, bias_values=lambda e: jnp.zeros(e, F32)),
    Case("many ties, softmax in bfloat16", C(num_experts=64, top_k=8, scoring_func="softmax"), bias=None, dtype=BF16,
         logits=coarse),
    Case("logits a few units in the last place apart: bits that a pick gives up must not decide",
         C(num_experts=96, top_k=12, scoring_func="softmax"), bias=None,
         logits=lambda t, e: 1.0 + jnp.asarray(np.random.default_rng(12).permuted(np.tile(np.arange(e), (t, 1)), axis=1), F32) * 2.0**-23),
    Case("the same in groups by maximum, negative", C(num_experts=96, top_k=5, n_group=6, topk_group=2, scoring_func="softmax"),
         bias=None,
         logits=lambda t, e: -3.0 - jnp.asarray(np.random.default_rng(13).permuted(np.tile(np.arange(e), (t, 1)), axis=1), F32) * 2.0**-22),
    Case("picks a few units in the last place apart, all others far: their order alone is open",
         C(num_experts=96, top_k=8), bias_values=lambda e: jnp.zeros(e, F32),
         logits=lambda t, e: jnp.asarray(np.random.default_rng(14).permuted(np.tile(np.where(
             np.arange(e) < 8, 1.0 + np.arange(e) * 2.0**-18, np.arange(e) / e - 2.0), (t, 1)), axis=1), F32)),
    Case("equal biases, as when training starts: logits in bfloat16 tie", C(num_experts=160, top_k=8), dtype=BF16,
         bias_values=lambda e: jnp.full(e, 0.5, F32)),
    Case("zeros of either sign tie", C(num_experts=8, top_k=4, scoring_func="softmax"), bias=None,
         logits=lambda t, e: jnp.where(jnp.arange(e) % 2 == 0, -0.0, 0.0) * jnp.ones((t, 1), F32)),
    Case("negative choices: dropped groups are not 0 but out (SGLang #3705)", SMALL,
         bias_values=lambda e: normal(4, e) - 10.0),
    Case("all logits negative (transformers #45440)", SMALL, logits=lambda t, e: -1.0 - jnp.abs(normal(5, t, e)) * 4),
    Case("scores that underflow: -100 (SGLang #31017)", SMALL, logits=fill(-100.0)),
    Case("scores near underflow: -50", SMALL, logits=lambda t, e: -50.0 + normal(6, t, e)),
    Case("scores that underflow, sqrtsoftplus", C(num_experts=16, top_k=8, scoring_func="sqrtsoftplus"), logits=fill(-250.0)),
    Case("scores that float32 can still hold, sqrtsoftplus", C(num_experts=16, top_k=4, scoring_func="sqrtsoftplus"), bias=None,
         logits=lambda t, e: -90.0 - 20 * jnp.abs(normal(14, t, e))),
    Case("the same, not renormalised", C(num_experts=16, top_k=4, scoring_func="sqrtsoftplus", renormalize=False), bias=None,
         logits=lambda t, e: -90.0 - 20 * jnp.abs(normal(14, t, e))),
    Case("softmax: every chosen logit is -inf, the row is not", C(num_experts=6, top_k=2, scoring_func="softmax"),
         logits=lambda t, e: jnp.full((t, e), -jnp.inf).at[:, 0].set(0.0),
         bias_values=lambda e: jnp.zeros(e, F32).at[0].set(-9.0)),
    Case("one of many: k = 1", C(num_experts=40, top_k=1, n_group=4, topk_group=1)),
    Case("a bias far above the scores: 12", SMALL, bias_values=lambda e: 12.0 + normal(7, e)),
    Case("a bias of 12 swallows scores of 1e-22: all choices equal, so by index", SMALL,
         logits=lambda t, e: -50.0 + normal(15, t, e), bias_values=lambda e: jnp.full(e, 12.0)),
    Case("E = 60: two lanes that tie add up to one without experts", C(num_experts=60, top_k=4, scoring_func="softmax"), bias=None,
         logits=lambda t, e: jnp.tile(jnp.linspace(-3, -2, e).at[jnp.asarray([4, 56])].set(5.0), (t, 1))),
    Case("biases of which some are clamped by the quick search", C(num_experts=64, top_k=4, n_group=8, topk_group=4),
         bias_values=lambda e: 1.5 * normal(21, e)),
    Case("the bias of expert 0 far above all others", SMALL, bias_values=lambda e: normal(22, e, scale=0.1).at[0].add(3.0)),
    Case("and far below", SMALL, bias_values=lambda e: normal(22, e, scale=0.1).at[0].add(-3.0)),
    Case("a bias so large that it rounds scores away: 70000", SMALL, bias_values=lambda e: 70000.0 + 30 * normal(23, e)),
    Case("biases that nearly cancel the scores", SMALL, bias_values=lambda e: (-0.5 + normal(16, e) * 1e-6).at[0].set(0.0)),
    Case("groups whose best differ by no more than the bits that keys give up", C(num_experts=64, top_k=4, n_group=8, topk_group=1,
         scoring_func="softmax"), bias=None,
         logits=lambda t, e: jnp.tile(jnp.linspace(0.1, 0.5, e).at[0].set(1.0).at[e - 1].set(1 + 5 * 2.0**-23), (t, 1))),
    Case("keys of both signs, 2**31 and more apart, next to a near tie", C(num_experts=64, top_k=4, scoring_func="softmax"), bias=None,
         logits=lambda t, e: jnp.tile(jnp.linspace(-9.0, -15.0, e).at[40].set(2.0).at[3].set(-2.0)
                                      .at[10].set(-3 - 60 * 2.0**-22).at[11].set(-3.0).at[12].set(-4.0), (t, 1))),
    Case("sqrtsoftplus: scores of 1e-19 and biases of their size", C(num_experts=64, top_k=4, scoring_func="sqrtsoftplus"),
         logits=lambda t, e: -94.0 + 6 * jnp.tanh(normal(17, t, e)), bias_values=lambda e: jnp.arange(e, dtype=F32) * 1e-21),
    Case("groups by sums of scores near 1e-19, some flushed to 0", C(num_experts=24, top_k=3, n_group=4, topk_group=2,
         scoring_func="sqrtsoftplus", group_score="top2"), bias=None,
         logits=lambda t, e: jnp.tile((-120.0 - jnp.arange(e, dtype=F32)).at[0].set(-50.0).at[1].set(-50.5).at[6].set(-86.0)
                                      .at[7].set(-87.4).at[12].set(-85.6), (t, 1))),
    Case("large logits saturate", C(num_experts=16, top_k=4, scoring_func="softmax"), bias=None,
         logits=lambda t, e: normal(8, t, e) * 300),
    Case("NaN and infinite logits: vLLM #39391", SMALL, logits=lambda t, e: spoiled(9, t, e), tokens=18),
    Case("NaN and infinite logits, softmax", C(num_experts=24, top_k=4, n_group=4, topk_group=2, scoring_func="softmax"),
         bias=None, logits=lambda t, e: spoiled(10, t, e), tokens=18),
    Case("NaN and infinite logits, softmax with bias", C(num_experts=24, top_k=4, scoring_func="softmax"),
         logits=lambda t, e: spoiled(10, t, e), tokens=18),
    Case("NaN and infinite logits, not renormalised", C(num_experts=24, top_k=4, scoring_func="softmax", renormalize=False),
         bias=None, logits=lambda t, e: spoiled(10, t, e), tokens=18),
    Case("NaN and infinities in the bias", SMALL,
         bias_values=lambda e: normal(11, e).at[3].set(jnp.nan).at[7].set(jnp.inf).at[11].set(-jnp.inf).at[13].set(-jnp.nan)),
    Case("all of the bias NaN", SMALL, bias_values=lambda e: jnp.full(e, jnp.nan, F32)),
    *(Case(f"logits {jnp.dtype(a).name}, bias {jnp.dtype(b).name}: read as they are (FlashInfer #2909)", SMALL, dtype=a, bias=b)
      for a in (BF16, F16, F32) for b in (BF16, F16, F32)),
    Case("two shared experts, three replicas each", C(num_experts=16, top_k=2, n_shared_experts=2, shared_expert_replicas=3,
         routed_scaling_factor=2.5), tokens=8),
    Case("the caller scales the output: a shared expert weighs 1/scale (vLLM #45037)",
         C(num_experts=16, top_k=2, n_shared_experts=1, routed_scaling_factor=2.5, scale_weights=False)),
]  # fmt: skip

# The interpreter unrolls k picks over E: one token of these.
SLOW_INTERPRETED = {"E = 1024 and k = 32, the limits", "E = 512, k = 22: Nemotron-3-Super", "1024 groups of one"}
# Interpreted where JAXMOE_EVERY_TARGET is set, as in CI; on XLA and on a GPU always. The first take longest; to the
# others some case is near, and of the pairs of dtypes each one is read in others.
INTERPRETED_IN_CI = SLOW_INTERPRETED | {
    "E = 896, k = 16, two shared: Kimi-K3",
    "E = 768",
    "E = 288, groups of 36: more than a warp",
    "E = 512, k = 10: Qwen3-Next",
    "E = 72, k = 6, groups of 9",
    "softmax alone, renormalised: Qwen3-MoE",
    "softmax with a bias: Ernie",
    "sqrtsoftplus, not renormalised",
    "the same in groups by maximum, negative",
    "large logits saturate",
    "scores that underflow, sqrtsoftplus",
    "NaN and infinite logits, softmax",
    "E = 60",
    "equal biases, as when training starts: logits in bfloat16 tie",
    "scores that float32 can still hold, sqrtsoftplus",
    "the same, not renormalised",
    "and far below",
    "biases that nearly cancel the scores",
    "sqrtsoftplus: scores of 1e-19 and biases of their size",
    "groups by sums of scores near 1e-19, some flushed to 0",
    "NaN and infinite logits, softmax with bias",
    *(
        f"logits {logits}, bias {bias}: read as they are (FlashInfer #2909)"
        for logits in ("bfloat16", "float16", "float32")
        for bias in ("bfloat16", "float16", "float32")
        if (logits, bias) not in {("bfloat16", "float32"), ("float16", "bfloat16"), ("float32", "float16")}
    ),
}
IDS = [case.why for case in CASES]
EXAMPLES = 20 if "JAXMOE_EVERY_TARGET" in os.environ else 10  # that hypothesis draws: each is compiled
assert set(IDS) >= INTERPRETED_IN_CI, INTERPRETED_IN_CI - set(IDS)
