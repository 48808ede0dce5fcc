"""The Pallas kernels launched natively: on torch's current stream, without JAX's runtime.

A kernel is lowered by jax, compiled by triton and kept on disk (`build`, `cache`), then launched through the driver
(`driver`); `routing`, `dispatch` and `experts` know each kernel's arguments and grid.
"""
