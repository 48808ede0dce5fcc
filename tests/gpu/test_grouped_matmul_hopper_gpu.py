"""tests/kernels_pallas/test_grouped_matmul_hopper.py where there is a GPU to run the kernel on."""

from tests.kernels_pallas.test_grouped_matmul_hopper import (  # noqa: F401
    test_on_hopper,
    test_on_hopper_many_steps,
)
