"""tests/kernels_pallas/test_grouped_matmul_grad_hopper.py where there is a GPU to run the kernel on."""

from tests.kernels_pallas.test_grouped_matmul_grad_hopper import (  # noqa: F401
    test_gradients_on_hopper,
    test_on_hopper,
    test_on_hopper_blocks,
    test_on_hopper_many_steps,
)
