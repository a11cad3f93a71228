"""Interleaved timing, peak memory and the machine's matrix-product peak."""

import ctypes
import gc
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

Job = Callable[[], Any]


def interleaved_medians(
    jobs: dict[str, Job], repetitions: int, title: str, warm_up: bool = True
) -> dict[str, float]:
    """Median seconds of each job. All jobs take turns, so that a change in the machine's load affects all alike."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values() if warm_up else ():
        job()
    for _ in tqdm(range(repetitions), desc=title, unit="round", leave=False):
        for name, job in jobs.items():
            synchronize()
            begun = time.perf_counter()
            job()
            synchronize()
            times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(job: Job, device: torch.device | None = None) -> int:
    """Peak memory of a job above what is in use before it: the allocator's peak, or resident size on a CPU.

    device: where the job runs; None is a GPU if there is one. Linux only on a CPU, where the kernel's high-water mark
    is reset first.
    """
    gc.collect()
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        job()
        return torch.cuda.max_memory_allocated(device) - before
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    job()
    return max(0, _status("VmHWM") - before)


def process_peak_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return process_peak_bytes()


def matmul_peak(
    dtype: torch.dtype, device: torch.device, size: int | None = None, seconds: float = 2.0
) -> float:
    """Floating-point operations per second of a large square matrix product: the best of many, after a warm-up.

    size: None is 2048 on a CPU and 8192 on a GPU, where a product of 2048 takes no longer than launching it and waiting
    for it; there ten products are timed at once.
    """
    on_gpu = device.type == "cuda"
    size = size or (8192 if on_gpu else 2048)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    together = 10 if on_gpu else 1
    # The first product loads the library and chooses an algorithm, and clocks rise while it runs.
    torch.mm(a, b)
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        synchronize()
        begun = time.perf_counter()
        for _ in range(together):
            torch.mm(a, b)
        synchronize()
        best = min(best, (time.perf_counter() - begun) / together)
    return 2 * size**3 / best


def machine() -> dict[str, Any]:
    """Description of the machine, beside the numbers measured on it."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "date": time.strftime("%Y-%m-%d"),
    }
