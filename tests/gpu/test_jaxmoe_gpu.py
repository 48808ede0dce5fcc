"""Every test of the JAX API, on the GPU's kernels: the same table of cases, the same checks."""

from tests.jaxmoe.test_dispatch import *  # noqa: F403
from tests.jaxmoe.test_moe import test_moe_against_the_formula, test_moe_gradients, test_moe_of_few_tokens  # noqa: F401
from tests.jaxmoe.test_plan_dispatch import *  # noqa: F403
from tests.jaxmoe.test_route import *  # noqa: F403
from tests.jaxmoe.test_router_logits import *  # noqa: F403
