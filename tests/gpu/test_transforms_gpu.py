"""tests/jaxmoe/test_transforms.py on the GPU's kernels."""

from tests.jaxmoe.test_transforms import *  # noqa: F403
