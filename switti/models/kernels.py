"""Whose kernels run: those of the device that holds the tensors, or, for a plan, those that a GPU would use."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_as_on_gpu = False


def uses_cpu_kernels(x: Tensor) -> bool:
    """Whether what is written for CPUs alone is to be used for this tensor."""
    return x.device.type == "cpu" and not _as_on_gpu


@contextmanager
def kernels_of_gpus() -> Iterator[None]:
    """Within it tensors on a CPU are computed as a GPU would, for plans: slower, and with other roundings."""
    global _as_on_gpu
    before, _as_on_gpu = _as_on_gpu, True
    try:
        yield
    finally:
        _as_on_gpu = before
