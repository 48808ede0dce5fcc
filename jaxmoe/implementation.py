"""Which implementation runs: the Pallas kernels, the same kernels interpreted, or plain jnp through XLA."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("pallas", "interpret", "xla")
GPU_PLATFORMS = ("cuda", "rocm")
MIN_CAPABILITY = 8.0  # of CUDA devices


# A computation on the kernels: a function of arrays that takes `target` ("cuda" or "rocm") and `interpret` too.
Kernels = Callable[..., Any]


@functools.cache
def _old_gpu() -> str | None:
    """The first CUDA device that the kernels do not run on, if there is one."""
    for device in jax.devices():
        try:
            capability = float(getattr(device, "compute_capability", MIN_CAPABILITY))
        except ValueError:  # ROCm: "gfx942"
            continue
        if capability < MIN_CAPABILITY:
            return f"{device.device_kind} (compute capability {capability})"
    return None


def default_implementation() -> tuple[str, str]:
    """(what `implementation=None` means on jax's first device, and why)."""
    device = jax.devices()[0]
    if device.platform not in ("gpu", *GPU_PLATFORMS):
        return "xla", f"the Pallas kernels need a GPU, and {device} is none"
    if old := _old_gpu():
        return "xla", f"the Pallas kernels need compute capability {MIN_CAPABILITY}, got {old}"
    if str(getattr(device, "compute_capability", "")).startswith("gfx"):
        return "pallas", f"{device.device_kind} is a ROCm GPU; for ROCm the kernels have been compiled, not run by us"
    return "pallas", f"{device.device_kind} is a CUDA GPU of compute capability {MIN_CAPABILITY} or more"


def check_implementation(implementation: str | None, *args: Any) -> None:
    """Raises ValueError for a name that is not known, and for "pallas" on arrays that do not lie on a GPU."""
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected None or one of {IMPLEMENTATIONS}, got {implementation!r}")
    if implementation != "pallas":
        return
    if old := _old_gpu():
        raise ValueError(f"implementation: 'pallas' needs compute capability {MIN_CAPABILITY} or more, got {old}")
    for leaf in jax.tree.leaves(args):
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            if platforms := {d.platform for d in leaf.devices()} - {"gpu", *GPU_PLATFORMS}:
                raise ValueError(f"implementation: 'pallas' needs arrays on a GPU, got one on {min(platforms)}")


def _axes(tree: Any) -> frozenset[Any]:
    """The mesh axes, under shard_map, that any array of the tree varies over."""
    return frozenset[Any]().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree)))


def _varying(tree: Any, axes: frozenset[Any]) -> Any:
    """The tree, each array varying over all of `axes`."""

    def vary(leaf: Any) -> Any:
        missing = axes - jax.typeof(leaf).manual_axis_type.varying
        return jax.lax.pcast(leaf, tuple(missing), to="varying") if missing else leaf

    return jax.tree.map(vary, tree)


def alike(*args: Any) -> tuple[Any, ...]:
    """The arguments, each varying over every mesh axis that one of them varies over, as `run` needs them.

    To be called outside the custom derivatives: then the gradient of an argument that is the same on all devices is
    summed over them.
    """
    return _varying(args, _axes(args))


def _explicit_axes(names: Sequence[str], args: Sequence[Any]) -> tuple[str, ...]:
    """The axes of the mesh in use over which types say how arrays are sharded; raises ValueError where one is."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    axes = tuple(name for name, kind in kinds if kind == jax.sharding.AxisType.Explicit)
    if axes:
        for path, leaf in jax.tree_util.tree_leaves_with_path(dict(zip(names, args, strict=True))):
            spec = jax.typeof(leaf).sharding.spec
            if any(part is not None for part in spec):
                raise ValueError(
                    f"{jax.tree_util.keystr(path, simple=True, separator='.')}: expected an array that is not sharded "
                    f"over the mesh's explicit axes {axes}, got {spec}; call this under jax.shard_map, or "
                    "jax.sharding.auto_axes"
                )
    return axes


def check_not_sharded(**arrays: Any) -> None:
    """Raises ValueError, by its name, for an array that is sharded over an explicit axis of the mesh in use."""
    _explicit_axes(list(arrays), list(arrays.values()))


def compiled(function: Callable[..., Any], *, out: int | None = None) -> Callable[..., Any]:
    """function(static, *arrays) under jit; the argument at `out` is donated.

    It is kept though XLA's implementation does not read it: what is donated must reach the computation. Neither Pallas
    nor ragged_dot knows shardings that types carry, so what all devices have is computed as if they did not.
    """
    named = list(inspect.signature(function).parameters)[1:]

    @functools.wraps(function)
    def entry(static: Any, *args: Any) -> Any:
        names = named if len(named) == len(args) else [f"argument {i}" for i in range(len(args))]
        run = lambda *args: function(static, *alike(*args))
        if axes := _explicit_axes(names, args):
            run = jax.sharding.auto_axes(run, axes=axes, out_sharding=jax.sharding.PartitionSpec())
        return run(*args)

    return jax.jit(entry, static_argnums=0, donate_argnums=() if out is None else out, keep_unused=True)


def _with_derivative(
    kernels: Callable[..., Any], plain: Callable[..., Any], out: int | None = None
) -> Callable[..., Any]:
    """`kernels`, whose derivative is that of `plain`: for second derivatives, as the first have kernels of their own.

    Also where `plain` is what runs, since JAX takes the derivative of all that could. The argument at `out` is written
    over, so it is not kept, and has no gradient; `plain` does not read it.
    """

    @jax.custom_vjp
    def call(*args: Any) -> Any:
        return kernels(*args)

    def forward(*args: Any) -> tuple[Any, Any]:
        return kernels(*args), [None if i == out else arg for i, arg in enumerate(args)]

    call.defvjp(forward, lambda args, grads: jax.vjp(plain, *args)[1](grads))

    def entry(*args: Any) -> Any:
        floats = any(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(args))
        return call(*args) if floats else kernels(*args)

    return entry


def run(
    implementation: str | None, kernels: Kernels, plain: Callable[..., Any], *args: Any, out: int | None = None
) -> Any:
    """Calls `kernels` or, for "xla", `plain`. None is settled when the computation is lowered, by its platform.

    out: which argument is donated, and not read by `plain`.
    """
    axes = _axes(args)

    def xla(*args: Any) -> Any:  # an argsort does not vary, for jax, where what it sorts does
        return _varying(plain(*args), axes)

    if implementation == "xla":
        return xla(*args)
    if implementation == "interpret":
        return _with_derivative(functools.partial(kernels, target="cuda", interpret=True), xla, out)(*args)

    def gpu(*args: Any, target: str) -> Any:
        run = functools.partial(kernels, target=target, interpret=False)
        # What comes of the Mosaic GPU backend does not vary, for jax.
        return _with_derivative(lambda *args: _varying(run(*args), axes), xla, out)(*args)

    per_platform: dict[str, Callable[..., Any]] = {
        platform: functools.partial(gpu, target=platform) for platform in GPU_PLATFORMS
    }
    if implementation is None:
        if _old_gpu():
            del per_platform["cuda"]
        per_platform["default"] = xla
    else:  # anywhere else Pallas says that it cannot
        per_platform["default"] = functools.partial(gpu, target="cuda")
    return jax.lax.platform_dependent(*args, **per_platform)
