"""The layer as a Flax NNX module. Needs flax, which `import jaxmoe` does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("jaxmoe.nnx needs flax: pip install 'jaxmoe[flax]'") from error

from jaxmoe import arguments, layer, routing
from jaxmoe.arguments import check_array, check_dtype
from jaxmoe.config import RoutingConfig
from jaxmoe.experts import check_activation
from jaxmoe.implementation import check_implementation
from jaxmoe.layer import MoEParams
from jaxmoe.routing import Routing
from jaxmoe.shared import SharedMLP

Initializer = Callable[..., Any]  # (key, shape, dtype) -> array, or what nnx.with_partitioning makes of one

_kernel_init = jax.nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=())
_router_init = jax.nn.initializers.lecun_normal(in_axis=-1, out_axis=-2, batch_axis=())
_experts_init = jax.nn.initializers.lecun_normal(in_axis=-2, out_axis=-1, batch_axis=0)


class BalancingBias(nnx.Variable[Any]):
    """The bias that evens out the load: moved by `MoE.update_bias`, not by an optimiser of `nnx.Param`."""


class Load(nnx.Variable[Any]):
    """How many (token, slot) pairs chose each expert in the last call: a metric."""


def _check_size(name: str, value: Any) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name}: expected a positive int, got {value!r}")


def _check_bool(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise ValueError(f"{name}: expected a bool, got {value!r}")


def _own(array: Any) -> jax.Array:
    """The array; a copy where it is NumPy's, which either side could write to."""
    return array if isinstance(array, jax.Array) else jnp.array(array)


class GatedMLP(nnx.Module):
    """A gated MLP, (activation(gate) * up) @ down: shared experts that are kept apart.

    Args:
      hidden_size: H.
      width: W.
      activation: as for `jaxmoe.experts`: "silu", "gelu" (exact) or "gelu_tanh".
      gate_up_init: called with (key, shape, dtype), as Flax's initialisers are; `nnx.with_partitioning` works.
      down_init: the same.
      param_dtype: of the parameters.
      rngs: its stream `params` gives the initial weights.

    Attributes:
      gate_up: nnx.Param [H, 2 * W].
      down: nnx.Param [W, H].
    """

    def __init__(
        self,
        hidden_size: int,
        width: int,
        *,
        activation: str = "silu",
        gate_up_init: Initializer = _kernel_init,
        down_init: Initializer = _kernel_init,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        check_activation(activation)
        self.activation = activation
        self.gate_up = nnx.Param(gate_up_init(rngs.params(), (hidden_size, 2 * width), param_dtype))
        self.down = nnx.Param(down_init(rngs.params(), (width, hidden_size), param_dtype))

    def params(self, dtype: Any = None) -> SharedMLP:
        """The parameters, cast to `dtype`; None: as they are."""
        gate_up, down = jnp.asarray(self.gate_up[...], dtype), jnp.asarray(self.down[...], dtype)
        return SharedMLP(gate_up=gate_up, down=down, activation=self.activation)

    def __call__(self, x: jax.Array) -> jax.Array:
        """[T, H] in x's dtype."""
        return self.params(x.dtype)(x)


class MoE(nnx.Module):
    """`jaxmoe.moe` as a Flax NNX module; no token is dropped, unless a call sets `max_rows`.

    The output is scaling * sum(routed) + sum(shared), whatever `config.scale_weights` says.

    A call keeps the load in `load`, which is a change of state. `nnx.jit`, `nnx.grad` and `nnx.remat` carry it through,
    of a module that is an argument. Turn it off with track_load=False (`routing.load` is returned either way) for

    * a transform of a closure over the module, be it `jax.jit`, `jax.checkpoint` or `nnx.jit`: Flax raises a
      TraceContextError ("Cannot mutate Load from a different trace level");
    * `nnx.vmap` of a module that is not mapped (in_axes=None): a load for each would come out, a ValueError;
    * `jax.jit` of a module that is an argument: the change is lost, without an error;
    * `nnx.shard_map` over tokens: each device has the load of its own, which is refused (with check_vma=False, which
      keeps JAX from telling, one device's would be kept). Sum what is returned: `jax.lax.psum(routing.load, axis)`.

    Args:
      config: how to route. With n_shared_experts > 0 the shared experts are slots of the same stack.
      hidden_size: H.
      intermediate_size: I, of one expert.
      shared_intermediate_size: W, of a gated MLP apart that is added to the output; for a config without shared
        experts. None: there is none.
      activation: as for `jaxmoe.experts`: "silu", "gelu" (exact) or "gelu_tanh"; of the MLP apart, too.
      router_init: called with (key, [E, H], dtype), as Flax's initialisers are; `nnx.with_partitioning` works.
      gate_up_init: the same, with [E + n_shared_experts, H, 2 * I].
      down_init: the same, with [E + n_shared_experts, I, H]. For the MLP apart, set `shared` to a `GatedMLP`.
      use_bias: whether there is a balancing bias; it starts at zero, in float32.
      track_load: whether a call keeps the load.
      dtype: what x and the experts' weights are cast to for computing; None: x's dtype.
      param_dtype: of the parameters.
      implementation: "pallas", "interpret", "xla", or None for "pallas" where the device can, else "xla".
      rngs: its stream `params` gives the initial weights.

    Attributes:
      router: nnx.Param [E, H].
      gate_up: nnx.Param [E + n_shared_experts, H, 2 * I].
      down: nnx.Param [E + n_shared_experts, I, H].
      bias: BalancingBias float32 [E], or None.
      shared: GatedMLP, or None.
      load: Load int32 [E + n_shared_experts].

    Raises:
      ValueError: names the argument, what was expected and what came.

    Source: DeepSeek-V3, arXiv:2412.19437, section 2.1.2.

    Example:
      >>> import jax.numpy as jnp, jaxmoe
      >>> from flax import nnx
      >>> from jaxmoe.nnx import MoE
      >>> config = jaxmoe.RoutingConfig(num_experts=4, top_k=2, n_shared_experts=1)
      >>> moe = MoE(config, 8, 6, rngs=nnx.Rngs(0))
      >>> y, routing = nnx.jit(lambda moe, x: moe(x))(moe, jnp.ones((2, 5, 8)))
      >>> y.shape, moe.load[...].tolist()[-1]
      ((2, 5, 8), 10)
      >>> moe.update_bias(rate=0.001)
      >>> sorted(set(abs(moe.bias[...]).tolist())) == [float(jnp.float32(0.001))]
      True
    """

    def __init__(
        self,
        config: RoutingConfig,
        hidden_size: int,
        intermediate_size: int,
        *,
        shared_intermediate_size: int | None = None,
        activation: str = "silu",
        router_init: Initializer = _router_init,
        gate_up_init: Initializer = _experts_init,
        down_init: Initializer = _experts_init,
        use_bias: bool = True,
        track_load: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        if not isinstance(config, RoutingConfig):
            raise ValueError(f"config: expected a RoutingConfig, got {type(config).__name__}")
        _check_bool("use_bias", use_bias)
        _check_bool("track_load", track_load)
        check_dtype("dtype", dtype)
        check_dtype("param_dtype", param_dtype)
        if param_dtype is None:
            raise ValueError("param_dtype: expected bfloat16, float16 or float32, got None")
        check_activation(activation)
        check_implementation(implementation)
        if config.shared_expert_replicas != 1:  # each would be trained on its own
            raise ValueError(f"config.shared_expert_replicas: expected 1, got {config.shared_expert_replicas}")
        _check_size("hidden_size", hidden_size)
        _check_size("intermediate_size", intermediate_size)
        if shared_intermediate_size is not None:
            _check_size("shared_intermediate_size", shared_intermediate_size)
            if config.n_shared_experts:
                fused = f"None next to n_shared_experts={config.n_shared_experts} in the stack"
                raise ValueError(f"shared_intermediate_size: expected {fused}, got {shared_intermediate_size}")
        self.config, self.track_load, self.dtype, self.implementation = config, track_load, dtype, implementation
        self.activation = activation
        ids = config.num_expert_ids
        draw = lambda init, *shape: nnx.Param(init(rngs.params(), shape, param_dtype))
        self.router = draw(router_init, config.num_experts, hidden_size)
        self.gate_up = draw(gate_up_init, ids, hidden_size, 2 * intermediate_size)
        self.down = draw(down_init, ids, intermediate_size, hidden_size)
        self.bias = BalancingBias(jnp.zeros(config.num_experts, jnp.float32)) if use_bias else None
        apart = {"activation": activation, "param_dtype": param_dtype, "rngs": rngs}
        width = shared_intermediate_size
        self.shared = None if width is None else GatedMLP(hidden_size, width, **apart)
        self.load = Load(jnp.zeros(ids, jnp.int32))

    @classmethod
    def from_params(
        cls,
        params: MoEParams,
        config: RoutingConfig,
        *,
        shared: SharedMLP | None = None,
        activation: str = "silu",
        track_load: bool = True,
        dtype: Any = None,
        implementation: str | None = None,
    ) -> MoE:
        """A module that holds `params`, as `load_hf_moe` returns them, without drawing weights first.

        Args:
          params: `MoEParams`, bfloat16, float16 or float32; NumPy arrays are copied.
          config: how to route; without shared experts where `shared` is given.
          shared: the shared experts, where they are kept apart; the same.
          activation: as for the constructor; that of `shared`, if there is one.
          track_load: as for the constructor, like dtype and implementation.
          dtype: the same.
          implementation: the same.

        Raises:
          ValueError: names the argument, what was expected and what came.
        """
        if not isinstance(params, MoEParams):
            raise ValueError(f"params: expected MoEParams, got {type(params).__name__}")
        check_array("params.gate_up", params.gate_up, ("num_expert_ids", "H", "2 * I"))
        hidden, inner = params.gate_up.shape[1], arguments.half("params.gate_up", params.gate_up.shape[2])
        width = None
        if shared is not None:
            if not isinstance(shared, SharedMLP):
                raise ValueError(f"shared: expected None or a SharedMLP, got {type(shared).__name__}")
            check_array("shared.down", shared.down, ("W", hidden))
            width = shared.down.shape[0]
            check_activation(activation)
            if shared.activation != activation:
                raise ValueError(f"shared.activation: expected activation={activation!r}, got {shared.activation!r}")

        def make() -> MoE:
            return cls(
                config,
                hidden,
                inner,
                shared_intermediate_size=width,
                activation=activation,
                use_bias=params.bias is not None,
                track_load=track_load,
                dtype=dtype,
                implementation=implementation,
                rngs=nnx.Rngs(0),
            )

        module = nnx.eval_shape(make)
        check_array("params.router", params.router, module.router.shape)
        check_array("params.gate_up", params.gate_up, module.gate_up.shape)
        check_array("params.down", params.down, module.down.shape)
        module.router = nnx.Param(_own(params.router))
        module.gate_up, module.down = nnx.Param(_own(params.gate_up)), nnx.Param(_own(params.down))
        if params.bias is not None:
            check_array("params.bias", params.bias, (config.num_experts,))
            module.bias = BalancingBias(_own(params.bias))
        if shared is not None and module.shared is not None:
            check_array("shared.gate_up", shared.gate_up, module.shared.gate_up.shape)
            check_array("shared.down", shared.down, module.shared.down.shape)
            module.shared.gate_up = nnx.Param(_own(shared.gate_up))
            module.shared.down = nnx.Param(_own(shared.down))
        module.load = Load(jnp.zeros(config.num_expert_ids, jnp.int32))
        return module

    def params(self, dtype: Any = None) -> MoEParams:
        """The parameters of the routed and fused experts as `jaxmoe.moe` takes them.

        Args:
          dtype: what gate_up and down are cast to; None: as they are.
        """
        return MoEParams(
            router=self.router[...],
            bias=None if self.bias is None else self.bias[...],
            gate_up=jnp.asarray(self.gate_up[...], dtype),
            down=jnp.asarray(self.down[...], dtype),
        )

    def _rows(self, x: Any) -> jax.Array:
        """x [..., H] as [T, H], in `dtype` or its own."""
        hidden = self.router.shape[1]
        is_array = isinstance(x, (jax.Array, np.ndarray, nnx.Variable))
        if not is_array or x.ndim < 1 or x.shape[-1] != hidden:
            got = f"{x.dtype}{list(x.shape)}" if is_array else type(x).__name__
            raise ValueError(f"x: expected an array [..., {hidden}], got {got}")
        if x.dtype not in (*map(jnp.dtype, arguments.FLOATS), jnp.dtype(jnp.float64)):  # what a cast would hide
            raise ValueError(f"x: expected bfloat16, float16, float32 or float64, got {x.dtype}")
        return jnp.asarray(x, self.dtype).reshape(-1, hidden)

    def logits(self, x: jax.Array) -> jax.Array:
        """The router's logits, float32 [T, E] for x [..., H]: what the auxiliary losses take."""
        rows = self._rows(x)
        return routing.router_logits(rows, self.router[...], implementation=self.implementation)

    def __call__(
        self,
        x: jax.Array,
        *,
        num_valid_tokens: int | jax.Array | None = None,
        expert_map: jax.Array | None = None,
        max_rows: int | None = None,
    ) -> tuple[jax.Array, Routing]:
        """Applies the layer.

        Args:
          x: [..., H], bfloat16, float16, float32 or, where `dtype` is given, float64; T is the product of the leading
            axes.
          num_valid_tokens: tokens at or past this index come out as zeros, and a NaN in their x reaches no gradient but
            the router's, as `jaxmoe.moe` says.
          expert_map: under shard_map, where the module has one device's part of the experts: as for `jaxmoe.moe`.
            Split the inner width of shared experts that are kept apart over the devices, or each adds all of them.
          max_rows: as for `jaxmoe.moe`.

        Returns:
          (y of x's shape, in `dtype` or x's, Routing of the T tokens).

        Raises:
          ValueError: names the argument, what was expected and what came.
        """
        rows = self._rows(x)
        y, chosen = layer.moe(
            rows,
            self.params(rows.dtype),
            self.config,
            num_valid_tokens=num_valid_tokens,
            expert_map=expert_map,
            max_rows=max_rows,
            activation=self.activation,
            implementation=self.implementation,
        )
        if not self.config.scale_weights:
            y = (y * self.config.routed_scaling_factor).astype(rows.dtype)
        if self.shared is not None:
            if num_valid_tokens is None:
                y = y + self.shared(rows)
            else:  # the rows that go in, too: 0 * NaN would reach the gradients of the weights
                valid = chosen.experts[:, :1] >= 0
                y = y + jnp.where(valid, self.shared(jnp.where(valid, rows, 0)), 0)
        if self.track_load:
            here, kept = (jax.typeof(load).manual_axis_type.varying for load in (chosen.load, self.load[...]))
            if here - kept:
                raise ValueError(
                    f"track_load: expected False under shard_map over {sorted(here - kept)}, where the load is that of "
                    'one device, got True; sum the load that is returned: jax.lax.psum(routing.load, "axis")'
                )
            self.load[...] = chosen.load
        return y.reshape(x.shape), chosen

    def update_bias(self, load: jax.Array | None = None, *, rate: float | jax.Array) -> None:
        """Moves the bias one step of `jaxmoe.update_bias`.

        Args:
          load: int32 [at least E], summed over everything that the step trained on; None: that of the last call.
          rate: the size of a step; DeepSeek-V3 trained with 0.001.

        Raises:
          ValueError: there is no bias, or no load was kept, or as `jaxmoe.update_bias`.
        """
        if self.bias is None:
            raise ValueError("update_bias: expected a module with use_bias=True, got one without a bias")
        if load is None and not self.track_load:
            raise ValueError("load: expected an array where track_load=False keeps none, got None")
        self.bias[...] = routing.update_bias(self.bias[...], self.load[...] if load is None else load, rate=rate)
