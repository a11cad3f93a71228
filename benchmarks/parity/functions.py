"""Golden check of the small functions: crop condition, rotary tables, filters, Gumbel softmax, RMSNorm, schedules."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.parity.common import Check, Golden, Settings, TensorFile, close, equal, scales_of
from lightning_modules.schedule import cosine_between, warmup_decay
from switti.models.crop_embedding import center_crop_condition
from switti.models.norm import RMSNorm
from switti.models.rope import axial_angles, rotate
from switti.sampling.filters import draw_tokens, filtered_probabilities, gumbel_softmax
from switti.scales import Pyramid
from switti.tokenizer.quantizer import phi_indices

TOLERANCE = 1e-5
GUMBEL_TOLERANCE = 5e-3
BFLOAT16_TOLERANCE = 0.0


def schedule_factor(name: str, step: int, warmup: int, total: int, initial: float, final: float) -> float:
    """Learning-rate factor of the release's named schedules, in terms of `warmup_decay`."""
    common: dict[str, Any] = {"warmup": warmup, "total": total, "initial": initial, "final": final}
    if name == "cos":
        return warmup_decay(step, shape="cosine", **common)
    if name == "exp":
        return warmup_decay(step, shape="exponential", knee=0.15, **common)
    knees = {"lin": 0.15, "lin0": 0.05, "lin00": 0.0}
    if name in knees:
        return warmup_decay(step, knee=knees[name], **common)
    knee = float(name.removeprefix("lin"))
    knee_value = (1 + final + (1 - final) * (1 - knee)) / 2
    return warmup_decay(step, knee=knee, knee_value=knee_value, **common)


def _check_schedules(golden: Golden, rows: list[Settings]) -> None:
    for case in rows:
        name = (
            f"functions.schedule.{case['schedule']}.warmup{case['warmup_iters']}.start{case['wp_start_it']}"
        )
        with golden.part(name):
            worst = 0.0
            for step, rate, decay, _ in case["rows_it_lr_wdDecay_wdNoDecay"]:
                warmup = case["warmup_iters"]
                factor = schedule_factor(
                    case["schedule"], step, warmup, case["max_iters"], case["wp0"], case["wpe"]
                )
                # The release holds the rate at 0 while a resumed run collects Adam's moments again.
                if warmup <= step < case["wp_start_it"] + warmup:
                    factor = 0.0
                decayed = cosine_between(step, case["max_iters"], case["wd_start"], case["wd_end"])
                worst = max(worst, abs(case["peak_lr"] * factor - rate), abs(decayed - decay))
            golden.add(Check(name, worst, 1e-9))


def _check_filters(golden: Golden, file: TensorFile, cases: list[Settings]) -> None:
    logits = file["filter.logits"]
    for i, case in enumerate(cases):
        with golden.part(f"functions.filter.{i}"):
            actual = filtered_probabilities(logits, case["top_k"], case["top_p"])
            file.close(f"filter.{i}.probs", actual, TOLERANCE)
            if (kept := golden.wanted(case, "n_kept")) is not None:
                golden.add(
                    equal(f"functions.filter.{i}.kept", (actual > 0).sum(-1).flatten(), torch.tensor(kept))
                )
            noise = torch.empty(logits.flatten(0, 1).shape)
            noise.exponential_(generator=torch.Generator().manual_seed(case["seed"]))
            tokens = draw_tokens(logits, case["top_k"], case["top_p"], noise.view_as(logits))
            file.equal(f"filter.{i}.sample", tokens)


def _check_gumbel(golden: Golden, file: TensorFile, cases: list[Settings]) -> None:
    logits = file["filter.logits"]
    for i, case in enumerate(cases):
        with golden.part(f"functions.gumbel.{i}"):
            noise = file.wanted(f"gumbel.{i}.exp_noise")
            if noise is None or golden.wanted(case, "seed") is not None:
                generator = torch.Generator().manual_seed(case["seed"])
                drawn = torch.empty_like(logits).exponential_(generator=generator)
                if noise is not None:
                    golden.add(close(f"functions.gumbel.{i}.exp_noise", drawn, noise, TOLERANCE))
            actual = gumbel_softmax(logits, drawn if noise is None else noise, case["tau"])
            if case["hard"]:
                actual = F.one_hot(actual.argmax(-1), actual.shape[-1]).float()
            file.close(f"gumbel.{i}.out", actual, GUMBEL_TOLERANCE)


def _check_rotary_tables(golden: Golden, file: TensorFile, cases: list[Settings]) -> None:
    for i, case in enumerate(cases):
        with golden.part(f"functions.axial_cis.{i}"):
            if case["end_x"] * case["end_y"] * case["head_dim"] > 1 << 24:
                raise ValueError(f"{case['end_x']} × {case['end_y']} positions are too many")
            angles = axial_angles(
                case["head_dim"], case["end_x"], case["end_y"], case["theta"], case["norm_coeff"]
            )
            file.close(f"axial_cis.{i}", torch.stack([angles.cos(), angles.sin()], dim=-1), TOLERANCE)


def _check_rotation(file: TensorFile) -> None:
    cosine, sine = file["rope.freqs"][0].unbind(-1)
    signed = torch.stack([-sine, sine], dim=-1).flatten(-2)
    # Stored [B, H, L, K]; ours turns [B, L, H, K].
    actual = rotate(file["rope.in"].transpose(1, 2), cosine.repeat_interleave(2, -1), signed).transpose(1, 2)
    file.close("rope.out", actual, TOLERANCE)


def _check_norm(file: TensorFile) -> None:
    x, weight = file["rmsnorm.in"], file["rmsnorm.weight"]
    norm = RMSNorm(len(weight))
    norm.weight.data = weight
    file.close("rmsnorm.out_f32", norm(x), TOLERANCE)
    file.close("rmsnorm.out_bf16in_f32weight", norm(x.bfloat16()), BFLOAT16_TOLERANCE)
    file.close("rmsnorm.out_bf16in_bf16weight", norm.bfloat16()(x.bfloat16()), BFLOAT16_TOLERANCE)


def _check_crop(file: TensorFile) -> None:
    height, width = file["crop.hw"].unbind(1)
    bases = {int(key.removeprefix("crop.cond_base")) for key in file.starting("crop.cond_base")}
    for base in sorted({512, 1024} | bases):
        file.equal(f"crop.cond_base{base}", center_crop_condition(height, width, base))


def _check_pyramids(golden: Golden, cases: Settings) -> None:
    for name, case in cases.items():
        with golden.part(f"functions.pyramid.{name}"):
            pyramid = Pyramid(tuple(scales_of(case)))
            if (phi := golden.wanted(case, "phi")) is not None:
                actual = torch.tensor(phi_indices(pyramid, 4))
                golden.add(equal(f"functions.phi_index.{name}", actual, torch.tensor(phi)))
            if (guidance := golden.wanted(case, "guidance_ratio")) is not None:
                ratios = torch.tensor([pyramid.ratio(k) for k in range(pyramid.count)])
                golden.add(close(f"functions.guidance_ratio.{name}", ratios, torch.tensor(guidance), 1e-7))


def check_functions(golden: Golden) -> None:
    """All of functions.safetensors and of meta.json's `functions`."""
    settings = golden.meta["functions"]
    file = golden.tensors("functions.safetensors", "functions.", raw=True)
    parts: dict[str, Callable[[], None]] = {
        "crop": lambda: _check_crop(file),
        "pyramids": lambda: _check_pyramids(golden, settings["phi_index_released"]),
        "axial_cis": lambda: _check_rotary_tables(golden, file, settings["axial_cis"]),
        "rope": lambda: _check_rotation(file),
        "filter": lambda: _check_filters(golden, file, settings["filter"]),
        "gumbel": lambda: _check_gumbel(golden, file, settings["gumbel"]),
        "rmsnorm": lambda: _check_norm(file),
        "schedule": lambda: _check_schedules(golden, settings["lr_wd_schedule"]),
    }
    for name, check in parts.items():
        with golden.part(f"functions.{name}"):
            check()
    file.finish()
