"""Prompts to pictures in one call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from switti.errors import UserError
from switti.models.rqvae import RQVAE
from switti.models.text.base import TextEncoder
from switti.models.transformer import ScaleTransformer
from switti.sampling.config import SamplingConfig
from switti.sampling.pictures import to_pil
from switti.sampling.sampler import PictureNoise, ScaleTrace, sample_latent


@dataclass
class SwittiPipeline:
    """Text encoder, scale transformer and tokenizer together.

    autocast: run the transformer and the decoder in bfloat16 mixed precision.
    """

    generator: ScaleTransformer
    tokenizer: RQVAE
    text_encoder: TextEncoder
    sampling: SamplingConfig
    autocast: bool = False

    @property
    def device(self) -> torch.device:
        return self.generator.pos_start.device

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        num_images_per_prompt: int = 1,
        seeds: Sequence[int] | None = None,
        sampling: SamplingConfig | None = None,
        negative_prompt: str = "",
        crop: tuple[int, int, int, int] = (512, 512, 0, 0),
        batch_size: int = 8,
        output_type: Literal["pil", "pt"] = "pil",
        callback_on_scale_end: Callable[[ScaleTrace], None] | None = None,
        progress: bool = False,
    ) -> list[Image.Image] | Tensor:
        """Pictures in the order of the prompts, all of one prompt together.

        seeds: one a picture (default 0, 1, …); a picture depends on its prompt, seed and settings alone.
        negative_prompt: what guidance leads away from. crop: (height, width, top, left) of the crop condition.
        Returns PIL pictures, or with output_type "pt" a tensor [B, 3, H, W] in [0, 1].
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise UserError("no prompt given")
        captions = [prompt for prompt in prompts for _ in range(num_images_per_prompt)]
        seeds = list(range(len(captions))) if seeds is None else list(seeds)
        if len(seeds) != len(captions):
            raise UserError(f"{len(seeds)} seeds for {len(captions)} pictures; give one seed a picture")
        null = self.text_encoder.encode([negative_prompt]).to(self.device)
        settings = self.sampling if sampling is None else sampling
        starts = tqdm(
            range(0, len(captions), batch_size), unit="batch", disable=not progress, desc="sampling"
        )
        images = []
        for start in starts:
            part = slice(start, start + batch_size)
            text = self.text_encoder.encode(captions[part]).to(self.device)
            crop_B4 = torch.tensor([crop], device=self.device).expand(len(text), -1)
            noise = PictureNoise(seeds[part], self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                latent = sample_latent(
                    self.generator,
                    self.tokenizer,
                    text,
                    null,
                    settings,
                    noise,
                    crop_B4,
                    callback_on_scale_end,
                )
                decoded = self.tokenizer.decode(latent)
            images.append((decoded.float().clamp(-1, 1) + 1) / 2)
        result = torch.cat(images)
        return to_pil(result) if output_type == "pil" else result
