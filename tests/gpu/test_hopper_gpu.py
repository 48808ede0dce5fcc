"""tests/kernels_pallas/test_hopper.py where there is a GPU."""

from tests.kernels_pallas.test_hopper import test_multiprocessors_of_this_machine  # noqa: F401
