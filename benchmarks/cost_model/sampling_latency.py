"""Sampling latency by a roofline over kernels: the sampler runs on a pretended GPU, with tensors without data.

An operation takes max(bytes / bandwidth, operations / peak), each at the share of the data sheet's figure that large
kernels reach, and a gap until the next one begins. Captured in a CUDA graph, a scale takes the sum of that. In eager
mode the host launches kernel after kernel, ahead of the device: a scale takes as long as the host needs to launch it or
as the device needs to run it, whichever is longer. Sampling is counted in bfloat16 weights, the decoder too; text
encoders are not counted.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.cost_model.hardware import Accelerator
from benchmarks.cost_model.kernel_trace import (
    FusedAttention,
    Kernel,
    Kernels,
    KernelTrace,
    deepen,
    launches,
)
from switti.models.config import GeneratorConfig
from switti.sampling.config import SamplingConfig
from switti.sampling.guidance import GuidanceSchedule
from switti.sampling.noise import ImageNoise
from switti.sampling.sampler import ScaleTrace, sample_latent
from switti.scales import Pyramid
from switti.text.base import TextEmbedding
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import RQVAE
from switti.weights.fill import build_empty

CAPTION, DECODE = "caption", "decode"


@dataclass(frozen=True)
class Assumptions:
    """Shares of the data sheet's figures that kernels reach, and what launching costs in seconds.

    matmul, attention: of the operations per second, in large products and in fused attention with heads 64 wide.
    bandwidth: of the memory's. host: time of the CPU for one eager kernel, through Python and the dispatcher. gap: time
    between two kernels on the device.
    """

    matmul: float = 0.7
    attention: float = 0.5
    bandwidth: float = 0.8
    host: float = 6e-6
    gap: float = 1.5e-6


@dataclass(frozen=True)
class Latency:
    """Kernels of one part of sampling, and its seconds for the whole batch."""

    kernels: int
    device: float
    eager: float
    captured: float


def kernel_seconds(kernel: Kernel, gpu: Accelerator, assumed: Assumptions) -> float:
    """Of one operation on the device, without launching it."""
    peak = gpu.bfloat16 if kernel.dtype.itemsize == 2 else gpu.float32
    reached = assumed.attention if kernel.attention else assumed.matmul
    moving = kernel.bytes / (gpu.bandwidth * assumed.bandwidth)
    return max(moving, kernel.operations / (peak * reached))


def latency(kernels: Kernels, gpu: Accelerator, assumed: Assumptions) -> Latency:
    count = launches(kernels)
    device = sum(number * kernel_seconds(kernel, gpu, assumed) for kernel, number in kernels.items())
    captured = device + count * assumed.gap
    return Latency(count, device, max(captured, count * assumed.host), captured)


@dataclass(frozen=True)
class SamplingLatency:
    """Of a batch: the caption's keys and values, each scale, decoding. rows: of the transformer's batch, by scale."""

    images: int
    caption: Latency
    scales: list[Latency]
    rows: list[int]
    decode: Latency

    @property
    def parts(self) -> list[Latency]:
        return [self.caption, *self.scales, self.decode]

    @property
    def eager(self) -> float:
        """Seconds per image from the captions' embeddings to pixels."""
        return sum(part.eager for part in self.parts) / self.images

    @property
    def captured(self) -> float:
        return sum(part.captured for part in self.parts) / self.images

    @property
    def step(self) -> float:
        """Mean eager seconds of a scale, per image."""
        return sum(part.eager for part in self.scales) / len(self.scales) / self.images


def sampling_latency(
    traced: dict[str, Kernels], images: int, rows: list[int], gpu: Accelerator, assumed: Assumptions
) -> SamplingLatency:
    def of(section: str) -> Latency:
        return latency(traced.get(section, Counter()), gpu, assumed)

    scales = [of(str(k)) for k in range(len(rows))]
    return SamplingLatency(images, of(CAPTION), scales, rows, of(DECODE))


def rows_by_scale(model: GeneratorConfig, sampling: SamplingConfig, images: int) -> list[int]:
    """Rows of the transformer's batch at each scale: twice the images where unconditional ones are computed."""
    pyramid = Pyramid(tuple(model.scales))
    schedule, causal = GuidanceSchedule.of(sampling, pyramid), model.visibility == "causal"
    return [images * (1 + schedule.needs_unconditional(k, causal)) for k in range(pyramid.count)]


def trace_sampling(
    model: GeneratorConfig, tokenizer: RQVAEConfig, sampling: SamplingConfig, images: int, text_tokens: int
) -> dict[str, Kernels]:
    """Kernels of CAPTION, of each scale ("0", "1", …) and of DECODE for a batch. All blocks are alike: one and two of
    them are traced."""
    if model.depth <= 2:
        return _trace(model, tokenizer, sampling, images, text_tokens)
    few, more = (
        _trace(replace(model, depth=depth), tokenizer, sampling, images, text_tokens) for depth in (1, 2)
    )
    return {section: deepen(few[section], more[section], model.depth - 1) for section in few}


@contextmanager
def _pretended_gpu() -> Iterator[None]:
    # Autograd looks for devices at its first backward pass, and must not find FakeTensorMode's pretended GPU.
    torch.zeros((), requires_grad=True).backward()
    with FakeTensorMode(allow_non_fake_inputs=True), FusedAttention(), torch.no_grad():
        yield


def _on_gpu(module: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Empty parameters and buffers there."""

    def empty(tensor: torch.Tensor) -> torch.Tensor:
        kind = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
        return torch.empty(tensor.shape, dtype=kind, device="cuda")

    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(empty(parameter), requires_grad=False))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, empty(buffer))


def _trace(
    model: GeneratorConfig, tokenizer: RQVAEConfig, sampling: SamplingConfig, images: int, text_tokens: int
) -> dict[str, Kernels]:
    generator = build_empty(model, torch.bfloat16).eval()
    with torch.device("meta"):
        rqvae, decoder = (RQVAE(tokenizer).eval() for _ in range(2))

    def captions(count: int) -> TextEmbedding:
        return TextEmbedding(
            torch.empty(count, text_tokens, model.text_width, device="cuda"),
            torch.empty(count, text_tokens, dtype=torch.bool, device="cuda"),
            torch.empty(count, model.pooled_width, device="cuda"),
        )

    caption, whole = KernelTrace(), KernelTrace()

    def next_scale(scale: ScaleTrace) -> None:
        last = scale.scale + 1 == generator.pyramid.count
        whole.section = DECODE if last else str(scale.scale + 1)

    with _pretended_gpu():
        _on_gpu(generator)
        _on_gpu(rqvae)
        _on_gpu(decoder, torch.bfloat16)
        text, null = captions(images), captions(1)
        guided = GuidanceSchedule.of(sampling, generator.pyramid).last_guided >= 0
        both = captions(images * (1 + guided))
        caption.section, whole.section = CAPTION, "0"
        with caption:
            generator.prepare(both.tokens_BTC, both.mask_BT, both.pooled_BP)
        noise = ImageNoise(list(range(images)), torch.device("cuda"))
        with whole:
            latent = sample_latent(generator, rqvae, text, null, sampling, noise, on_scale_end=next_scale)
            decoder.decode(latent.to(torch.bfloat16))
    # The sampler prepares the captions before its first scale.
    whole.sections["0"] -= caption.sections[CAPTION]
    return caption.sections | whole.sections
