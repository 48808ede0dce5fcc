"""The tests of tests/jaxmoe/test_moe.py that take an implementation, on the GPU's kernels."""

from tests.jaxmoe.test_moe import (  # noqa: F401
    test_groups_of_whole_blocks,
    test_moe_against_the_formula,
    test_moe_gradients,
)
