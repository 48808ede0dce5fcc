"""The tests of tests/jaxmoe/test_fused_experts.py on the GPU's kernels."""

from tests.jaxmoe.test_fused_experts import *  # noqa: F403
