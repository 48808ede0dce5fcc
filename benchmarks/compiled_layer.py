"""What XLA makes of the layer for an H100, on a machine that has none: launches, and the memory of its own plan.

    python -m benchmarks.compiled_layer [--tokens 4096] [--forward]

It needs jax's CUDA plugin (`pip install "jax[cuda12]"`), which compiles for a device that is described to it. XLA then
tunes nothing, so its own matrix products are not those of a run; the kernels, what runs between them, whether all of it
is one command buffer (a CUDA graph), and the memory are.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

DEVICE = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
MULTIPROCESSORS = 132  # its core_count


def compile_layer(tokens: int, *, forward: bool) -> tuple[str, Any]:
    """(XLA's list of launches, its memory statistics) of the layer, by default with all its gradients."""
    folder = tempfile.TemporaryDirectory()
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder.name}"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # there is no driver to ask
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding, use_abstract_mesh

    import jaxmoe
    from benchmarks.layer_shapes import CONFIG, EXPERTS, INNER, WIDTH
    from kernels_pallas import hopper

    options = {"topology_name": "", "platform": "cuda", "target_config": DEVICE, "topology": "1x1x1"}
    device: Any = topologies.get_topology_desc(**options).devices[0]
    make = lambda dtype, *sides: jax.ShapeDtypeStruct(sides, dtype, sharding=SingleDeviceSharding(device))
    bf16 = jnp.bfloat16
    x, bias = make(bf16, tokens, WIDTH), make(jnp.float32, EXPERTS)
    weights = make(bf16, EXPERTS, WIDTH), make(bf16, EXPERTS, WIDTH, 2 * INNER), make(bf16, EXPERTS, INNER, WIDTH)

    def layer(x: jax.Array, weights: tuple[jax.Array, ...], bias: jax.Array) -> jax.Array:
        router, gate_up, down = weights
        params = jaxmoe.MoEParams(router=router, bias=bias, gate_up=gate_up, down=down)
        return jaxmoe.moe(x, params, CONFIG, implementation="pallas")[0]

    loss = lambda *args: jnp.sum(layer(*args).astype(jnp.float32) ** 2)
    function = layer if forward else jax.grad(loss, argnums=(0, 1))
    new = jax.__version_info__ >= hopper.OLDEST_JAX
    kind = AbstractDevice(device_kind=device.device_kind, platform="cuda", num_cores=None)
    # Which kernels take products and weights' gradients would follow from this machine's GPU.
    described = mock.patch.object(hopper, "multiprocessors", return_value=MULTIPROCESSORS if new else 0)
    with folder, described, use_abstract_mesh(AbstractMesh((), (), abstract_device=kind)):
        compiled = jax.jit(function).trace(x, weights, bias).lower(lowering_platforms=("cuda",)).compile()
        (launches,) = Path(folder.name).glob("*thunk_sequence_after_thunk_passes.txt")
        return launches.read_text(), compiled.memory_analysis()


def main() -> None:
    """Prints the launches and the memory."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--forward", action="store_true", help="without the gradients")
    arguments = parser.parse_args()
    launches, memory = compile_layer(arguments.tokens, forward=arguments.forward)
    for line in launches.splitlines():
        found = re.match(r"\s*\d+: k(\w+)[^\]]*\]\s*(\w*)", line)
        if found:
            print(f"  {found[2]}" if found[2] else found[1])
    print(f"results {memory.output_size_in_bytes / 1e9:.2f} GB, besides {memory.temp_size_in_bytes / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
