"""tests/jaxmoe/test_grouped_matmul.py on the GPU's kernels."""

from tests.jaxmoe.test_grouped_matmul import *  # noqa: F403
