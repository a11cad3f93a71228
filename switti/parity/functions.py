"""Golden check of the small functions: crop condition, rotary tables, filters, Gumbel softmax, RMSNorm, schedules."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from switti.models.crop import center_crop_condition
from switti.models.norm import RMSNorm
from switti.models.quantizer import phi_indices
from switti.models.rope import axial_angles, rotate
from switti.parity.common import Check, close, equal
from switti.sampling.filters import draw_tokens, filtered_probabilities, gumbel_softmax
from switti.scales import Pyramid
from switti.schedule import cosine_between, warmup_decay

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


def _check_schedules(rows: list[dict[str, Any]]) -> list[Check]:
    checks = []
    for case in rows:
        worst = 0.0
        for step, rate, decay, _ in case["rows_it_lr_wdDecay_wdNoDecay"]:
            warmup = case["warmup_iters"]
            factor = schedule_factor(
                case["schedule"], step, warmup, case["max_iters"], case["wp0"], case["wpe"]
            )
            # The release holds the rate at 0 while a resumed run collects Adam's moments again.
            if warmup <= step < case["wp_start_it"] + warmup:
                factor = 0.0
            worst = max(worst, abs(case["peak_lr"] * factor - rate))
            worst = max(
                worst, abs(cosine_between(step, case["max_iters"], case["wd_start"], case["wd_end"]) - decay)
            )
        name = (
            f"functions.schedule.{case['schedule']}.warmup{case['warmup_iters']}.start{case['wp_start_it']}"
        )
        checks.append(Check(name, worst, 1e-9))
    return checks


def _check_filters(golden: dict[str, Tensor], cases: list[dict[str, Any]]) -> list[Check]:
    checks, logits = [], golden["filter.logits"]
    for i, case in enumerate(cases):
        found = filtered_probabilities(logits, case["top_k"], case["top_p"])
        noise = torch.empty(logits.flatten(0, 1).shape)
        noise.exponential_(generator=torch.Generator().manual_seed(case["seed"]))
        tokens = draw_tokens(logits, case["top_k"], case["top_p"], noise.view_as(logits))
        checks += [
            close(f"functions.filter.{i}.probs", found, golden[f"filter.{i}.probs"], TOLERANCE),
            equal(f"functions.filter.{i}.kept", (found > 0).sum(-1).flatten(), torch.tensor(case["n_kept"])),
            equal(f"functions.filter.{i}.sample", tokens, golden[f"filter.{i}.sample"]),
        ]
    return checks


def _check_gumbel(golden: dict[str, Tensor], cases: list[dict[str, Any]]) -> list[Check]:
    checks, logits = [], golden["filter.logits"]
    for i, case in enumerate(cases):
        noise = golden[f"gumbel.{i}.exp_noise"]
        drawn = torch.empty_like(noise).exponential_(generator=torch.Generator().manual_seed(case["seed"]))
        found = gumbel_softmax(logits, noise, case["tau"])
        if case["hard"]:
            found = F.one_hot(found.argmax(-1), found.shape[-1]).float()
        checks.append(close(f"functions.gumbel.{i}.out", found, golden[f"gumbel.{i}.out"], GUMBEL_TOLERANCE))
        checks.append(close(f"functions.gumbel.{i}.exp_noise", drawn, noise, TOLERANCE))
    return checks


def _check_rotary(golden: dict[str, Tensor], cases: list[dict[str, Any]]) -> list[Check]:
    checks = []
    for i, case in enumerate(cases):
        angles = axial_angles(
            case["head_dim"], case["end_x"], case["end_y"], case["theta"], case["norm_coeff"]
        )
        found = torch.stack([angles.cos(), angles.sin()], dim=-1)
        checks.append(close(f"functions.axial_cis.{i}", found, golden[f"axial_cis.{i}"], TOLERANCE))
    cosine, sine = golden["rope.freqs"][0].unbind(-1)
    signed = torch.stack([-sine, sine], dim=-1).flatten(-2)
    # Stored [B, H, L, K]; ours turns [B, L, H, K].
    found = rotate(golden["rope.in"].transpose(1, 2), cosine.repeat_interleave(2, -1), signed).transpose(1, 2)
    return [*checks, close("functions.rope.out", found, golden["rope.out"], TOLERANCE)]


def _check_norm(golden: dict[str, Tensor]) -> list[Check]:
    x, weight = golden["rmsnorm.in"], golden["rmsnorm.weight"]
    norm = RMSNorm(len(weight))
    norm.weight.data = weight
    checks = [
        close("functions.rmsnorm.out_f32", norm(x), golden["rmsnorm.out_f32"], TOLERANCE),
        close(
            "functions.rmsnorm.out_bf16in_f32weight",
            norm(x.bfloat16()),
            golden["rmsnorm.out_bf16in_f32weight"],
            BFLOAT16_TOLERANCE,
        ),
    ]
    expected = golden["rmsnorm.out_bf16in_bf16weight"]
    found = norm.bfloat16()(x.bfloat16())
    return [*checks, close("functions.rmsnorm.out_bf16in_bf16weight", found, expected, BFLOAT16_TOLERANCE)]


def check_functions(folder: Path, meta: dict[str, Any]) -> list[Check]:
    """All of functions.safetensors and of meta.json's `functions`."""
    golden, settings = load_file(folder / "functions.safetensors"), meta["functions"]
    height, width = golden["crop.hw"].unbind(1)
    checks = [
        equal(
            f"functions.crop.cond_base{base}",
            center_crop_condition(height, width, base),
            golden[f"crop.cond_base{base}"],
        )
        for base in (512, 1024)
    ]
    for name, case in settings["phi_index_released"].items():
        pyramid = Pyramid(tuple(case["patch_nums"]))
        found = torch.tensor(phi_indices(pyramid, 4))
        checks.append(equal(f"functions.phi_index.{name}", found, torch.tensor(case["phi"])))
        ratios = torch.tensor([pyramid.ratio(k) for k in range(pyramid.count)])
        checks.append(
            close(f"functions.guidance_ratio.{name}", ratios, torch.tensor(case["guidance_ratio"]), 1e-7)
        )
    checks += _check_rotary(golden, settings["axial_cis"])
    checks += _check_filters(golden, settings["filter"])
    checks += _check_gumbel(golden, settings["gumbel"])
    checks += _check_norm(golden)
    return checks + _check_schedules(settings["lr_wd_schedule"])
