"""Shared experts as experts among the others: their weights move into the stacks of the routed ones, and back.

A shared MLP that is s times as wide as an expert is s experts side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.autograd.graph import get_gradient_edge, increment_version

from bridge.views import is_aligned

Stacks = dict[str, tuple[str, ...]]

# A stack of the experts takes up these projections of the shared MLP.
_GATED: Stacks = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_UNGATED: Stacks = {"up_proj": ("up_proj",), "down_proj": ("down_proj",)}


def num_foldable(name: str, block: Any) -> int:
    """How many experts the shared MLP of a layer is. Raises ValueError where it cannot be folded."""
    fail = lambda expected, got: ValueError(f"fuse_shared_experts: expected {expected}, got {got} in {name!r}")
    if hasattr(block, "shared_expert_gate"):
        raise fail("shared experts that are simply added", "one that is multiplied by a gate of its own")
    mlp, experts = getattr(block, "shared_experts", None), block.experts
    if mlp is None:
        raise fail("shared experts", "none")
    if not isinstance(getattr(block, "fc1_latent_proj", nn.Identity()), nn.Identity):
        raise fail("shared experts that read what the routed ones read", "routed ones behind a projection")
    weights = [getattr(mlp, part).weight for parts in _stacks(experts).values() for part in parts]
    if len(list(mlp.parameters())) != len(weights):
        raise fail("shared experts without biases", "biases")
    width, (_, _, inner) = mlp.down_proj.weight.shape[1], experts.down_proj.shape
    if width % inner:
        raise fail(f"shared experts of a multiple of the routed ones' width, {inner}", f"a width of {width}")
    kind = lambda weight: f"{weight.dtype} on {weight.device} with requires_grad={weight.requires_grad}"
    for weight in weights:
        if kind(weight) != kind(experts.down_proj):
            raise fail(f"shared experts like the routed ones, {kind(experts.down_proj)}", kind(weight))
    return int(width // inner)


def refuse_sharded(argument: str, model: nn.Module, name: str, block: Any) -> None:
    """Raises ValueError where the weights of a layer are anything but its own: FSDP and others hold them, too."""
    order = "fuse shared experts before fully_shard, and restore them before or never"
    fail = lambda got, where, advice: ValueError(
        f"{argument}: expected parameters that are neither sharded nor of another kind than torch.nn.Parameter, "
        f"got {got} in {where!r}; {advice}"
    )
    for path, module in model.named_modules():
        around, inside = not path or f"{name}.".startswith(f"{path}."), not name or path.startswith(f"{name}.")
        if (around or inside) and _is_fsdp(module):  # whose parameters may be whole for a while
            raise fail(type(module).__name__, path, order)
    if not hasattr(block.experts, "is_concatenated"):  # something is around them
        raise fail(type(block.experts).__name__, f"{name}.experts".lstrip("."), "take it away first")
    for path, parameter in block.named_parameters():
        # A fake one (of audit, or a trial run of the user's) is as good as what it stands for.
        if path.startswith(("experts.", "shared_experts.")) and type(parameter) not in (nn.Parameter, FakeTensor):
            raise fail(type(parameter).__name__, f"{name}.{path}".lstrip("."), order)


def _is_fsdp(module: nn.Module) -> bool:
    """Of either FSDP, whether or not this torch has it."""
    return any(
        kind.__module__.startswith(("torch.distributed.fsdp.", "torch.distributed._composable."))
        for kind in type(module).__mro__
    )


def _stacks(experts: Any) -> Stacks:
    return _GATED if experts.has_gate else _UNGATED


def _join(stack: str, routed: torch.Tensor, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The stack of the routed experts and of those that lie side by side in a shared MLP's projections."""
    if stack == "down_proj":  # [H, s * I]
        shared = parts[0].unflatten(1, (-1, routed.shape[2])).transpose(0, 1)
    else:  # [s * I, H] each
        shared = torch.cat([part.unflatten(0, (-1, routed.shape[1] // len(parts))) for part in parts], dim=1)
    return torch.cat([routed, shared])


def _split(stack: str, tensor: torch.Tensor, num_routed: int, num_parts: int) -> list[torch.Tensor]:
    """The inverse of `_join`: the routed experts as a view, the shared MLP's projections as copies."""
    routed, shared = tensor[:num_routed], tensor[num_routed:]
    if stack == "down_proj":
        return [routed, copy_dense(shared.transpose(0, 1)).flatten(1)]
    return [routed, *(copy_dense(part).flatten(0, 1) for part in shared.chunk(num_parts, dim=1))]


def copy_dense(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy."""
    return tensor.clone(memory_format=torch.contiguous_format)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor is contiguous, and readable for JAX on a CPU."""
    return tensor.is_contiguous() and (tensor.device.type != "cpu" or is_aligned(tensor))


def like(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Where data for a tensor is made: an inference tensor stays one, and any other can be trained afterwards."""
    return torch.inference_mode(tensor.is_inference())


def _set(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """Gives a parameter data of another shape, which no gradient may outlive.

    Nor may a graph: where it has saved the parameter, torch raises RuntimeError, as after any change of a saved tensor;
    where it only leads to it, `_refuse` does.
    """
    parameter.grad = None
    if not parameter.is_inference():  # those are in no graph
        trained = parameter.requires_grad
        get_gradient_edge(parameter.requires_grad_()).node.register_prehook(_refuse)
        parameter.requires_grad_(trained)
        increment_version(parameter)
    # A graph keeps the parameter's node alive, and torch keeps a node while it is alive, with the shape it was made
    # for; but not across dtypes.
    other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = parameter.data.new_empty(0, dtype=other)
    parameter.data = data


def _refuse(*_: Any) -> None:
    """A hook of what was a parameter's node in graphs."""
    raise RuntimeError(
        "backward: expected a loss computed after bridge.huggingface folded or unfolded the shared experts (patch, "
        "restore), got one from before: it has no gradients for parameters that have other shapes now"
    )


def fold(block: Any) -> list[nn.Parameter]:
    """Moves shared experts into the stacks of the routed ones. Returns their weights, without data, for `unfold`.

    All memory is there before anything changes: a layer is folded or it is not.
    """
    kept: list[nn.Parameter] = []
    made = []
    for stack, parts in _stacks(block.experts).items():
        linears = [getattr(block.shared_experts, part) for part in parts]
        routed = getattr(block.experts, stack)
        with like(routed):
            made.append((routed, linears, _join(stack, routed.data, [linear.weight.data for linear in linears])))
    for routed, linears, joined in made:
        with like(routed):
            _set(routed, joined)
            for linear in linears:
                kept.append(linear.weight)  # the object that comes back
                _set(linear.weight, linear.weight.data.new_empty(0))
                linear.register_parameter("weight", None)
    return kept


def unfold(block: Any, kept: list[nn.Parameter]) -> None:
    """Undoes `fold`, and leaves nothing in the list. As there, all memory comes first."""
    weights, made = iter(kept), []
    for stack, parts in _stacks(block.experts).items():
        folded = getattr(block.experts, stack)
        with like(folded):
            routed, *shared = _split(stack, folded.data, _num_routed(block), len(parts))
            made.append((folded, parts, copy_dense(routed), shared))
    for folded, parts, routed, shared in made:
        with like(folded):
            _set(folded, routed)
            for part, value in zip(parts, shared, strict=True):
                weight = next(weights)
                if value.is_meta and not weight.is_meta:  # the model has gone there since, without what it did not hold
                    weight = nn.Parameter(value)
                weight.requires_grad_(folded.requires_grad)
                _set(weight, value)
                getattr(block.shared_experts, part).weight = weight
    kept.clear()


def _num_routed(block: Any) -> int:
    return int(block.gate.weight.shape[0])


def _keys(prefix: str, stack: str, parts: Sequence[str]) -> list[str]:
    """The names in a state dict of what `_split` gives."""
    return [f"{prefix}experts.{stack}", *(f"{prefix}shared_experts.{part}.weight" for part in parts)]


def _refuse_wrapped(block: Any) -> None:
    """Raises ValueError where something is around the experts: what it adds (LoRA's, say) fits no plain layer."""
    if not hasattr(block.experts, "is_concatenated"):
        got = f"{type(block.experts).__name__} around those of {type(block).__name__}"
        raise ValueError(f"state_dict: expected bare experts while shared experts are folded into them, got {got}")


def save_folded(block: Any, state: dict[str, Any], prefix: str) -> None:
    """Gives a layer's state dict the names and shapes of one that is not folded."""
    _refuse_wrapped(block)
    for stack, parts in _stacks(block.experts).items():
        keys = _keys(prefix, stack, parts)
        state.update(zip(keys, _split(stack, state[keys[0]], _num_routed(block), len(parts)), strict=True))


def load_folded(block: Any, state: dict[str, Any], prefix: str, missing_keys: list[str], error_msgs: list[str]) -> None:
    """Takes the names and shapes of a layer that is not folded out of a state dict, and puts in those of one that is.

    Where a stack is sharded, all ranks come here, each with its shards of what is loaded or with all of it.
    """
    _refuse_wrapped(block)
    for stack, parts in _stacks(block.experts).items():
        keys, folded = _keys(prefix, stack, parts), getattr(block.experts, stack)
        now = _split(stack, _whole(folded.data), _num_routed(block), len(parts))
        given = [state.pop(key, None) for key in keys]
        found = [value for value in given if value is not None]
        missing_keys += [
            key for key, value in zip(keys, given, strict=True) if value is None and (found or key != keys[0])
        ]
        wrong = [
            f"size mismatch for {key}: expected {tuple(old.shape)}, got {tuple(value.shape)}"
            for key, value, old in zip(keys, given, now, strict=True)
            if value is not None and value.shape != old.shape
        ]
        error_msgs += wrong
        if found and not wrong:
            routed, *shared = (
                old.to(found[0]) if v is None else _whole(v).to(found[0].device)
                for v, old in zip(given, now, strict=True)
            )
            state[keys[0]] = _shard(_join(stack, routed, shared), folded)


def _whole(value: Any) -> torch.Tensor:
    """All of a value of which this process may have a shard."""
    whole: torch.Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole


def _shard(value: torch.Tensor, parameter: Any) -> torch.Tensor:
    """A value as its parameter is."""
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor  # not in every torch

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
