"""Every test here runs on the CPU, with the quick tests, and on a GPU where there is one (`make test-gpu`)."""

from collections.abc import Iterator

import pytest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _float32_convolutions() -> Iterator[None]:
    """torch rounds the inputs of a GPU's float32 convolutions to ten bits (TF32) unless told otherwise."""
    import torch

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before
