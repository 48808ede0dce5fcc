"""What a JAX function launches on a GPU, read from its lowering: the JAX half of `python -m jaxmoe audit`.

The command is `bridge.audit`. Nothing here runs or needs a GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.mlir import ir

import jaxmoe
from jaxmoe.config import RoutingConfig
from kernels_pallas.targets import TARGETS, custom_call_target

TARGET = "sm_90"  # how many kernels there are does not depend on it
CAST = "stablehlo.convert"
COPIES = tuple(f"stablehlo.{name}" for name in ("transpose", "concatenate", "slice", "pad", "broadcast_in_dim"))

# What holds a program together and launches nothing: a reshape keeps every byte where it is.
_STRUCTURE = {"builtin.module", "func.func", "func.return"}
_STRUCTURE |= {f"stablehlo.{name}" for name in ("case", "constant", "reshape", "return")}


def lowered(fn: Callable[..., Any], *args: Any) -> tuple[Counter[str], Counter[str]]:
    """(Pallas kernels, StableHLO operations besides them) of `jax.jit(fn)(*args)` on a GPU, by name.

    Args:
      fn: of arrays alone.
      args: arrays or shapes (ShapeDtypeStruct).
    """
    target = TARGETS[TARGET]
    device = jax.sharding.AbstractDevice(device_kind=target.device_kind, platform=target.platform, num_cores=None)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        program = jax.jit(lambda *args: fn(*args)).trace(*args).lower(lowering_platforms=(target.platform,))
    module = program.compiler_ir()
    functions = {ir.StringAttr(op.attributes["sym_name"]).value: op for op in module.body.operations}
    kernels, others = Counter[str](), Counter[str]()

    def visit(op: Any) -> Any:
        if op.name == "func.call":  # jax emits a function once, however often it is called
            functions[ir.FlatSymbolRefAttr(op.attributes["callee"]).value].operation.walk(visit)
        elif op.name == "stablehlo.custom_call":
            name = ir.StringAttr(op.attributes["call_target_name"]).value
            if name == custom_call_target():
                kernels[ir.StringAttr(ir.DictAttr(op.attributes["mhlo.backend_config"])["name"]).value] += 1
            else:
                others[name] += 1
        elif op.name not in _STRUCTURE:
            others[op.name] += 1
        return ir.WalkResult.ADVANCE

    functions["main"].operation.walk(visit)
    return kernels, others


def layer(config: RoutingConfig) -> Callable[..., jax.Array]:
    """The layer that is audited, of (x, router, bias, gate_up, down): `jaxmoe.moe`, but for the load.

    gate_up and down lie as Hugging Face transformers has them.
    """

    def forward(x: jax.Array, router: jax.Array, bias: jax.Array, gate_up: jax.Array, down: jax.Array) -> jax.Array:
        logits = jaxmoe.router_logits(x, router)
        routing = jaxmoe.route(logits, bias, config=config, return_load=False)
        plan = jaxmoe.plan_dispatch(routing.experts, config.num_expert_ids)
        rows = jaxmoe.dispatch(x, plan)
        rows = jaxmoe.experts(rows, gate_up, down, plan.group_sizes, transposed=True)
        return jaxmoe.combine(rows, plan, routing.weights)

    return forward
