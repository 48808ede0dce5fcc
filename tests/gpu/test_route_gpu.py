"""tests/jaxmoe/test_route.py on the GPU's kernels."""

from tests.jaxmoe.test_route import *  # noqa: F403
