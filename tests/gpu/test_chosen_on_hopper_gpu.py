"""tests/kernels_pallas/test_chosen_on_hopper.py where there is a GPU to run the kernels on."""

from tests.kernels_pallas.test_chosen_on_hopper import (  # noqa: F401
    test_layer_on_hopper,
    test_products_of_blocks_on_hopper,
)
