"""Which of the two paths a call takes: the torch ops, native on a GPU, or DLPack and JAX's runtime."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.autograd import forward_ad

from bridge.native.build import target_of

_Function = TypeVar("_Function", bound=Callable[..., Any])
_PLAIN = (torch.Tensor, torch.nn.Parameter)
# Private, both; without them what they save is not saved, and a function transform is not noticed here.
_below_autograd: Callable[[], Any] = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)
_transform: Callable[[], Any] = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)


def is_eager(*tensors: torch.Tensor | None) -> bool:
    """Whether a call on these tensors is run as it comes, and nobody asks for their gradients.

    Then results can be allocated here and filled in place, which saves what torch does around an op that has a gradient
    (20 microseconds). Not while torch traces, not where tangents are carried along (torch.autograd.forward_ad), and not
    within torch.func's transforms, whose tensors look like any other.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or _transform() is not None:
        return False
    with_gradients = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or (with_gradients and tensor.requires_grad)):
            return False
    return True


def is_memory(*tensors: torch.Tensor | None) -> bool:
    """Whether all of them have an address: not where torch traces, nor where there are shapes alone."""
    return all(tensor is None or (type(tensor) in _PLAIN and not tensor.is_meta) for tensor in tensors)


def at_once(op: Callable[..., Any], *args: Any) -> Any:
    """op(*args), past what torch does around an op that has a gradient where nobody asks for one (`is_eager`)."""
    return run(op, is_eager(*[arg for arg in args if isinstance(arg, torch.Tensor)]), *args)


def run(op: Callable[..., Any], eager: bool, *args: Any) -> Any:
    """`at_once`, where it is known whether the call `is_eager`."""
    if eager:
        with _below_autograd():
            return op(*args)
    if forward_ad._current_level >= 0 or _is_transformed():
        names = (argument.name for argument in op._schema.arguments)  # type: ignore[attr-defined]
        check_derivatives(**dict(zip(names, args, strict=False)))
    return op(*args)


def _is_transformed() -> bool:
    """Whether a transform of torch.func is under way that torch.compile does not see."""
    return not torch.compiler.is_compiling() and _transform() is not None


def check_derivatives(**values: Any) -> None:
    """Raises ValueError where a tensor asks for a derivative that an op does not have."""
    check_no_tangents(**values)
    if not torch.is_grad_enabled() or not _is_transformed():
        return
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and _is_followed(value):
            raise ValueError(
                f"{name}: expected a tensor that torch.func takes no gradient of, got one that it does: torch has none "
                "of a library's ops there (torch.func.grad, vjp, jacrev); use torch.autograd.grad"
            )


def _is_followed(tensor: torch.Tensor) -> bool:
    """Whether a tensor, or one within it, is a variable of torch.func.grad."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_gradtrackingtensor(tensor) and tensor.requires_grad:
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def check_no_tangents(**values: Any) -> None:
    """Raises ValueError where a tensor has a tangent of forward-mode differentiation, which would be lost."""
    if forward_ad._current_level < 0:
        return
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise ValueError(
                f"{name}: expected a tensor without a tangent, got one that has it: there is no forward-mode "
                "derivative (torch.autograd.forward_ad, torch.func.jvp)"
            )


def untraced(function: _Function) -> _Function:
    """Around what torch.compile cannot trace: it breaks its graph there, or says so where it may not.

    Not torch.compiler.disable at once, which imports the compiler (a second) for those who never compile.
    """
    disabled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def entry(*args: Any, **kwargs: Any) -> Any:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return cast(_Function, entry)


def _is_watched() -> bool:
    """Whether torch itself wants to see what is called, whatever the tensors look like."""
    return _transform() is not None or torch._C._get_tracing_state() is not None or has_modes()


_runs_natively: dict[int, bool] = {}  # by device


def _find_out(device: int) -> bool:
    try:
        target_of(device)
        _runs_natively[device] = True
    except ValueError:  # a GPU that the kernels do not run on: jaxmoe has XLA for it
        _runs_natively[device] = False
    return _runs_natively[device]


def runs_natively(tensor: torch.Tensor) -> bool:
    """Whether this tensor lies on a GPU that the kernels run on."""
    if not tensor.is_cuda:
        return False
    device = tensor.get_device()
    natively = _runs_natively.get(device)
    return _find_out(device) if natively is None else natively


def has_modes() -> bool:
    """Whether a mode of torch's dispatcher sees each op: fake tensors, make_fx, a user's own."""
    return torch._C._len_torch_dispatch_stack() > 0


def goes_below(eager: bool, tensor: torch.Tensor) -> bool:
    """Whether `run` reaches what an op is on a GPU below autograd, for ops that are something else above it."""
    return eager and _below_autograd is not contextlib.nullcontext and runs_natively(tensor)


def takes_ops(tensor: Any, implementation: str | None) -> bool:
    """Whether a call on this tensor goes through the torch ops.

    With implementation=None: on a GPU that the kernels run on, and wherever torch traces (torch.compile, fake tensors,
    make_fx, torch.jit.trace) or transforms (torch.func), since what goes to JAX would be a constant there. And of meta
    tensors, of which an op says the shapes.
    "native" asks for it; raises ValueError where the tensor is not on such a GPU. Every other name is a matter of JAX.
    """
    if implementation is None:
        if torch.compiler.is_compiling():
            return True
        kind = type(tensor)
        if kind not in _PLAIN:
            return isinstance(tensor, torch.Tensor)
        # Ops on a GPU that the kernels do not run on are refused: what watches does not see what JAX does there.
        return runs_natively(tensor) or (not tensor.is_cuda and (tensor.is_meta or _is_watched()))
    if implementation != "native":
        return False
    if not isinstance(tensor, torch.Tensor) or not tensor.is_cuda:
        got = f"one on {tensor.device}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"implementation: 'native' needs tensors on a GPU, got {got}")
    target_of(tensor.get_device())  # says what is wrong
    return True
