"""jaxmoe in the models of Hugging Face transformers.

`patch(model)` puts the routers and experts of a whole model on jaxmoe. Importing this package also registers "jaxmoe"
with transformers' experts interface: `from_pretrained(..., experts_implementation="jaxmoe")` runs the experts alone,
behind whatever router the model has, and serves every model whose experts follow that interface, also of families
that `patch` does not know, sharded for tensor parallelism, or under PEFT.

It needs transformers 5.13 or newer: before, most routers returned logits alone and the layers chose the experts.

Example:
  >>> import torch, transformers, bridge.huggingface
  >>> config = transformers.MixtralConfig(
  ...     hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
  ...     vocab_size=64, num_local_experts=4, bos_token_id=None, eos_token_id=None,
  ... )
  >>> model, tokens = transformers.MixtralForCausalLM(config).eval(), torch.tensor([[1, 2, 3]])
  >>> with torch.no_grad():
  ...     expected = model(tokens).logits
  ...     with bridge.huggingface.patch(model):
  ...         logits = model(tokens).logits
  >>> torch.allclose(logits, expected, atol=1e-5)
  True
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import transformers
from packaging.version import Version
from torch import nn
from transformers.activations import ACT2FN

OLDEST = "5.13.0"

if Version(transformers.__version__) < Version(OLDEST):  # before anything of it is imported that older ones lack
    raise ImportError(f"transformers: expected version {OLDEST} or newer, got {transformers.__version__}")

from bridge.checks import FLOATS  # noqa: E402
from bridge.huggingface.fold import fold, num_foldable, refuse_sharded, unfold  # noqa: E402
from bridge.huggingface.forward import experts_forward  # noqa: E402
from bridge.huggingface.modules import (  # noqa: E402
    Block,
    Dense,
    Experts,
    Router,
    is_fused,
    is_patched,
    own_tensors,
    put,
    take,
)
from jaxmoe import RoutingConfig  # noqa: E402

__all__ = ["Patch", "experts_forward", "patch", "unpatch"]


class Patch(AbstractContextManager["Patch"]):
    """What `patch` returns. Leaving it as a context manager restores the model; it is entered once."""

    def __init__(self, model: nn.Module, experts: Any) -> None:
        self._model, self._experts = model, experts  # those of one layer,
        self._held = experts._jaxmoe  # and what they hold since this patch
        self._used = ""

    def restore(self) -> None:
        """`unpatch`, on the model that was given to `patch`. Once is enough; what was patched anew since stays so."""
        if getattr(self._experts, "_jaxmoe", None) is self._held:
            unpatch(self._model)
        self._used = "restored"

    def __enter__(self) -> Patch:
        if self._used:  # leaving one block restores: another would run an unpatched model
            raise RuntimeError(f"Patch: expected a new one for each block, got one that was {self._used}; patch again")
        self._used = "entered"
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()


def patch(model: nn.Module, *, fuse_shared_experts: bool = False) -> Patch:
    """Puts the MoE layers of a transformers model on jaxmoe, in place.

    Routers run `bridge.router_logits` and `bridge.route` on their weight and bias as they are stored, whatever their
    dtype; experts run `bridge.plan_dispatch`, `dispatch`, `experts` and `combine`, on a GPU as `bridge.moe` does: the
    first product gathers tokens as it reads them. What the kernels read is made contiguous here, and again by
    `load_state_dict`; parameters and buffers stay the same objects, with the same names and shapes, so checkpoints load
    before and after. Router logits are float32 in every model, also in those whose own routers round them to the
    activations' dtype before they choose. How a router routes is read here, from the router itself (`top_k`,
    `norm_topk_prob` and so on), which took it from the model's config when it was made; what is set later waits for
    `restore`. The first layers of DeepSeek-V4, which choose experts by token id, keep their router and their shared
    expert.

    Args:
      model: a transformers model, or a part of one, of a family that `RoutingConfig.from_hf` knows.
      fuse_shared_experts: also folds the shared experts of each layer into the stacks of its experts, and routes to
        them in the same top-k; a shared MLP that is n times as wide as an expert becomes n experts. Until `restore` the
        stacks are larger and the shared MLP has no weights of its own: make optimizers and DistributedDataParallel
        afterwards, and anew after `restore`. Here and there gradients of these parameters are dropped, and the
        `backward` of a loss from before raises RuntimeError, if it has not run by then. `state_dict` and
        `load_state_dict` keep all names and shapes. With FSDP2 fuse first, then `fully_shard`, and do not restore: what
        is sharded can be neither folded nor unfolded. `set_model_state_dict` takes sharded state dicts, and full ones
        if every rank has them (no `broadcast_from_rank0`).

    Returns:
      Patch: call its `restore()`, or use it as a context manager.

    Raises:
      ValueError: names the argument, what was expected and what came: a model without MoE layers or of another family;
        one that is patched, or has modules that others replaced or gave another forward; parameters of a dtype that no
        kernel reads (float64); a router that holds what jaxmoe cannot do; when fusing, shared experts that are not
        simply added (Qwen3-Next), cannot be split into experts like the routed ones, are sharded, or do not exist.
        Nothing has been changed then.

    Source: the modules of Hugging Face transformers 5.13 to 5.24.

    Example:
      >>> import torch, bridge.huggingface
      >>> bridge.huggingface.patch(torch.nn.Linear(2, 2))
      Traceback (most recent call last):
          ...
      ValueError: model: expected a transformers model with MoE layers, got Linear without any
    """
    layers = _find_layers(model)
    if fuse_shared_experts:
        layers = [_with_shared(model, layer) for layer in layers]
    try:
        for layer in layers:
            _put(layer)
    except BaseException:
        _undo(model)
        raise
    return Patch(model, layers[0].experts)


def unpatch(model: nn.Module) -> None:
    """Gives a model back as it was before `patch`, with the values that its parameters have by now.

    It needs no handle: a copy of a patched model, or one out of a pickle, is a patched model of its own. What others
    have put on top of a patched module, hooks, forwards or classes, stays there.

    Args:
      model: a model, or a part of one. One that is not patched stays as it is.

    Raises:
      ValueError: names the argument, what was expected and what came: shared experts are folded into parameters that
        have been sharded, replaced or wrapped since, or the part leaves half of such a layer. Nothing has been changed
        then.

    Example:
      >>> import torch, bridge.huggingface
      >>> bridge.huggingface.unpatch(torch.nn.Linear(2, 2))
    """
    patched = {name: module for name, module in model.named_modules() if is_patched(module)}
    fused: dict[str, Any] = {name: module for name, module in patched.items() if is_fused(module)}
    _check_parts(patched, fused)
    for name, block in fused.items():
        refuse_sharded("model", model, name, block)
    _undo(model)


def _undo(model: nn.Module) -> None:
    """Layer by layer: where there is no memory for one, it and those after it stay patched."""
    blocks: list[Any] = [module for module in model.modules() if is_fused(module)]
    for block in blocks:
        unfold(block, block._jaxmoe)
        for part in (block, block.gate, block.experts):
            take(part)
    for module in [module for module in model.modules() if is_patched(module)]:
        take(module)


class _Layer(NamedTuple):
    """An MoE layer: modules of transformers, and how its router routes, None where it chooses by token id."""

    name: str
    block: Any
    router: Any
    experts: Any
    config: RoutingConfig | None  # n_shared_experts counts those that are folded


def _find_layers(model: nn.Module) -> list[_Layer]:
    layers = []
    for name, block in model.named_modules():
        experts: Any = getattr(block, "experts", None)
        router = getattr(block, "gate", getattr(block, "router", None))
        if not isinstance(router, nn.Module) or not isinstance(experts, nn.Module) or not _has_experts(experts):
            continue
        if not hasattr(experts, "is_concatenated"):
            raise ValueError(
                f"model: expected modules of transformers.models, got {_kind(experts)} around the experts in {name!r}; "
                f"patch before others put theirs there, or {_ALONE}"
            )
        config = _routing(experts.config, _ALONE)
        for module in (block, router, experts):
            _check_module(name, module)
        layer = _Layer(name, block, router, experts, None)
        if not hasattr(router, "tid2eid"):
            layer = layer._replace(config=_held(name, router, config))
        _check_dtypes(layer)
        layers.append(layer)
    if not layers:
        alone = _ALONE if _has_experts(model) else ""
        if hasattr(model, "config"):
            _routing(model.config, alone)
        got = f"{type(model).__name__} without any" + (f" that has a router; {alone}" if alone else "")
        raise ValueError(f"model: expected a transformers model with MoE layers, got {got}")
    return layers


# What serves every model whose experts follow transformers' interface.
_ALONE = 'run the experts alone, by experts_implementation="jaxmoe" or model.set_experts_implementation("jaxmoe")'


def _has_experts(module: nn.Module) -> bool:
    return any(hasattr(part, "is_concatenated") for part in module.modules())


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"


def _routing(hf_config: Any, alone: str) -> RoutingConfig:
    try:
        return RoutingConfig.from_hf(hf_config)
    except ValueError as error:
        raise ValueError(f"model: {error}" + (f"; {alone}" if alone else "")) from error


# What routers hold of a RoutingConfig, and what they call it: they read their config once, when they are made.
_HELD = {
    "top_k": "top_k",
    "norm_topk_prob": "renormalize",
    "routed_scaling_factor": "routed_scaling_factor",
    "num_group": "n_group",
    "topk_group": "topk_group",
}
_SCORES = {type(ACT2FN[name]): name for name in ("sigmoid", "sqrtsoftplus")}
_METHODS: dict[str, dict[str, Any]] = {"greedy": {"n_group": 1, "topk_group": 1}, "group_limited_greedy": {}}
# The least sum of weights that Ernie divides by is 1e-12; jaxmoe divides by any.
_MOST_NORM_MIN = 1e-6


def _held(name: str, router: Any, config: RoutingConfig) -> RoutingConfig:
    """How a router routes: as it holds it, and as its config says where it holds nothing."""
    fail = lambda what, expected, got: ValueError(f"model: {what}: expected {expected}, got {got!r} in {name!r}")
    fields: dict[str, Any] = {"num_experts": len(router.weight), "n_shared_experts": 0}
    fields |= {field: getattr(router, held) for held, field in _HELD.items() if hasattr(router, held)}
    if hasattr(router, "score_fn"):
        if (score := type(router.score_fn)) not in _SCORES:
            raise fail("score_fn", f"one of {[kind.__name__ for kind in _SCORES]}", score.__name__)
        fields["scoring_func"] = _SCORES[score]
    if hasattr(router, "topk_method"):
        if router.topk_method not in _METHODS:
            raise fail("topk_method", f"one of {list(_METHODS)}", router.topk_method)
        fields |= _METHODS[router.topk_method]
    if (least := getattr(router, "norm_min", 0.0)) > _MOST_NORM_MIN:
        raise fail("norm_min", f"at most {_MOST_NORM_MIN}", least)
    try:
        return dataclasses.replace(config, **fields)
    except ValueError as error:
        raise ValueError(f"model: {error} in {name!r}") from error


def _check_dtypes(layer: _Layer) -> None:
    """Raises ValueError where no kernel reads a parameter or buffer of the layer."""
    for path, module in _read_by_kernels(layer).items():
        for name, tensor in own_tensors(module):
            if tensor.dtype not in FLOATS:
                wanted = " or ".join(map(str, FLOATS))
                got = f"{tensor.dtype} in {f'{path}.{name}'.lstrip('.')!r}"
                raise ValueError(f"model: expected parameters of {wanted}, got {got}")


def _check_module(name: str, module: nn.Module) -> None:
    """Raises ValueError where a module's forward pass is not the one that we know."""
    known, where = "expected modules with the forward of their class", f"the {type(module).__name__} in {name!r}"
    if not type(module).__module__.startswith("transformers.models."):
        got = f"{_kind(module)} in {name!r}; patch before others put theirs there, or {_ALONE}"
        raise ValueError(f"model: expected modules of transformers.models, got {got}")
    if is_patched(module):
        raise ValueError(f"model: {known}, got that of jaxmoe on {where}; restore it first")
    if (forward := vars(module).get("forward")) is not None:
        raise ValueError(f"model: {known}, got one of {_origin(forward)} on {where}; restore it first, or {_ALONE}")


def _origin(forward: Any) -> str:
    """The module of Python in which a function was made, whatever name functools.wraps has given it."""
    while (inner := getattr(forward, "func", getattr(forward, "__func__", None))) is not None:
        forward = inner
    return str(getattr(forward, "__globals__", {}).get("__name__", type(forward)))


def _check_parts(patched: dict[str, Any], fused: dict[str, Any]) -> None:
    """Raises ValueError where half of a layer with folded shared experts would be left."""
    inside = {module for block in fused.values() for module in block.modules()}
    for name, module in patched.items():
        if not isinstance(module, Router | Experts) or module in inside:
            continue
        if module._jaxmoe.n_shared_experts if isinstance(module, Router) else module._jaxmoe:
            got = f"{type(module).__name__} in {name!r} alone"
            raise ValueError(f"model: expected whole layers where shared experts are folded, got {got}")


def _put(layer: _Layer) -> None:
    for module in _read_by_kernels(layer).values():
        if module not in (layer.block, layer.router, layer.experts):
            put(module, Dense, ())
    if layer.config:
        put(layer.router, Router, layer.config)
    kept: list[nn.Parameter] = []
    put(layer.experts, Experts, kept)
    put(layer.block, Block, kept)
    if layer.config and layer.config.n_shared_experts:
        kept += fold(layer.block)


def _with_shared(model: nn.Module, layer: _Layer) -> _Layer:
    if layer.config is None:
        return layer
    refuse_sharded("fuse_shared_experts", model, layer.name, layer.block)
    config = dataclasses.replace(layer.config, n_shared_experts=num_foldable(layer.name, layer.block))
    return layer._replace(config=config)


def _read_by_kernels(layer: _Layer) -> dict[str, nn.Module]:
    """The modules whose own parameters and buffers kernels read, by their paths."""
    read = [layer.block, layer.experts, *(layer.router.modules() if layer.config else ())]
    return {path: module for path, module in layer.block.named_modules(prefix=layer.name) if module in read}
