"""tests/jaxmoe/test_plan_dispatch.py on the GPU's kernels."""

from tests.jaxmoe.test_plan_dispatch import *  # noqa: F403
