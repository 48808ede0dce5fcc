"""The tests of tests/jaxmoe/test_moe.py that take an implementation, on the GPU's kernels."""

from tests.jaxmoe.test_moe import test_moe_against_the_formula, test_moe_gradients  # noqa: F401
