"""Text-guided editing of images with an invertible UNet: encode, reconstruct, edit (Section 4).

    editor = Editor.load(unet, "adapters.safetensors", VAELatents(vae, 512, digest), embed, tokenize)
    noise = editor.encode(image, ["a cat on the table"])
    images = editor.edit(noise, ["a cat on the table", "a dog on the table"], control=ControlSettings())

Shape suffixes: B batch, R rows (prompts), C channels, H W image or latent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from switti.diffusion.adapter_file import load_adapters
from switti.diffusion.attention_control import (
    AttentionControl,
    CrossEdit,
    LocalBlend,
    Refine,
    Replace,
    Reweight,
)
from switti.diffusion.boundaries import Boundaries
from switti.diffusion.latents import Codec
from switti.diffusion.objective import Condition
from switti.diffusion.prompt_words import PromptTokens, equalizer, time_mask
from switti.diffusion.schedule import NoiseSchedule
from switti.diffusion.trajectories import decode, dynamic_guidance, edit, encode, start_noise
from switti.diffusion.unet import InvertibleUNet
from switti.errors import UserError


@dataclass(frozen=True)
class ControlSettings:
    """Prompt-to-prompt control with the released scripts' values.

    kind: auto takes replace for equal word counts, else refine. cross, own: share of the steps with controlled cross-
    and self-attention. amplify: factors of words in the edited prompts. blend: words of each prompt, the source's
    first, whose region alone is edited; None: everywhere.
    """

    kind: Literal["auto", "replace", "refine"] = "auto"
    cross: float = 0.3
    own: float = 0.6
    amplify: Mapping[str, float] = field(default_factory=dict)
    blend: Sequence[Sequence[str]] | None = None

    def build(self, prompts: Sequence[PromptTokens], steps: int) -> AttentionControl:
        """Control of one trajectory. Raises UserError for prompts that do not suit it."""
        equal = len({len(prompt.words) for prompt in prompts}) == 1
        replaces = self.kind == "replace" or (self.kind == "auto" and equal)
        cross: CrossEdit = Replace.of(prompts) if replaces else Refine.of(prompts)
        if self.amplify:
            cross = Reweight(cross, torch.stack([equalizer(target, self.amplify) for target in prompts[1:]]))
        blend = None if self.blend is None else LocalBlend.of(prompts, self.blend)
        return AttentionControl.of(steps, cross, time_mask(steps, self.cross, prompts[1:]), self.own, blend)


@dataclass(frozen=True)
class Editor:
    """An invertible UNet with what makes its latents and conditions.

    embed: prompts → condition, a row each. tokenize: a prompt's words and tokens, of the same text encoder.
    """

    network: InvertibleUNet
    boundaries: Boundaries
    codec: Codec
    embed: Callable[[Sequence[str]], Condition]
    tokenize: Callable[[str], PromptTokens]
    schedule: NoiseSchedule = field(default_factory=NoiseSchedule.scaled_linear)

    @classmethod
    def load(
        cls,
        unet: Any,
        path: str | Path,
        codec: Codec,
        embed: Callable[[Sequence[str]], Condition],
        tokenize: Callable[[str], PromptTokens],
    ) -> "Editor":
        """Raises UserError for adapters of another base or of another latent space."""
        network, settings = load_adapters(unet, path)
        if settings.latents is not None:
            codec.space.check_same(settings.latents, str(path))
        return cls(network, settings.boundaries, codec, embed, tokenize)

    @torch.no_grad()
    def encode(self, images_B3HW: Tensor, captions: Sequence[str], seed: int | None = 30) -> Tensor:
        """Images in [−1, 1] → noise. seed: of the noise added at the first time; None: none is added."""
        latents_BCHW = self.codec.encode(images_B3HW)
        noise_BCHW = None if seed is None else start_noise(latents_BCHW, seed)
        encoder, source = self.network.predictor("encode"), self._condition(captions, len(latents_BCHW))
        path = encode(encoder, self.schedule, self.boundaries, latents_BCHW, source, noise_BCHW, self._embeds)
        return path.last

    @torch.no_grad()
    def decode(
        self, noise_BCHW: Tensor, captions: Sequence[str], strength: float = 0.0, full_until: float = 1.0
    ) -> Tensor:
        """Noise → images. strength: extra guidance g, off while t > full_until·T; 0 reconstructs what was encoded."""
        self._check_strength(strength)
        guidance = dynamic_guidance(strength, self.boundaries.decode_jumps, full_until)
        condition = self._condition(captions, len(noise_BCHW))
        decoder = self.network.predictor("decode")
        path = decode(decoder, self.schedule, self.boundaries, noise_BCHW, condition, guidance, self._embeds)
        return self.codec.decode(path.last)

    @torch.no_grad()
    def edit(
        self,
        noise_1CHW: Tensor,
        prompts: Sequence[str],
        strength: float = 19.0,
        full_until: float = 0.8,
        control: ControlSettings | None = None,
    ) -> Tensor:
        """One image's noise → its reconstruction (prompts[0], the caption it was encoded with) and its edits."""
        if len(noise_1CHW) != 1 or len(prompts) < 2:
            raise UserError(
                f"edit takes the noise of 1 image and at least 2 prompts, the source's first; it got "
                f"{len(noise_1CHW)} and {len(prompts)}"
            )
        if not self._embeds:
            raise UserError(
                "the UNet has no guidance embedding (time_cond_proj_dim is null), editing needs it"
            )
        jumps = self.boundaries.decode_jumps
        controlled = None
        if control is not None:
            controlled = control.build([self.tokenize(prompt) for prompt in prompts], len(jumps))
        path = edit(
            self.network.predictor("decode", controlled),
            self.schedule,
            self.boundaries,
            noise_1CHW,
            self._condition(prompts, len(prompts)),
            dynamic_guidance(strength, jumps, full_until),
            None if controlled is None else controlled.after_step,
        )
        return self.codec.decode(path.last)

    @property
    def _embeds(self) -> bool:
        return self.network.guidance_width is not None

    def _check_strength(self, strength: float) -> None:
        if strength and not self._embeds:
            raise UserError(
                f"strength={strength:g} needs a UNet with guidance embedding (time_cond_proj_dim is null); give 0"
            )

    def _condition(self, prompts: Sequence[str], rows: int) -> Condition:
        if isinstance(prompts, str) or len(prompts) != rows:
            raise UserError(f"{rows} images need a list of {rows} captions, not {prompts!r}")
        return self.embed(prompts)
