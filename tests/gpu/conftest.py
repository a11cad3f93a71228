"""Every test here runs on the CPU, with the quick tests, and on a GPU where there is one (`make test-gpu`)."""

import pytest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param
