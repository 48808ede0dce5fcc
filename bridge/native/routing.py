"""Launches of the routing kernels, on tensors that have been checked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from bridge.native import guards
from bridge.native.build import ALIGNMENT, JAX_DTYPES, aligned, build, laid, lying, row_stride, rows_for, shape
from bridge.native.driver import Kernel
from jaxmoe.config import RoutingConfig, rule_for
from kernels_pallas import count, route_grad
from kernels_pallas import route as route_kernels
from kernels_pallas import router_logits as logits_kernels
from kernels_pallas import router_logits_grad as grad_kernels
from kernels_pallas.launch import remembered

INT32, FLOAT32 = torch.int32, torch.float32


@functools.cache
def config_of(text: str) -> RoutingConfig:
    """The config that an op was given as a string."""
    return RoutingConfig.from_json(text)


@functools.cache
def _route(
    config: str,
    logits: torch.dtype,
    bias: torch.dtype | None,
    valid: str | None,
    with_load: bool,
    stride: int,
    rows: int,
    divisor: int,
    made_for: route_kernels.Config,
    is_aligned: bool,
    device: int,
) -> Kernel:
    rule = rule_for(config_of(config), bias is not None)
    counts = {None: None, "number": 0, "tensor": shape(INT32, 1)}
    return build(
        route_kernels.route,
        device,
        is_aligned,
        divisor=divisor,
        logits=shape(logits, rows, stride),
        bias=None if bias is None else shape(bias, rule.num_experts),
        num_valid_tokens=counts[valid],
        rule=rule,
        clear_load=with_load,
        config=made_for,
    )[0]


def route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    valid: torch.Tensor | None,
    number: int | None,
    config: str,
    weights: torch.Tensor,
    experts: torch.Tensor,
    load: torch.Tensor | None,
) -> None:
    """Fills weights, experts and load. How many tokens are valid says `valid`, on the device, or `number`."""
    num_tokens = logits.shape[0]
    if num_tokens == 0:
        if load is not None:
            load.zero_()
        return
    ins, outs = [logits.data_ptr()], [weights.data_ptr(), experts.data_ptr()]
    if bias is not None:
        ins.append(bias.data_ptr())
    if load is not None:
        outs.append(load.data_ptr())
    is_aligned = aligned(*ins, *outs)
    count_from = None
    sizes = [num_tokens]
    if valid is not None:
        count_from = "tensor"
        ins.append(valid.data_ptr())  # one number, read by itself: it may lie anywhere
    elif number is not None:
        count_from = "number"
        sizes.append(number)
    dtype, device = logits.dtype, logits.get_device()
    stride, rows, divisor, distance = laid(logits, num_tokens)
    made_for = route_kernels.config_for(num_tokens, logits.shape[1], weights.shape[1], _platform())
    kernel = _route(
        config,
        dtype,
        None if bias is None else bias.dtype,
        count_from,
        load is not None,
        stride,
        rows,
        divisor,
        made_for,
        is_aligned,
        device,
    )
    kernel(-(-num_tokens // made_for.rows), 1, *ins, *sizes, *distance, *outs)
    if load is not None:
        _count(experts, load, device)


class _Known(NamedTuple):
    """A call that went well and may come again."""

    alike: Callable[..., bool]  # whether tensors are like those of that call
    kernel: Kernel
    programs: int
    logits_bytes: int
    bias_bytes: int
    written_bytes: int  # of weights, and of experts


# By config and shape of the logits; more than one where bias, dtypes, devices or torch's modes differ.
_known: dict[tuple[str, torch.Size], list[_Known]] = {}
_MOST_KNOWN, _MOST_TOKENS = 4, 1024


def route_at_once(
    logits: torch.Tensor, bias: torch.Tensor | None, config: str, weights: torch.Tensor, experts: torch.Tensor
) -> bool:
    """`route`, if a call like this one is known to be right; else False, and nothing has been done.

    An engine routes for every layer and step, and the checks that can say what is wrong take longer than the launch.
    What can differ between tensors that are alike is where they lie.
    """
    shape = logits.shape
    for known in _known.get((config, shape), ()):
        if bias is None:
            if not known.bias_bytes and known.alike(logits, weights, experts):
                break
        elif known.bias_bytes and known.alike(logits, bias, weights, experts):
            break
    else:
        return False
    _, kernel, programs, logits_bytes, bias_bytes, written = known
    tokens = shape[0]
    a, b, c = logits.data_ptr(), weights.data_ptr(), experts.data_ptr()
    if (
        (a | b | c) % ALIGNMENT
        or -logits_bytes < a - b < written
        or -logits_bytes < a - c < written
        or -written < b - c < written
    ):
        return False
    if bias is None:
        kernel(programs, 1, a, tokens, b, c)
        return True
    d = bias.data_ptr()
    if d % ALIGNMENT or -bias_bytes < d - b < written or -bias_bytes < d - c < written:
        return False
    kernel(programs, 1, a, d, tokens, b, c)
    return True


def remember_route(
    logits: torch.Tensor, bias: torch.Tensor | None, config: str, weights: torch.Tensor, experts: torch.Tensor
) -> None:
    """Lets `route_at_once` have the next call like this one, which `route` has just done."""
    tokens, width = logits.shape
    tensors = [logits, *([] if bias is None else [bias]), weights, experts]
    usual = 0 < tokens <= _MOST_TOKENS and logits.is_contiguous() and rows_for(tokens, width, logits.itemsize) == 1
    made_for = route_kernels.config_for(tokens, width, weights.shape[1], _platform())
    if not usual or not aligned(*(tensor.data_ptr() for tensor in tensors)):
        return
    known = _known.setdefault((config, logits.shape), [])
    if len(known) >= _MOST_KNOWN or (alike := guards.alike(tensors)) is None:
        return
    bias_dtype, bias_bytes = (None, 0) if bias is None else (bias.dtype, bias.nbytes)
    kernel = _route(config, logits.dtype, bias_dtype, None, False, width, 1, 0, made_for, True, logits.get_device())
    programs = -(-tokens // made_for.rows)
    known.append(_Known(alike, kernel, programs, logits.nbytes, bias_bytes, weights.nbytes))


@functools.cache
def _count_load(num_ids: int, config: count.Config, is_aligned: bool, device: int) -> Kernel:
    experts, cleared = shape(INT32, 1, 1), shape(INT32, num_ids)
    return build(count.count_load, device, is_aligned, experts=experts, cleared=cleared, config=config)[0]


def _count(experts: torch.Tensor, load: torch.Tensor, device: int) -> None:
    """Counts the ids into `load`, which has been cleared."""
    ids, counts = experts.data_ptr(), load.data_ptr()
    num_items = experts.numel()
    config = count.config_for(num_items, _platform())
    (programs,) = count.grid_for(num_items, config)
    _count_load(load.numel(), config, aligned(ids, counts), device)(programs, 1, ids, counts, num_items, counts)


@functools.cache
def _route_backward(
    config: str, logits: torch.dtype, stride: int, rows: int, divisor: int, is_aligned: bool, device: int
) -> Kernel:
    rule = rule_for(config_of(config), False)  # a bias changes nothing in the gradient
    return build(
        route_grad.route_grad,
        device,
        is_aligned,
        divisor=divisor,
        logits=shape(logits, rows, stride),
        experts=shape(INT32, rows, rule.num_slots),
        grad=shape(FLOAT32, rows, rule.num_slots),
        rule=rule,
    )[0]


def route_backward(grad: torch.Tensor, logits: torch.Tensor, experts: torch.Tensor, config: str) -> torch.Tensor:
    """The gradient of the logits."""
    num_tokens = logits.shape[0]
    out = logits.new_empty(logits.shape)
    if num_tokens:
        ins, into = [tensor.data_ptr() for tensor in (logits, experts, grad)], out.data_ptr()
        stride, rows, divisor, distance = laid(logits, num_tokens)
        is_aligned, device = aligned(*ins, into), logits.get_device()
        kernel = _route_backward(config, logits.dtype, stride, rows, divisor, is_aligned, device)
        kernel(num_tokens, 1, *ins, *distance, into)
    return out


@functools.cache
def _router_logits(
    x: torch.dtype,
    weight: torch.dtype,
    experts: int,
    width: int,
    stride: int,
    rows: int,
    divisor: int,
    config: logits_kernels.Config,
    is_aligned: bool,
    device: int,
) -> Kernel:
    arrays = {"x": shape(x, rows, stride), "weight": shape(weight, experts, width)}
    options = {"config": config, "slices": 1}  # or any other number of slices: it is passed at the launch
    return build(logits_kernels.router_logits, device, is_aligned, divisor=divisor, **arrays, **options)[0]


@functools.cache
def _router_logits_sum(columns: int, dtype: torch.dtype, is_aligned: bool, device: int) -> Kernel:
    options = {"slices": 2, "dtype": JAX_DTYPES[dtype]}  # or any number, as above
    return build(logits_kernels.router_logits_sum, device, is_aligned, sums=shape(FLOAT32, 2, columns), **options)[0]


def _add_slices(sums: torch.Tensor, out: torch.Tensor, slices: int) -> None:
    """Fills `out` [R, C] with the sum of as many as lie in `sums` [slices * R, C]."""
    rows, columns = out.shape
    addresses = sums.data_ptr(), out.data_ptr()
    kernel = _router_logits_sum(columns, out.dtype, aligned(*addresses), out.get_device())
    kernel(*logits_kernels.sum_grid_for(rows, columns), addresses[0], rows, slices, addresses[1])


def router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x @ weight.T in float32."""
    (num_tokens, width), num_experts = x.shape, weight.shape[0]
    out = x.new_empty((num_tokens, num_experts), dtype=FLOAT32)
    if num_tokens:
        launch_router_logits(x, weight, out, *_cut_logits(num_tokens, num_experts, width, x.dtype, weight.dtype))
    return out


@remembered
def _cut_logits(
    num_tokens: int, num_experts: int, width: int, x: torch.dtype, weight: torch.dtype
) -> tuple[logits_kernels.Config, int]:
    """The config, and into how many slices H is cut."""
    kind = logits_kernels.kind_of(JAX_DTYPES[x], JAX_DTYPES[weight])
    config = logits_kernels.config_for(num_tokens, num_experts, width, kind, _platform())
    return config, logits_kernels.slices_for(num_tokens, num_experts, width, config)


def launch_router_logits(
    x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, config: logits_kernels.Config, slices: int
) -> None:
    """Fills `out` by this config, with H in this many slices; there is a token at least."""
    (num_tokens, width), num_experts = x.shape, weight.shape[0]
    sums = out if slices == 1 else out.new_empty((slices * num_tokens, num_experts))
    ins, to = (x.data_ptr(), weight.data_ptr()), sums.data_ptr()
    sizes, dtypes = (num_tokens, num_experts, width, row_stride(x)), (x.dtype, weight.dtype)
    kernel, grid, passed = _planned_logits(sizes, dtypes, config, slices, aligned(*ins, to), x.get_device())
    kernel(*grid, *ins, *passed, to)
    if slices > 1:
        _add_slices(sums, out, slices)


@remembered
def _planned_logits(
    sizes: tuple[int, int, int, int],  # tokens, experts, H, and how far apart tokens lie
    dtypes: tuple[torch.dtype, torch.dtype],  # of x and of the weight
    config: logits_kernels.Config,
    slices: int,
    is_aligned: bool,
    device: int,
) -> tuple[Kernel, tuple[int, int], tuple[int, ...]]:
    """The kernel, its programs, and what to pass between the addresses."""
    num_tokens, num_experts, width, apart = sizes
    stride, rows, divisor, distance = lying(apart, width, num_tokens, dtypes[0].itemsize)
    rows = max(rows, rows_for(num_tokens, num_experts, 4))  # offsets reach the result, too
    kernel = _router_logits(*dtypes, num_experts, width, stride, rows, divisor, config, is_aligned, device)
    steps = () if config.plain else (logits_kernels.steps_for(width, slices, config),)
    return kernel, logits_kernels.grid_for(num_tokens, num_experts, slices, config), (num_tokens, *steps, *distance)


def _platform() -> str:
    return "rocm" if torch.version.hip else "cuda"


@functools.cache
def _grad_x(
    weight: torch.dtype,
    dtype: torch.dtype,
    experts: int,
    width: int,
    rows: int,
    config: grad_kernels.Config,
    is_aligned: bool,
    device: int,
) -> Kernel:
    arrays: dict[str, Any] = {"grad": shape(FLOAT32, rows, experts), "weight": shape(weight, experts, width)}
    options = {"dtype": JAX_DTYPES[dtype], "config": config}
    return build(grad_kernels.router_logits_grad_x, device, is_aligned, **arrays, **options)[0]


@functools.cache
def _grad_weight(
    x: torch.dtype,
    dtype: torch.dtype,
    experts: int,
    width: int,
    stride: int,
    rows: int,
    divisor: int,
    config: grad_kernels.Config,
    is_aligned: bool,
    device: int,
) -> Kernel:
    arrays = {"grad": shape(FLOAT32, rows, experts), "x": shape(x, rows, stride)}
    # One slice, or any other number: it is passed at the launch.
    options = {"dtype": JAX_DTYPES[dtype], "width": width, "config": config, "slices": 1}
    function = grad_kernels.router_logits_grad_weight
    return build(function, device, is_aligned, divisor=divisor, **arrays, **options)[0]


def router_logits_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and weight."""
    (num_tokens, width), num_experts = x.shape, weight.shape[0]
    if num_tokens == 0:
        return torch.empty_like(x), torch.zeros_like(weight)
    dx, dweight = x.new_empty(x.shape), torch.empty_like(weight)
    ins, into, device = (grad.data_ptr(), weight.data_ptr()), dx.data_ptr(), x.get_device()
    config = grad_kernels.config_for(num_experts, width, JAX_DTYPES[weight.dtype], _platform(), by_token=True)
    reach = rows_for(num_tokens, num_experts, 4)  # offsets reach all of grad, too
    rows = max(reach, rows_for(num_tokens, width, x.itemsize))
    is_aligned = aligned(*ins, into)
    kernel = _grad_x(weight.dtype, x.dtype, num_experts, width, rows, config, is_aligned, device)
    kernel(*grad_kernels.grid_for(num_tokens, width, 1, config), *ins, num_tokens, into)

    config = grad_kernels.config_for(num_experts, width, JAX_DTYPES[x.dtype], _platform(), by_token=False)
    slices = grad_kernels.slices_for(num_tokens, num_experts, width, config)
    sums = dweight if slices == 1 else grad.new_empty((slices * num_experts, width))
    ins, into = (grad.data_ptr(), x.data_ptr()), sums.data_ptr()
    stride, rows, divisor, distance = laid(x, num_tokens)
    rows, is_aligned = max(reach, rows), aligned(*ins, into)
    kernel = _grad_weight(x.dtype, sums.dtype, num_experts, width, stride, rows, divisor, config, is_aligned, device)
    sizes = num_tokens, grad_kernels.steps_for(num_tokens, slices, config), *distance
    kernel(*grad_kernels.grid_for(num_experts, width, slices, config), *ins, *sizes, into)
    if slices > 1:
        _add_slices(sums, dweight, slices)
    return dx, dweight
