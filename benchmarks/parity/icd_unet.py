"""Golden check of invertible consistency distillation on a UNet of diffusers with adapters of peft."""

from typing import Any

import torch

from benchmarks.parity.common import AbsentError, Golden, Settings
from benchmarks.parity.icd_attention import ToyTokenizer, cross_edit
from benchmarks.parity.icd_functions import boundaries_of
from benchmarks.parity.icd_losses import Networks, Tolerances, check_losses
from switti.diffusion.attention_control import BLEND_PIXELS, AttentionControl, LocalBlend
from switti.diffusion.boundaries import Boundaries
from switti.diffusion.objective import Batch, Condition, Direction, Objective
from switti.diffusion.prompt_words import time_mask
from switti.diffusion.schedule import TIMES, NoiseSchedule
from switti.diffusion.trajectories import dynamic_guidance, edit, encode
from switti.diffusion.unet import InvertibleUNet, Role
from switti.weights.fill import mismatches

TOLERANCES = Tolerances(values=1e-5, loss=1e-5, gradient=5e-3)
ENCODE_TOLERANCE, EDIT_TOLERANCE, STORE_TOLERANCE = 1e-3, 1e-4, 1e-3
WEIGHTS, LOSSES = "unet.weights.safetensors", "unet.losses.safetensors"
EDITING = "unet.editing.safetensors"
ROLES: dict[Direction, Role] = {"reverse": "decode", "forward": "encode"}


def build_network(golden: Golden) -> InvertibleUNet:
    """The golden base with both adapters. Raises AbsentError without the optional packages."""
    try:
        from diffusers import UNet2DConditionModel
    except ImportError as error:
        raise AbsentError(f"diffusers and peft ({error})") from error
    settings, weights = golden.meta["unet"], golden.weights(WEIGHTS)
    unet: Any = UNet2DConditionModel(**settings["config"])
    base = {key.removeprefix("base/"): v for key, v in weights.items() if key.startswith("base/")}
    if problems := mismatches(unet.state_dict(), base):
        raise ValueError(f"{WEIGHTS}: {'; '.join(problems[:3])}")
    unet.load_state_dict(base)
    network = InvertibleUNet(unet.eval(), settings["rank"], settings["lora_alpha"], settings["targets"])
    for direction, role in ROLES.items():
        state = {
            k.removeprefix(f"{direction}/"): v for k, v in weights.items() if k.startswith(f"{direction}/")
        }
        if problems := mismatches(network.parameters(role), state):
            raise ValueError(f"{WEIGHTS}: {direction}: {'; '.join(problems[:3])}")
        network.fill(role, state)
    return network


def check_unet(golden: Golden) -> None:
    """The four losses, with gradients of the adapters."""
    network = build_network(golden)
    file = golden.tensors(LOSSES, "icd.unet.", raw=True)
    boundaries = boundaries_of(golden.meta["solver_configs"][golden.meta["unet"]["solver"]])
    batch = Batch(file["in/latents"], file["in/noise"], Condition(file["in/text"]), file["in/w"])
    networks = Networks(
        network.predictor("teacher"),
        network.predictor("decode"),
        network.predictor("encode"),
        lambda direction: network.parameters(ROLES[direction]),
    )
    objective = Objective(NoiseSchedule.scaled_linear(), boundaries)
    logs = (golden.wanted(golden.meta, "loss_logs") or {}).get("unet")
    check_losses(golden, file, "", objective, networks, batch, logs, TOLERANCES)
    file.finish()


def check_editing(golden: Golden) -> None:
    """Encoding, then editing without and with each kind of attention control."""
    network, schedule = build_network(golden), NoiseSchedule.scaled_linear()
    file, settings = golden.tensors(EDITING, "icd.editing."), golden.meta["editing"]
    boundaries = _boundaries(settings)
    source, target = file["in/source"], file["in/target"]
    # Rows that the published code computes and does not use.
    file.used.add("in/uncond")
    with torch.no_grad():
        encoder, noise = network.predictor("encode"), file["start_noise"]
        encoded = encode(encoder, schedule, boundaries, file["in/latent"], Condition(source), noise)
        file.relative("encoded", encoded.last, ENCODE_TOLERANCE)
        # Editing amplifies a difference of encoding, and is compared from the same noise.
        x = file["encoded"]
        pair = Condition(torch.cat([source, target]))
        guidance = dynamic_guidance(settings["w"], boundaries.decode_jumps, settings["tau"])
        plain = edit(network.predictor("decode"), schedule, boundaries, x, pair, guidance)
        file.relative("none", torch.stack(plain.states), EDIT_TOLERANCE)
        for name, case in settings["controllers"].items():
            with golden.part(f"icd.editing.{name}"):
                control = _control(golden, name, case, len(boundaries.decode_jumps))
                decoder = network.predictor("decode", control)
                path = edit(decoder, schedule, boundaries, x, pair, guidance, control.after_step)
                file.relative(name, torch.stack(path.states), EDIT_TOLERANCE)
                if f"{name}/store_up_cross_0" in file:
                    up = next(maps for (place, _), maps in control.stored.items() if place == "up")
                    file.close(f"{name}/store_up_cross_0", up.flatten(0, 1), STORE_TOLERANCE)
    file.finish()


def _boundaries(settings: Settings) -> Boundaries:
    times = sorted(settings["reverse_timesteps"])
    points = TIMES // (settings["forward_timesteps"][0] + 1)
    return Boundaries.given([0, *times[:-1]], times, points, off_grid=True)


def _control(golden: Golden, name: str, case: Settings, steps: int) -> AttentionControl:
    prompts = ToyTokenizer(golden).all(case["prompts"])
    reweight = golden.meta["editing"].get("reweight")
    edit_maps = cross_edit(
        name.removesuffix("_blend"), prompts, tuple(reweight or golden.meta["prompts"]["reweight"])
    )
    blend = LocalBlend.of(prompts, golden.meta["blend"]["words"]) if name.endswith("_blend") else None
    mask = time_mask(steps, case["cross"], prompts[1:])
    return AttentionControl.of(steps, edit_maps, mask, case["self"], blend, store_pixels=BLEND_PIXELS)
