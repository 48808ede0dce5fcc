"""tests/jaxmoe/test_dispatch.py on the GPU's kernels."""

from tests.jaxmoe.test_dispatch import *  # noqa: F403
