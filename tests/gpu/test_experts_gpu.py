"""tests/jaxmoe/test_experts.py on the GPU's kernels."""

from tests.jaxmoe.test_experts import *  # noqa: F403
