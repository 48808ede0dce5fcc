"""tests/jaxmoe/test_router_logits.py on the GPU's kernels."""

from tests.jaxmoe.test_router_logits import *  # noqa: F403
