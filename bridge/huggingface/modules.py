"""Modules of transformers on jaxmoe: objects whose class has one of these put over it.

A forward pass that an object holds would be that object's in its copies, too. One of the class runs the copies,
pickles and replicas of a module on themselves, and lets others put their own forward or class over it. It ends with
what the object holds: without that, every method here is the one beneath.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, SupportsIndex

import torch
from torch import nn

from bridge.huggingface.fold import copy_dense, is_dense, like, load_folded, save_folded
from bridge.huggingface.forward import experts_forward, forward_fused, forward_router


class Dense(nn.Module):
    """Stays contiguous, and readable for JAX on a CPU, whatever is loaded. As any of these, it holds something."""

    _jaxmoe: Any

    def _load_from_state_dict(self, *given: Any, **more: Any) -> None:
        super()._load_from_state_dict(*given, **more)
        if is_patched(self):  # with assign=True what is loaded lies as it did in the checkpoint
            make_dense(self)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        reduced = super().__reduce_ex__(protocol)
        made_of = vars(type(self)).get("_made_of")  # such a class has no name that pickle finds
        return (_new, made_of, *reduced[2:]) if made_of else reduced


class Router(Dense):
    """Holds its RoutingConfig."""

    def forward(self, *given: Any, **more: Any) -> Any:
        if not is_patched(self):
            return _beneath(Router, self)(*given, **more)
        return forward_router(self, self._jaxmoe, *given, **more)


class Experts(Dense):
    """Holds what its block holds."""

    def forward(self, *given: Any, **more: Any) -> Any:
        if not is_patched(self):
            return _beneath(Experts, self)(*given, **more)
        return experts_forward(self, *given, **more)


class Block(Dense):
    """Holds a list of the weights of its shared experts, as they come back, if they are folded: otherwise an empty one.

    Where a block is copied alone, both share the list as they share the experts.
    """

    def forward(self, *given: Any, **more: Any) -> Any:
        if not is_fused(self):
            return _beneath(Block, self)(*given, **more)
        return forward_fused(self, *given, **more)

    def state_dict(self, *given: Any, **more: Any) -> Any:
        state = super().state_dict(*given, **more)
        if is_fused(self):
            save_folded(self, state, given[1] if len(given) > 1 else more.get("prefix", ""))
        return state

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if is_fused(self):
            load_folded(self, state_dict, prefix, missing_keys, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def put(module: nn.Module, kind: type[Dense], held: Any) -> None:
    """Puts a module on jaxmoe."""
    make_dense(module)
    if not isinstance(module, kind):  # it is where `take` has left ours beneath another one that is gone by now
        module.__class__ = _class(kind, type(module))
    module._jaxmoe = held


def take(module: nn.Module) -> None:
    """Undoes `put`. A class that others have put over ours keeps it beneath, where it does nothing from now on."""
    del module._jaxmoe
    if made_of := vars(type(module)).get("_made_of"):
        module.__class__ = made_of[1]


def is_patched(module: nn.Module) -> bool:
    """Whether a module is on jaxmoe."""
    return getattr(module, "_jaxmoe", None) is not None


def is_fused(module: nn.Module) -> bool:
    """Whether a module is a layer with folded shared experts."""
    return isinstance(module, Block) and bool(getattr(module, "_jaxmoe", []))


def own_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """The parameters and buffers of a module without those of the modules in it."""
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def make_dense(module: nn.Module) -> None:
    """Makes what a module holds contiguous, and readable for JAX on a CPU; the objects stay the same."""
    for _name, tensor in own_tensors(module):
        if not is_dense(tensor):
            with like(tensor):
                tensor.data = copy_dense(tensor.data)


_classes: dict[tuple[type, type], Any] = {}


def _class(kind: type[Dense], plain: type[nn.Module]) -> type[nn.Module]:
    """One under the name of transformers' own: transformers and others go by it."""
    fields = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "_made_of": (kind, plain)}
    made: type[nn.Module] = _classes.setdefault((kind, plain), type(plain.__name__, (kind, plain), fields))
    return made


def _new(kind: type[Dense], plain: type[nn.Module]) -> nn.Module:
    """Where pickles and copies start."""
    made = _class(kind, plain)
    return made.__new__(made)


def _beneath(kind: type[Dense], module: nn.Module) -> Callable[..., Any]:
    """The forward pass that a module would have without us. Who took ours before `take` may call it after that."""
    if isinstance(module, kind):
        found: Callable[..., Any] = super(kind, module).forward
        return found
    return MethodType(type(module).forward, module)
