"""How Hugging Face checkpoints name the tensors of a Mixture-of-Experts block, and which of them fit no layer here."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxmoe.config import RoutingConfig

ROUTER = "gate.weight"
SHARED = ("shared_experts.gate_proj", "shared_experts.up_proj", "shared_experts.down_proj")
STACKS = ("experts.gate_up_proj", "experts.down_proj")
PROJECTIONS, NUMBERED = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")  # gate, up, down
FLOAT8, SCALES = jnp.dtype(jnp.float8_e4m3fn), "weight_scale_inv"


class MLP(NamedTuple):
    """A gated MLP of a checkpoint that becomes experts."""

    projections: tuple[str, str, str]  # what gate, up and down are called, without ".weight"
    num_experts: int  # that it is, side by side
    first_id: int
    replicas: int  # ids for each of the experts


@dataclass(frozen=True, kw_only=True)
class Naming:
    """What a family of models calls the tensors of a block, behind its prefix; the router is `gate.weight` in all.

    Attributes:
      bias: what is added to the scores for the choice; None where the family has none.
      bias_shape: of it, -1 for the number of experts.
      projections: gate, up and down of a routed expert, `experts.{i}.{projection}.weight`.
      stacked: in their place there are two stacks, as `MoEParams` has them: `experts.gate_up_proj` [E, H, 2 * I] and
        `experts.down_proj` [E, I, H].
      has_shared: whether shared experts, `shared_experts.{gate,up,down}_proj.weight`, are among the names.
    """

    bias: str | None = "gate.e_score_correction_bias"
    bias_shape: tuple[int, ...] = (-1,)
    projections: tuple[str, str, str] = PROJECTIONS
    stacked: bool = False
    has_shared: bool = True

    def parts(self) -> set[str]:
        """All names that a block may have, in the form of `_part`."""
        experts = STACKS if self.stacked else [f"experts.*.{projection}" for projection in self.projections]
        shared = SHARED if self.has_shared else ()
        return {ROUTER, *experts, *shared, *([] if self.bias is None else [self.bias])}

    def mlps(self, config: RoutingConfig, fused: bool) -> list[MLP]:
        """The MLPs of a block that become experts, with `fused` the shared ones, too; a stack has them all in one."""
        ids = range(0 if self.stacked else config.num_experts)
        gate, up, down = self.projections
        mlps = [MLP((f"experts.{e}.{gate}", f"experts.{e}.{up}", f"experts.{e}.{down}"), 1, e, 1) for e in ids]
        if fused and config.n_shared_experts:
            mlps.append(MLP(SHARED, config.n_shared_experts, config.num_experts, config.shared_expert_replicas))
        return mlps


# By a model that has them; where several fit, as without a bias, the first of those that can hold what is wanted.
NAMINGS: dict[str, Naming] = {
    "deepseek": Naming(),
    "ernie": Naming(bias="moe_statics.e_score_correction_bias", bias_shape=(1, -1)),
    "minimax": Naming(bias="e_score_correction_bias", projections=NUMBERED, has_shared=False),
    "mixtral": Naming(bias=None, projections=NUMBERED, has_shared=False),
    "kimi-linear": Naming(projections=NUMBERED),
    "qwen3-vl": Naming(bias=None, stacked=True, has_shared=False),
}

# Tensors that say that a block computes something else than a layer here does, and what.
_LATENT = "expected routed experts that read the layer's input, got ones behind a projection"
_CLAMPED = "whose experts clamp what goes into silu, which none do here"
UNFIT: dict[str, str] = {
    "shared_expert_gate.weight": "expected shared experts that are simply added, got one that is multiplied by a gate "
    "of its own; leave it and shared_expert.* out of the tensors, and add it to the layer's output",
    "experts.gate_up_proj_bias": "expected experts without biases and clamps, got those of gpt-oss",
    "gate.bias": f"expected the bias under another name, got it as DeepSeek-V4 has it, {_CLAMPED}",
    "gate.tid2eid": f"expected no tensor of this name, got one as DeepSeek-V4 has it, {_CLAMPED}",
    "routed_expert_down_proj.weight": _LATENT,
    "fc1_latent_proj.weight": _LATENT,
}


def _part(name: str) -> str:
    """A name without its expert's number, and of a projection without what it is of it: its weight, scales, ..."""
    part = re.sub(r"^experts\.\d+\.", "experts.*.", name)
    return part.rpartition(".")[0] if part.startswith(("experts.*.", "shared_experts.")) else part


def find_naming(names: Iterable[str], start: str, config: RoutingConfig, has_bias: bool) -> Naming:
    """Whose names the tensors behind `start` have; who else's they may be, too, makes no difference.

    Raises:
      ValueError: names a tensor that fits no layer here, two that no family has both, or the argument that asks for
        what the family has not.

    Example:
      >>> import jaxmoe
      >>> names = ["mlp.gate.weight", "mlp.experts.0.w1.weight", "mlp.e_score_correction_bias"]
      >>> find_naming(names, "mlp.", jaxmoe.RoutingConfig(num_experts=1, top_k=1), True) is NAMINGS["minimax"]
      True
    """
    block = sorted(name.removeprefix(start) for name in names if name.startswith(start))
    for name, why in UNFIT.items():
        if name in block:
            raise ValueError(f"{start}{name}: {why}")
    known = set().union(*(naming.parts() for naming in NAMINGS.values()))
    there = {part: name for name in reversed(block) if (part := _part(name)) in known}
    fitting = {family: naming for family, naming in NAMINGS.items() if there.keys() <= naming.parts()}
    if not fitting:
        for (part, name), (other, beside) in itertools.combinations(sorted(there.items()), 2):
            if not any({part, other} <= naming.parts() for naming in NAMINGS.values()):
                raise ValueError(
                    f"{start}{name}: expected names of one family of models, got {start}{beside} beside it"
                )
    lacks = lambda naming: (naming.bias is None and has_bias) + (not naming.has_shared and config.n_shared_experts > 0)
    family, naming = min(fitting.items(), key=lambda item: lacks(item[1]))
    if naming.bias is None and has_bias:
        raise ValueError(f"has_bias: expected False for tensors with the names of {family}, got True")
    if config.n_shared_experts and not naming.has_shared:
        raise ValueError(
            f"config.n_shared_experts: expected 0 for tensors with the names of {family}, got {config.n_shared_experts}"
        )
    return naming


def check_names(tensors: Mapping[str, Any], start: str, naming: Naming, config: RoutingConfig, has_bias: bool) -> None:
    """Raises ValueError unless the block has all tensors that it needs, and no others but scales."""
    mlps = naming.mlps(config, fused=True)
    projections = [f"{start}{projection}" for mlp in mlps for projection in mlp.projections]
    gates, ups = ({f"{start}{mlp.projections[which]}.weight" for mlp in mlps} for which in (0, 1))
    wanted = [start + ROUTER, *([f"{start}{naming.bias}"] if has_bias else [])]
    wanted += [start + stack for stack in STACKS if naming.stacked] + [f"{name}.weight" for name in projections]
    others = {name for name in tensors if name.startswith(start)} - {*wanted, *(f"{p}.{SCALES}" for p in projections)}
    # First: a weight that is missing may be there in another format.
    for name in sorted(name for name in others if name.rpartition(".")[0] in projections):
        raise ValueError(
            f"{name}: expected no tensor of this name, only weight, and {SCALES} where that is {FLOAT8}, got one"
        )
    for name in wanted:
        if name not in tensors:
            ungated = name in gates and gates.isdisjoint(tensors) and not ups.isdisjoint(tensors)
            hint = "; experts without a gate fit no layer here" if ungated else ""
            raise ValueError(f"{name}: expected a tensor, got none{hint}")
    for name in sorted(others):
        raise ValueError(f"{name}: expected no tensor of this name in the block, got one")
