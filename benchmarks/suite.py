"""Benchmark suite of `experiments.bench`: one method per part, each adding to the results by dotted names.

Names: train.<resolution>.<variant> and so on under ratios (plain seconds / ours), seconds, bytes and operations per
second under raw.
"""

import statistics
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from benchmarks.cases import (
    TEXT_TOKENS,
    VARIANTS,
    SamplingCase,
    Size,
    build,
    late_stop,
    training_pair,
    with_visibility,
)
from benchmarks.flops import head_flops, sampling_flops, training_flops
from benchmarks.measure import Job, interleaved_medians, matmul_peak, peak_bytes, process_peak_bytes
from benchmarks.reference_model import DenseTransformer, same_weights
from benchmarks.report import Results
from switti.sampling.config import SamplingConfig
from switti.sampling.guidance import GuidanceSchedule
from switti.scales import PYRAMIDS
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import RQVAE
from switti.weights.fill import build_empty, random_weights


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Suite:
    """Sizes and repetitions. `sizes` and `batches` by resolution: the dense formulation at 1024 px needs a shallow
    model to finish in seconds; the ratio hardly depends on depth, since all blocks cost the same."""

    sizes: dict[int, Size] = field(default_factory=lambda: {512: Size(depth=8), 1024: Size(depth=2)})
    batches: dict[int, int] = field(default_factory=lambda: {512: 2, 1024: 1})
    sampling_size: Size = field(default_factory=lambda: Size(depth=8))
    sampling_batch: int = 4
    full_size: Size = field(default_factory=lambda: Size(width=1920, heads=30, depth=30))
    repetitions: int = 5
    full_repetitions: int = 1
    device: torch.device = field(default_factory=default_device)

    @classmethod
    def quick(cls) -> "Suite":
        small = Size(width=64, heads=2, depth=1)
        return cls(
            {512: small, 1024: small}, {512: 1, 1024: 1}, small, 1, small, repetitions=1, full_repetitions=1
        )

    def measure_train(self, results: Results) -> None:
        """Training step, dense against ours, and the share of the machine's matrix-product peak.

        matmul_share: time that the step's products would take at the peaks of their types (the head's in float32, the
        others in bfloat16), over the time that the step takes. matmul_share_bfloat16: the same as if all of them ran
        at the peak of bfloat16.
        """
        peak, exact_peak = (matmul_peak(dtype, self.device) for dtype in (torch.bfloat16, torch.float32))
        results.raw |= {"matmul_peak.bfloat16": peak, "matmul_peak.float32": exact_peak}
        for resolution, size in self.sizes.items():
            for variant in VARIANTS:
                name, batch = f"train.{resolution}.{variant}", self.batches[resolution]
                jobs = training_pair(size, resolution, variant, batch, self.device)
                seconds = interleaved_medians(jobs, self.repetitions, name)
                results.ratios[name] = seconds["dense"] / seconds["ours"]
                results.raw[f"{name}.seconds"] = seconds["ours"]
                results.raw[f"{name}.dense.seconds"] = seconds["dense"]
                for formulation, job in jobs.items():
                    results.raw[f"{name}.{formulation}.peak_bytes"] = peak_bytes(job, self.device)
                config = size.config(resolution, variant)
                flops, head = training_flops(config, batch, TEXT_TOKENS), 3 * head_flops(config, batch)
                ideal = (flops - head) / peak + head / exact_peak
                results.ratios[f"{name}.matmul_share"] = ideal / seconds["ours"]
                results.ratios[f"{name}.matmul_share_bfloat16"] = flops / peak / seconds["ours"]
        if 512 in self.sizes:
            results.ratios["train.512.matmul_share"] = results.ratios["train.512.non_causal.matmul_share"]

    def measure_sample(self, results: Results) -> None:
        """Sampling at 512 px, per scale and in total, variants × guidance, ours and plainly; memory at 1024 px."""
        totals = {variant: self._sample_variant(variant, results) for variant in VARIANTS}
        for kind in ("full", "stopped"):
            ratio = totals["causal"]["full"] / totals["non_causal"][kind]
            results.ratios[f"sample.512.causal_full_over_non_causal_{kind}"] = ratio
        self._sampling_memory(results)

    def _sample_variant(self, variant: str, results: Results) -> dict[str, float]:
        """Seconds of one variant: guidance everywhere ("full"), stopped two scales early, and both plainly."""
        model = build(self.sampling_size.config(512, variant), self.device).eval().to(torch.bfloat16)
        case, everywhere = SamplingCase.of(model, self.sampling_batch), SamplingConfig(gumbel=False)
        seconds = self._sample_both_ways(f"sample.512.{variant}", case, self.repetitions, results)
        results.ratios[f"sample.512.over_plain.{variant}"] = seconds["plain"] / seconds["full"]
        results.ratios[f"sample.512.over_plain.{variant}_stopped"] = (
            seconds["plain_stopped"] / seconds["stopped"]
        )
        if variant == "non_causal":
            seeds = list(range(self.sampling_batch))
            shares = [case.share_outside(everywhere, seeds) for _ in range(self.repetitions)]
            results.ratios["sample.512.outside_transformer"] = statistics.median(shares)
        return seconds

    def _sample_both_ways(
        self, name: str, case: SamplingCase, repetitions: int, results: Results, warm_up: bool = True
    ) -> dict[str, float]:
        """Seconds of "full", "stopped", "plain" and "plain_stopped", and their shares of the peak, by scale, too.

        matmul_share: time that the products would take at the peak of bfloat16, over the time it takes.
        """
        batch, config = len(case.text), case.model.config
        plain, everywhere = same_weights(case.model, DenseTransformer), SamplingConfig(gumbel=False)
        schedules = {"full": everywhere, "stopped": late_stop(everywhere, 512)}
        rows: dict[str, list[list[float]]] = {
            kind: [] for kind in ("full", "plain", "stopped", "plain_stopped")
        }

        def ours(kind: str) -> None:
            rows[kind].append(case.run(schedules[kind], list(range(batch))))

        def plainly(name: str, kind: str) -> None:
            rows[name].append(case.run_plainly(plain, schedules[kind], 0))

        jobs: dict[str, Job] = {
            "full": partial(ours, "full"),
            "plain": partial(plainly, "plain", "full"),
            "stopped": partial(ours, "stopped"),
            "plain_stopped": partial(plainly, "plain_stopped", "stopped"),
        }
        before = matmul_peak(torch.bfloat16, self.device)
        seconds = interleaved_medians(jobs, repetitions, name, warm_up)
        peak = max(before, matmul_peak(torch.bfloat16, self.device))
        results.raw[f"{name}.matmul_peak.bfloat16"] = peak
        for kind, times in rows.items():
            by_scale = [statistics.median(scale) for scale in zip(*times[warm_up:], strict=True)]
            schedule = GuidanceSchedule.of(
                schedules["stopped" if kind.endswith("stopped") else "full"], case.model.pyramid
            )
            flops = sampling_flops(config, schedule, batch, TEXT_TOKENS)
            results.ratios[f"{name}.{kind}.matmul_share"] = sum(flops) / peak / seconds[kind]
            results.raw[f"{name}.{kind}.seconds"] = seconds[kind]
            results.raw[f"{name}.{kind}.seconds_per_scale"] = by_scale
            results.raw[f"{name}.{kind}.matmul_share_per_scale"] = [
                scale / peak / time for scale, time in zip(flops, by_scale, strict=True)
            ]
        return seconds

    def _sampling_memory(self, results: Results) -> None:
        """Peak memory of sampling at 1024 px against a dense training step of the same model."""
        size = self.sizes[1024]
        model = build(size.config(1024, "non_causal"), self.device).eval().to(torch.bfloat16)
        case = SamplingCase.of(model, 1)
        used = peak_bytes(lambda: case.run(SamplingConfig(gumbel=False), [0]), self.device)
        results.raw["sample.1024.non_causal.peak_bytes"] = used
        dense = results.raw.get("train.1024.non_causal.dense.peak_bytes")
        if isinstance(dense, int | float) and dense:
            results.ratios["sample.1024.memory_over_dense_training"] = used / dense

    def measure_tokenizer(self, results: Results) -> None:
        """Tokenizing and decoding 256 px with the published architecture's shape at a fifth of its width."""
        config = RQVAEConfig(scales=PYRAMIDS[256], channels=32)
        model = RQVAE(config).to(self.device).eval()
        image = torch.rand(2, 3, 256, 256, device=self.device) * 2 - 1
        with torch.no_grad():
            latent = model.tokens_to_latent(model.tokenize(image))

            def tokenize(mixed: bool) -> None:
                with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
                    model.teacher_forcing(model.tokenize(image))

            def decode(mixed: bool) -> None:
                with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=mixed):
                    model.decode(latent)

            jobs = {
                "tokenize.float32": lambda: tokenize(False),
                "tokenize.bfloat16": lambda: tokenize(True),
                "decode.float32": lambda: decode(False),
                "decode.bfloat16": lambda: decode(True),
            }
            seconds = interleaved_medians(jobs, self.repetitions, "tokenizer")
        for name, value in seconds.items():
            results.raw[f"tokenizer.256.{name}.pictures_per_second"] = len(image) / value
        for job in ("tokenize", "decode"):
            ratio = seconds[f"{job}.float32"] / seconds[f"{job}.bfloat16"]
            results.ratios[f"tokenizer.256.{job}.bfloat16_over_float32"] = ratio

    def measure_full(self, results: Results) -> None:
        """Sampling one 512 px image with the published 2.5 B parameters' shape, random weights in bfloat16.

        The two variants share the weights. Without text encoders and decoding.
        """
        config = self.full_size.config(512, "non_causal")
        model = random_weights(build_empty(config, torch.bfloat16), 0, self.device).eval()
        case = SamplingCase.of(model, 1)
        seconds = {}
        for variant in VARIANTS:
            name = f"sample.512.full_size.{variant}"
            given = replace(case, model=with_visibility(model, variant))
            seconds[variant] = self._sample_both_ways(
                name, given, self.full_repetitions, results, warm_up=False
            )
            for ours, plain in (("full", "plain"), ("stopped", "plain_stopped")):
                results.ratios[f"{name}.{ours}.over_plain"] = seconds[variant][plain] / seconds[variant][ours]
        results.ratios["sample.512.full_size.causal_full_over_non_causal_stopped"] = (
            seconds["causal"]["full"] / seconds["non_causal"]["stopped"]
        )
        results.raw["sample.512.full_size.process_peak_bytes"] = process_peak_bytes()
