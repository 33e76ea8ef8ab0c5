import functools
import os

import pytest

from cuda_on_cpu import ORDERS, open_cuda_on_cpu
from rtfmri.backends import Backend, gpu_problem, open_backend

CUDA_BACKENDS = [
    *(f"cuda-on-cpu/{order}" for order in ORDERS),
    pytest.param("gpu", marks=pytest.mark.gpu),
]


@functools.cache
def _open(name: str) -> Backend:
    if name.startswith("cuda-on-cpu/"):
        return open_cuda_on_cpu(name.partition("/")[2])
    return open_backend("cuda" if name == "gpu" else "cpu")


@pytest.fixture(params=["cpu", *CUDA_BACKENDS])
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each implementation of the operations, among them the CUDA sources run on the CPU."""
    return _open(request.param)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (problem := gpu_problem()):
        if os.environ.get("RTFMRI_REQUIRE_GPU") == "1":
            pytest.fail(f"RTFMRI_REQUIRE_GPU=1, but {problem}", pytrace=False)
        pytest.skip(problem)
