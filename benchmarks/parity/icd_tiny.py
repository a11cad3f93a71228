"""Golden check of invertible consistency distillation on a network of three convolutions: losses, training, paths."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.parity.common import AbsentError, Golden, Settings, TensorFile, close, equal, relative
from benchmarks.parity.icd_functions import boundaries_of
from benchmarks.parity.icd_losses import Networks, Tolerances, check_losses
from switti.diffusion.boundaries import Boundaries
from switti.diffusion.guidance_embedding import guidance_embedding
from switti.diffusion.objective import Batch, Condition, Direction, Draws, Objective
from switti.diffusion.schedule import TIMES, NoiseSchedule
from switti.diffusion.trajectories import (
    decode,
    dynamic_guidance,
    edit,
    edit_source_first,
    encode,
    teacher_trajectory,
)
from switti.diffusion.updates import TERMS, Student, iterate
from switti.sampling.guidance import GuidanceSchedule, strength_of_weight

TOLERANCES = Tolerances(values=1e-5, loss=1e-5, gradient=1e-3)
TRAINING_TOLERANCE = 1e-4
TRAJECTORY_TOLERANCE = 1e-4
WEIGHTS, LOSSES = "tiny.weights.safetensors", "tiny.losses.safetensors"
TRAINING, TRAJECTORIES = "tiny.training.safetensors", "tiny.trajectories.safetensors"


class TinyNet:
    """Three convolutions, conditioned by a sum of time, text and guidance features."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = {name: nn.Parameter(value.clone()) for name, value in weights.items()}

    def __call__(
        self, x_BCHW: Tensor, time_B: Tensor, condition: Condition, guidance_B: Tensor | None
    ) -> Tensor:
        weights = self.weights
        frequencies = 10000.0 ** (-torch.arange(8, dtype=torch.float32) / 8)
        angles = time_B.float()[:, None] * frequencies
        times = torch.cat([angles.sin(), angles.cos()], 1)
        features = F.linear(times, weights["time_weight"], weights["time_bias"])
        features = features + F.linear(condition.text_BLD.mean(1), weights["text_weight"])
        if guidance_B is not None:
            features = features + F.linear(guidance_embedding(guidance_B), weights["guidance_weight"])
        h = torch.tanh(self._convolved(x_BCHW, 1) + features[:, :, None, None])
        h = torch.tanh(self._convolved(h, 2))
        return self._convolved(h, 3) + weights["skip"] * x_BCHW

    def _convolved(self, x_BCHW: Tensor, number: int) -> Tensor:
        weight, bias = self.weights[f"conv{number}_weight"], self.weights[f"conv{number}_bias"]
        return F.conv2d(x_BCHW, weight, bias, padding=1)


def _networks(golden: Golden) -> dict[str, TinyNet]:
    weights = golden.weights(WEIGHTS)
    networks = {}
    for role in ("teacher", "reverse", "forward"):
        mine = {key.removeprefix(f"{role}/"): v for key, v in weights.items() if key.startswith(f"{role}/")}
        if not mine:
            raise AbsentError(f"{WEIGHTS}: {role}")
        networks[role] = TinyNet(mine)
    return networks


def _batch(file: TensorFile, prefix: str, uncond: bool) -> Batch:
    unconditional = Condition(file[f"{prefix}uncond"]) if uncond else None
    text = Condition(file[f"{prefix}text"])
    return Batch(file[f"{prefix}latents"], file[f"{prefix}noise"], text, file[f"{prefix}w"], unconditional)


def check_tiny_losses(golden: Golden) -> None:
    """The four losses of every case, their intermediate values and gradients."""
    file = golden.tensors(LOSSES, "icd.tiny.", raw=True)
    for name, case in golden.meta["loss_cases"].items():
        with golden.part(f"icd.tiny.{name}"):
            roles = _networks(golden)
            objective = Objective(
                NoiseSchedule.scaled_linear(),
                boundaries_of(golden.meta["solver_configs"][case["solver"]]),
                case["embed_guidance"],
                case["huber_c"],
                case["preserve_coef"],
            )

            def parameters(
                direction: Direction, roles: dict[str, TinyNet] = roles
            ) -> dict[str, nn.Parameter]:
                return roles[direction].weights

            networks = Networks(roles["teacher"], roles["reverse"], roles["forward"], parameters)
            batch = _batch(file, f"{name}/in/", uncond=True)
            logs = (golden.wanted(golden.meta, "loss_logs") or {}).get(name)
            check_losses(golden, file, f"{name}/", objective, networks, batch, logs, TOLERANCES)
    file.finish()


def check_training(golden: Golden) -> None:
    """Iterations of the released code: four optimizer steps each."""
    settings = golden.meta["training"]
    file = golden.tensors(TRAINING, "icd.training.")
    roles = _networks(golden)
    boundaries = boundaries_of(golden.meta["solver_configs"][settings["solver"]])
    objective = Objective(NoiseSchedule.scaled_linear(), boundaries)
    students: dict[Direction, Student] = {}
    for direction in ("reverse", "forward"):
        parameters = list(roles[direction].weights.values())
        optimizer = torch.optim.AdamW(
            parameters,
            lr=settings["lr"],
            betas=tuple(settings["betas"]),
            eps=settings["eps"],
            weight_decay=settings["weight_decay"],
        )
        students[direction] = Student(roles[direction], parameters, optimizer)
    for number, history in enumerate(settings["history"]):
        with golden.part(f"icd.training.it{number}"):
            prefix = f"it{number}/"
            draws = Draws(
                file[f"{prefix}index_reverse"],
                file[f"{prefix}index_forward"],
                file[f"{prefix}interval_forward_preserve"],
                file[f"{prefix}interval_reverse_preserve"],
            )
            batch = _batch(file, prefix, uncond=False)
            done = iterate(
                objective, students, roles["teacher"], batch, draws, "alternating", settings["clip"]
            )
            for term in TERMS:
                name = term.replace("preservation", "preserve")
                quantity = f"icd.training.it{number}/{name}"
                if (loss := golden.wanted(history, name)) is not None:
                    golden.add(close(quantity, done.losses[term], torch.tensor(loss), TRAINING_TOLERANCE))
                if (norm := golden.wanted(history, f"{name}_norm")) is not None:
                    tolerance = TOLERANCES.gradient
                    golden.add(relative(f"{quantity}_norm", done.norms[term], torch.tensor(norm), tolerance))
    for direction in students:
        for name, value in roles[direction].weights.items():
            file.close(f"after/{direction}/{name}", value, TRAINING_TOLERANCE)
    file.finish()


def check_trajectories(golden: Golden) -> None:
    """Encoding, decoding, editing in both ways, and the teacher's 50 steps."""
    file = golden.tensors(TRAJECTORIES, "icd.trajectories.", raw=True)
    schedule = NoiseSchedule.scaled_linear()
    with torch.no_grad():
        for name, settings in golden.meta["trajectories"].items():
            with golden.part(f"icd.trajectories.{name}"):
                _check_paths(file, f"{name}/", _networks(golden), schedule, settings)
        with golden.part("icd.trajectories.teacher"):
            _check_teacher(file, _networks(golden)["teacher"], schedule)
    if (expected := golden.wanted(golden.meta, "automatic_inference_timesteps")) is not None:
        boundaries = Boundaries.automatic(len(expected["reverse_timesteps"]))
        for direction, jumps in (("reverse", boundaries.decode_jumps), ("forward", boundaries.encode_jumps)):
            ends = expected[f"{direction}_boundary_timesteps"]
            wanted = torch.tensor([expected[f"{direction}_timesteps"], ends]).T
            golden.add(equal(f"icd.trajectories.automatic/{direction}", torch.tensor(jumps), wanted))
    file.finish()


def _check_paths(
    file: TensorFile, prefix: str, roles: dict[str, TinyNet], schedule: NoiseSchedule, settings: Settings
) -> None:
    latent, source, target = file["in/latent"], Condition(file["in/source"]), Condition(file["in/target"])
    ends = settings["reverse_boundaries"][::-1], settings["forward_boundaries"]
    boundaries = Boundaries.given(*ends, TIMES // (settings["forward_timesteps"][0] + 1), off_grid=True)
    if boundaries.decode_jumps != list(
        zip(settings["reverse_timesteps"], settings["reverse_boundaries"], strict=True)
    ):
        raise ValueError(f"decoding jumps are {boundaries.decode_jumps} here")
    if boundaries.encode_jumps != list(
        zip(settings["forward_timesteps"], settings["forward_boundaries"], strict=True)
    ):
        raise ValueError(f"encoding jumps are {boundaries.encode_jumps} here")
    noise = file[f"{prefix}start_noise"]
    file.relative(f"{prefix}start", schedule.noised(latent, noise, boundaries.start), TRAJECTORY_TOLERANCE)
    encoded = encode(roles["forward"], schedule, boundaries, latent, source, noise)
    jumps, strength, tau = boundaries.decode_jumps, settings["w"], settings["tau"]
    constant, dynamic = dynamic_guidance(strength, jumps), dynamic_guidance(strength, jumps, tau)
    reverse, x = roles["reverse"], encoded.last
    pair = Condition(torch.cat([source.text_BLD, target.text_BLD]))
    # (name, rows kept as an axis?, states)
    paths = [
        ("encode", encoded.states),
        ("encode_eps", encoded.epsilons),
        ("reconstruct", decode(reverse, schedule, boundaries, x, source).states),
        ("decode_constant", decode(reverse, schedule, boundaries, x, source, constant).states),
        ("decode_dynamic", decode(reverse, schedule, boundaries, x, source, dynamic).states),
        ("xl_plain", decode(reverse, schedule, boundaries, x, target, dynamic).states),
        (
            "xl_source_first",
            edit_source_first(reverse, schedule, boundaries, x, source, target, dynamic, tau).states,
        ),
    ]
    for name, states in paths:
        file.relative(f"{prefix}{name}", torch.cat(states), TRAJECTORY_TOLERANCE)
    edited = edit(reverse, schedule, boundaries, x, pair, dynamic)
    file.relative(f"{prefix}edit_pair", torch.stack(edited.states), TRAJECTORY_TOLERANCE)


def _check_teacher(file: TensorFile, teacher: TinyNet, schedule: NoiseSchedule) -> None:
    source, unconditional = Condition(file["in/source"]), Condition(file["in/uncond"])
    inverted = teacher_trajectory(teacher, schedule, file["in/latent"], source, invert=True)
    file.relative(
        "teacher/inversion", torch.cat([inverted[k - 1] for k in (1, 10, 25, 50)]), TRAJECTORY_TOLERANCE
    )
    levels = [20 * k / 1000 for k in range(49, -1, -1)]
    for name, weight, bounds in (
        ("decode_w1", 1.0, (1.0, 1.0)),
        ("decode_w8", 8.0, (1.0, 1.0)),
        ("decode_w8_dynamic", 8.0, (0.4, 0.8)),
    ):
        guidance = GuidanceSchedule.by_noise_level(strength_of_weight(weight), levels, *bounds)
        states = teacher_trajectory(
            teacher, schedule, inverted[-1], source, unconditional=unconditional, guidance=guidance
        )
        kept = torch.cat([states[k - 1] for k in (1, 25, 50)])
        file.relative(f"teacher/{name}", kept, TRAJECTORY_TOLERANCE)
