"""Sampling at 512 px with half of the late scales' tokens pruned, against the same without pruning.

Shape suffixes: P tokens of one scale, D width.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from benchmarks.cases import TEXT_TOKENS, SamplingCase, Size, build, late_stop
from benchmarks.flops import pruned_sampling_flops
from benchmarks.measure import Job, synchronize
from benchmarks.report import Results
from benchmarks.suite import default_device
from switti.models.attention import Rotation
from switti.models.config import GeneratorConfig
from switti.models.pruning import TokenPruning
from switti.models.transformer import ScaleTransformer
from switti.sampling.config import PruningConfig, SamplingConfig
from switti.sampling.guidance import GuidanceSchedule
from switti.scales import PYRAMIDS, Pyramid
from switti.weights.fill import build_empty, random_weights

RESOLUTION, KEEP = 512, 0.5
COUNT = len(PYRAMIDS[RESOLUTION])
LAST = [COUNT - 2, COUNT - 1]


def settings_of(first_block: int) -> dict[str, SamplingConfig]:
    """{"full", "stopped"}: guidance everywhere or stopped two scales early. Each without pruning and with the last two
    scales pruned, and with guidance everywhere with the last three pruned as well."""
    everywhere = SamplingConfig(gumbel=False)
    kinds = {"full": everywhere, "stopped": late_stop(everywhere, RESOLUTION)}
    last_two = PruningConfig(LAST, [KEEP], first_block)
    kinds |= {f"{kind}.last_two": replace(config, pruning=last_two) for kind, config in kinds.items()}
    last_three = PruningConfig([COUNT - 3, *LAST], [KEEP], first_block)
    return kinds | {"full.last_three": replace(everywhere, pruning=last_three)}


def flops_of(config: GeneratorConfig, sampling: SamplingConfig, images: int) -> int:
    """Of the matrix products of one call of a non-causal model."""
    pyramid = Pyramid(tuple(config.scales))
    rows = [images * (1 + (strength != 0.0)) for strength in GuidanceSchedule.of(sampling, pyramid).strengths]
    counts = sampling.pruning.counts(pyramid.sizes)
    return pruned_sampling_flops(config, rows, TEXT_TOKENS, counts, sampling.pruning.from_block)


def seconds_of(job: Job, device: torch.device) -> float:
    """Of one thread on a CPU the processor's seconds, which leave out the turns of other programs; else wall-clock."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    synchronize()
    begun = clock()
    job()
    synchronize()
    return clock() - begun


def medians_in_turn(jobs: dict[str, Job], rounds: int, device: torch.device) -> dict[str, float]:
    """Median seconds of each job after the last one has warmed up."""
    list(jobs.values())[-1]()
    times = [{name: seconds_of(job, device) for name, job in jobs.items()} for _ in range(rounds)]
    return {name: statistics.median(row[name] for row in times) for name in jobs}


def product_peak(device: torch.device, size: int = 2048, count: int = 8) -> float:
    """Operations per second of a large bfloat16 product by the same clock: the best of several."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / min(seconds_of(partial(torch.mm, a, b), device) for _ in range(count))


@dataclass
class PruningBenchmark:
    """Sizes and repetitions of a model that samples entire images, and of a single block of the 2.5 B model.

    A tenth of the blocks is not pruned, as in FastVAR.
    """

    size: Size = field(default_factory=lambda: Size(depth=8))
    batch: int = 2
    block: Size = field(default_factory=lambda: Size(width=1920, heads=30, depth=1))
    repetitions: int = 2
    device: torch.device = field(default_factory=default_device)

    @classmethod
    def quick(cls) -> "PruningBenchmark":
        small = Size(width=64, heads=2, depth=1)
        return cls(replace(small, depth=2), 1, small, 1)

    def measure(self, results: Results) -> None:
        """Seconds, times faster, and the share of the peak of bfloat16 products."""
        results.raw["matmul_peak.bfloat16"] = peak = product_peak(self.device)
        self._images(peak, results)
        self._block(results)

    def _images(self, peak: float, results: Results) -> None:
        config, name = self.size.config(RESOLUTION, "non_causal"), "prune.512"
        model = build(config, self.device).eval().to(torch.bfloat16)
        case, seeds = SamplingCase.of(model, self.batch), list(range(self.batch))
        kinds = settings_of(max(1, config.depth // 10))
        jobs: dict[str, Job] = {kind: partial(case.run, sampling, seeds) for kind, sampling in kinds.items()}
        seconds = medians_in_turn(jobs, self.repetitions, self.device)
        flops = {kind: flops_of(config, sampling, self.batch) for kind, sampling in kinds.items()}
        for kind in kinds:
            results.raw[f"{name}.{kind}.seconds"] = seconds[kind]
            results.raw[f"{name}.{kind}.matmul_share"] = flops[kind] / seconds[kind] / peak
            plain = kind.split(".")[0]
            if kind != plain:
                results.ratios[f"{name}.{kind}.faster"] = seconds[plain] / seconds[kind]
                results.ratios[f"{name}.{kind}.fewer_operations"] = flops[plain] / flops[kind]

    @torch.no_grad()
    def _block(self, results: Results) -> None:
        """One block, one row, at each of the last scales."""
        config = self.block.config(RESOLUTION, "non_causal")
        model = random_weights(build_empty(config, torch.bfloat16), 0, self.device).eval()
        jobs = dict(_block_jobs(model))
        seconds = medians_in_turn(jobs, self.repetitions + 1, self.device)
        for scale in LAST:
            name = f"prune.512.block.scale_{scale}"
            results.raw[f"{name}.seconds"] = seconds[f"{scale}"]
            results.raw[f"{name}.pruned.seconds"] = seconds[f"{scale}.pruned"]
            results.ratios[f"{name}.faster"] = seconds[f"{scale}"] / seconds[f"{scale}.pruned"]


def _block_jobs(model: ScaleTransformer) -> Iterator[tuple[str, Job]]:
    case = SamplingCase.of(model, 1)
    condition = model.prepare(case.text.tokens_BTC, case.text.mask_BT, case.text.pooled_BP)
    block, given, sizes = model.typed_blocks[0], condition.blocks[0], model.pyramid.sizes
    pruning = TokenPruning(PruningConfig(LAST, [KEEP]).counts(sizes), 0, 1)

    def noise(scale: int) -> tuple[torch.Tensor, Rotation]:
        shape = (1, sizes[scale], model.config.width)
        x_1PD = torch.randn(shape, device=model.head.weight.device).to(model.head.weight.dtype)
        return x_1PD, Rotation(model.cosine_LK, model.sine_LK).rows(*model.pyramid.spans[scale])

    def pruned(scale: int, x_1PD: torch.Tensor, rotation: Rotation) -> None:
        pruning.begin_scale(scale, 1)
        pruning.advance(0, block, x_1PD, given, condition.mask_B11T, rotation, None)

    # In full, and what it adds is kept.
    pruned(LAST[0] - 1, *noise(LAST[0] - 1))
    for scale in LAST:
        x_1PD, rotation = noise(scale)
        spans = ((0, sizes[scale]),)
        yield f"{scale}", partial(block.advance, x_1PD, given, condition.mask_B11T, rotation, spans)
        yield f"{scale}.pruned", partial(pruned, scale, x_1PD, rotation)
