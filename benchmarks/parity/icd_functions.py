"""Golden check of invertible consistency distillation's functions: schedule, boundaries, jumps, guidance, embedding."""

import torch
from torch import Tensor

from benchmarks.parity.common import Check, Golden, Settings, TensorFile
from switti.diffusion.boundaries import Boundaries
from switti.diffusion.guidance_embedding import guidance_embedding
from switti.diffusion.schedule import NoiseSchedule
from switti.errors import UserError
from switti.sampling.guidance import (
    GuidanceSchedule,
    guided,
    guided_fraction,
    strength_of_weight,
    weight_of_strength,
)

TABLE_TOLERANCE = 1e-6
JUMP_TOLERANCE = {"f32": 1e-5, "f64": 1e-12}
SCHEDULE_FILE, FUNCTIONS_FILE = "schedule.safetensors", "functions.safetensors"


def boundaries_of(settings: Settings) -> Boundaries:
    """Of a golden configuration. One of them has a boundary off the grid, as the released model does."""
    reverse, forward = (
        [int(time) for time in settings[name].split(",")] for name in ("endpoints", "forward_endpoints")
    )
    return Boundaries.given(reverse, forward, settings["ddim_timesteps"], off_grid=True)


def check_schedule(golden: Golden) -> None:
    """Tables, and starts, next points and boundaries of every configuration; automatic boundaries."""
    schedule = NoiseSchedule.scaled_linear()
    file = golden.tensors(SCHEDULE_FILE, "icd.schedule.", raw=True)
    file.close("alphas_cumprod", schedule.alphas_cumprod_T, TABLE_TOLERANCE)
    file.close("alpha", schedule.alpha, TABLE_TOLERANCE)
    file.close("sigma", schedule.sigma, TABLE_TOLERANCE)
    for name, settings in golden.meta["solver_configs"].items():
        with golden.part(f"icd.schedule.{name}"):
            _check_solver(file, name, schedule, boundaries_of(settings))
    file.finish()
    for name, expected in (golden.wanted(golden.meta, "automatic_endpoints") or {}).items():
        with golden.part(f"icd.automatic_endpoints.{name}"):
            _check_automatic(golden, name, expected)


def _check_solver(file: TensorFile, name: str, schedule: NoiseSchedule, boundaries: Boundaries) -> None:
    grid_N = torch.tensor(boundaries.grid)
    cumprod_T = schedule.alphas_cumprod_T
    file.equal(f"{name}/ddim_timesteps", grid_N)
    file.close(f"{name}/ddim_alpha_cumprods", cumprod_T[grid_N], TABLE_TOLERANCE)
    before_N = cumprod_T[boundaries.previous(grid_N)].double()
    file.close(f"{name}/ddim_alpha_cumprods_prev", before_N, TABLE_TOLERANCE)
    after_N = torch.cat([cumprod_T[grid_N[1:]], torch.zeros(1)]).double()
    file.close(f"{name}/ddim_alpha_cumprods_next", after_N, TABLE_TOLERANCE)
    file.equal(f"{name}/rev_start", grid_N)
    file.equal(f"{name}/rev_next", boundaries.previous(grid_N))
    file.equal(f"{name}/rev_boundary", boundaries.reverse_end(boundaries.previous(grid_N)))
    next_N = boundaries.following(grid_N[:-1])
    file.equal(f"{name}/fwd_start", grid_N[:-1])
    file.equal(f"{name}/fwd_next", next_N)
    file.equal(f"{name}/fwd_boundary", boundaries.forward_end(next_N))


def _check_automatic(golden: Golden, name: str, expected: Settings) -> None:
    """Where the published code makes fewer segments than asked, ours refuses and the smaller number gives the same."""
    points, segments = (int(part[1:]) for part in name.split("_"))
    quantity = f"icd.automatic_endpoints.{name}"
    count = len(expected["forward_endpoints"])
    if count != segments:
        try:
            Boundaries.automatic(segments, points)
        except UserError as error:
            refused = f" {count} segments" in str(error)
        else:
            refused = False
        golden.add(Check(quantity, 0.0 if refused else 1.0, 0.0, exact=True))
        # Boundaries of these segments are still those that the width gives.
        boundaries = Boundaries.given(expected["endpoints"], expected["forward_endpoints"], points)
    else:
        boundaries = Boundaries.automatic(segments, points)
    same = list(boundaries.reverse) == expected["endpoints"] and (
        list(boundaries.forward) == expected["forward_endpoints"]
    )
    reason = "" if same else f"is {expected['endpoints']} in the folder, {list(boundaries.reverse)} here"
    golden.add(Check(f"{quantity}.times", 0.0 if same else 1.0, 0.0, exact=True, reason=reason))


def check_functions(golden: Golden) -> None:
    """J, DDIM steps, the embedding E(g), dynamic guidance, two-pass guidance, the teacher's steps."""
    schedule = NoiseSchedule.scaled_linear()
    file = golden.tensors(FUNCTIONS_FILE, "icd.functions.", raw=True)
    first = boundaries_of(next(iter(golden.meta["solver_configs"].values())))
    for kind, tolerance in JUMP_TOLERANCE.items():
        with golden.part(f"icd.functions.origin/{kind}"):
            x, eps, t, s = (file[f"origin/{kind}/{name}"] for name in ("x", "eps", "t", "s"))
            file.close(f"origin/{kind}/out", schedule.jump(x, eps, t, s), tolerance)
        with golden.part(f"icd.functions.ddim/{kind}"):
            _check_ddim(file, f"ddim/{kind}", schedule, first, tolerance)
    with golden.part("icd.functions.vpred"):
        x, v, t, s = (file[f"vpred/{name}"] for name in ("x", "v", "t", "s"))
        out = schedule.jump(x.double(), schedule.epsilon_of_velocity(x.double(), v, t), t, s)
        file.close("vpred/out", out, JUMP_TOLERANCE["f32"])
    with golden.part("icd.functions.wemb"):
        for key in file.starting("wemb/"):
            if key != "wemb/w":
                width = int(key.removeprefix("wemb/"))
                file.close(key, guidance_embedding(file["wemb/w"], width), TABLE_TOLERANCE)
    for low, high, weight in golden.meta["wt_cases"]:
        with golden.part(f"icd.functions.wt/{low}_{high}_{weight}"):
            _check_dynamic(file, low, high, weight)
    with golden.part("icd.functions.guided"):
        _check_guided(file)
    with golden.part("icd.functions.teacher_step"):
        _check_teacher_steps(file, schedule)
    file.finish()


def _check_ddim(
    file: TensorFile, prefix: str, schedule: NoiseSchedule, boundaries: Boundaries, tolerance: float
) -> None:
    grid_N = torch.tensor(boundaries.grid)
    x0, eps = file[f"{prefix}/x0"], file[f"{prefix}/eps"]
    before_B = boundaries.previous(grid_N[file[f"{prefix}/index_prev"]])
    file.close(f"{prefix}/prev", schedule.ddim(x0, eps, before_B), tolerance)
    after_B = boundaries.following(grid_N[file[f"{prefix}/index_next"]])
    file.close(f"{prefix}/next", schedule.ddim(x0, eps, after_B), tolerance)


def _check_dynamic(file: TensorFile, low: float, high: float, weight: float) -> None:
    levels = [time / 1000 for time in file["wt/t"].tolist()]
    embedded = GuidanceSchedule.by_noise_level(weight, levels, low, high).strengths
    strength = strength_of_weight(weight)
    explicit = GuidanceSchedule.by_noise_level(strength, levels, low, high).strengths
    name = f"wt/{low}_{high}_{weight}"
    file.close(f"{name}/embedded", torch.tensor(embedded, dtype=torch.float64), TABLE_TOLERANCE)
    weights = [weight_of_strength(value) for value in explicit]
    file.close(f"{name}/explicit", torch.tensor(weights, dtype=torch.float64), TABLE_TOLERANCE)


def _check_guided(file: TensorFile) -> None:
    """Weight 8; the dynamic ones over a ramp from 0.4 to 0.8."""
    conditional, unconditional = file["guided/cond"], file["guided/uncond"]
    strength = strength_of_weight(8.0)

    def combined(fraction: float) -> Tensor:
        return guided(conditional, unconditional, torch.full((len(conditional),), fraction * strength))

    file.close("guided/constant", combined(1.0), JUMP_TOLERANCE["f32"])
    for key in file.starting("guided/dynamic_"):
        level = int(key.removeprefix("guided/dynamic_")) / 1000
        file.close(key, combined(guided_fraction(level, 0.4, 0.8)), JUMP_TOLERANCE["f32"])


def _check_teacher_steps(file: TensorFile, schedule: NoiseSchedule) -> None:
    x, eps = file["teacher_step/x"], file["teacher_step/eps"]
    for key in file.starting("teacher_step/prev_"):
        time = int(key.removeprefix("teacher_step/prev_"))
        file.close(key, schedule.ddim_step(x, eps, time, time - 20), TABLE_TOLERANCE)
    for key in file.starting("teacher_step/next_"):
        time = int(key.removeprefix("teacher_step/next_"))
        file.close(key, schedule.ddim_step(x, eps, time - 20, time), TABLE_TOLERANCE)
