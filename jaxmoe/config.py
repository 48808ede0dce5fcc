"""RoutingConfig: how a model routes its tokens."""

from __future__ import annotations

import json
import operator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from kernels_pallas.rule import Rule
from kernels_pallas.score import SCORING_FUNCS

GROUP_SCORES = ("top2", "max")
MAX_EXPERTS, MAX_TOP_K = 1024, 32


def _fail(name: str, expected: str, got: Any) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {got!r}")


def as_int(value: Any) -> Any:
    """An integer, numpy's as well, as an int; anything else, a bool too, as it came, for a check to refuse.

    To torch.compile it is a constant from here on, not a number that a graph serves many of; so is `as_constant`.
    """
    return operator.index(value) if isinstance(value, (int, np.integer)) and not isinstance(value, bool) else value


def as_constant(value: Any) -> Any:
    """The value; a number as `as_int` has it, or a float."""
    return float.fromhex(value.hex()) if isinstance(value, float) else as_int(value)


_WORDS = {None: "null", True: "true", False: "false"}


def _text(value: Any) -> str:
    """A field that has been checked, in JSON. Not json.dumps, which torch.compile does not trace."""
    if isinstance(value, str):
        return f'"{str.__str__(value)}"'  # of an enum that is a string, what it is
    if isinstance(value, float):
        return f"{value!r}"
    return f"{value}" if type(value) is int else _WORDS[value]


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """How tokens are routed to experts; frozen, hashable, checked when it is made.

    Integers may be numpy's, and become ints. Made within torch.compile, every field is a constant.

    Attributes:
      num_experts: E, the number of routed experts, 1 to 1024, a power of two or not.
      top_k: how many routed experts a token goes to, 1 to 32.
      n_group: the experts form this many contiguous groups of E / n_group.
      topk_group: how many groups a token may choose from.
      scoring_func: "sigmoid", "softmax" (over all E) or "sqrtsoftplus", sqrt(log(1 + exp(logit))).
      group_score: a group's score is the sum of its two largest choices ("top2") or its largest ("max").
        None: "top2" where `route` is given a bias, "max" where it is not.
      renormalize: whether a token's weights are divided by their sum.
      routed_scaling_factor: what the routed weights are multiplied by at last.
      scale_weights: False where the caller scales the layer's output: the routed weights are left
        unscaled, and a shared expert's weight is 1 / routed_scaling_factor.
      n_shared_experts: s, shared experts that fill s further slots behind the routed ones.
      shared_expert_replicas: copies of each shared expert, taken in turn by token index.

    Raises:
      ValueError: names the field, what was expected and what came.

    Example:
      >>> from jaxmoe import RoutingConfig
      >>> config = RoutingConfig(num_experts=256, top_k=8, n_group=8, topk_group=4, routed_scaling_factor=2.5)
      >>> config.num_slots, config.num_expert_ids
      (8, 256)
      >>> RoutingConfig.from_json(config.json) == config
      True
      >>> RoutingConfig(num_experts=60, top_k=4, n_group=8)
      Traceback (most recent call last):
          ...
      ValueError: n_group: expected a divisor of num_experts=60, got 8
    """

    num_experts: int
    top_k: int
    n_group: int = 1
    topk_group: int = 1
    scoring_func: str = "sigmoid"
    group_score: str | None = None
    renormalize: bool = True
    routed_scaling_factor: float = 1.0
    scale_weights: bool = True
    n_shared_experts: int = 0
    shared_expert_replicas: int = 1

    def __post_init__(self) -> None:
        ranges = {
            "num_experts": MAX_EXPERTS,
            "top_k": MAX_TOP_K,
            "n_group": self.num_experts,
            "topk_group": self.n_group,
            "n_shared_experts": MAX_TOP_K,
            "shared_expert_replicas": MAX_EXPERTS,
        }
        for name, most in ranges.items():
            least, value = int(name != "n_shared_experts"), as_int(getattr(self, name))
            if type(value) is not int or not least <= value <= most:
                raise _fail(name, f"an int from {least} to {most}", value)
            object.__setattr__(self, name, value)
        if self.num_experts % self.n_group:
            raise _fail("n_group", f"a divisor of num_experts={self.num_experts}", self.n_group)
        if self.num_expert_ids > 2 * MAX_EXPERTS:
            limit = f"at most {2 * MAX_EXPERTS} expert ids, routed and shared"
            raise _fail("shared_expert_replicas", limit, f"{self.shared_expert_replicas} ({self.num_expert_ids} ids)")
        reach = self.topk_group * (self.num_experts // self.n_group)
        if self.top_k > reach:
            raise _fail("top_k", f"at most the {reach} experts of topk_group={self.topk_group} groups", self.top_k)
        if self.scoring_func not in SCORING_FUNCS:
            raise _fail("scoring_func", f"one of {SCORING_FUNCS}", self.scoring_func)
        if self.group_score is not None and self.group_score not in GROUP_SCORES:
            raise _fail("group_score", f"None or one of {GROUP_SCORES}", self.group_score)
        for name in ("renormalize", "scale_weights"):
            if type(getattr(self, name)) is not bool:
                raise _fail(name, "a bool", getattr(self, name))
        scale = as_constant(self.routed_scaling_factor)
        is_number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
        if not is_number or not 1e-37 <= abs(scale) <= 1e37:
            raise _fail("routed_scaling_factor", "a number from 1e-37 to 1e37 in size", scale)
        # Made once, here: a torch op takes its config as a string on every call.
        object.__setattr__(self, "routed_scaling_factor", scale)
        values = [_text(getattr(self, field.name)) for field in fields(self)]
        object.__setattr__(self, "_json", f"[{','.join(values)}]")

    @property
    def json(self) -> str:
        """The fields' values, in order, as a JSON list."""
        return self._json  # type: ignore[attr-defined]

    @classmethod
    def from_json(cls, text: str) -> RoutingConfig:
        """The config whose `json` is `text`."""
        names, values = [field.name for field in fields(cls)], json.loads(text)
        if not isinstance(values, list) or len(values) != len(names):
            raise ValueError(f"text: expected the json of a RoutingConfig, a list of {len(names)} fields, got {text!r}")
        return cls(**dict(zip(names, values, strict=True)))

    @property
    def num_slots(self) -> int:
        """S = top_k + n_shared_experts."""
        return self.top_k + self.n_shared_experts

    @property
    def num_expert_ids(self) -> int:
        """How many expert ids there are: E + n_shared_experts * shared_expert_replicas."""
        return self.num_experts + self.n_shared_experts * self.shared_expert_replicas

    @classmethod
    def from_hf(cls, hf_config: Any) -> RoutingConfig:
        """The routing of a Hugging Face model, from its config object or the dict of its config.json.

        Raises ValueError for a model type that is not known or a config without experts.
        """
        from jaxmoe.presets import from_hf

        return from_hf(hf_config)


def rule_for(config: RoutingConfig, has_bias: bool) -> Rule:
    """What the kernels need to know of a config."""
    scale = float(config.routed_scaling_factor)
    return Rule(
        num_experts=config.num_experts,
        top_k=config.top_k,
        n_group=config.n_group,
        topk_group=config.topk_group,
        scoring_func=config.scoring_func,
        group_score=config.group_score or ("top2" if has_bias else "max"),
        renormalize=config.renormalize,
        scale=scale if config.scale_weights else 1.0,
        n_shared=config.n_shared_experts,
        replicas=config.shared_expert_replicas,
        shared_weight=1.0 if config.scale_weights else 1.0 / scale,
    )
