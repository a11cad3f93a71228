"""Text-to-image pipeline: text encoder, scale transformer and tokenizer in one call."""

import inspect
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from switti import arguments
from switti.errors import UserError
from switti.models.transformer import ScaleTransformer
from switti.sampling.config import SamplingConfig
from switti.sampling.image_grid import to_pil
from switti.sampling.model_card import RunFacts
from switti.sampling.noise import ImageNoise
from switti.sampling.pipeline_arguments import (
    change_settings,
    check_crop,
    check_texts,
    one_each,
    random_sources,
    rename_aliases,
)
from switti.sampling.pipeline_folder import Parts, read_parts, write_parts
from switti.sampling.sampler import PromptSwitch, ScaleTrace, check_latent, sample_latent
from switti.suggestions import shortened
from switti.text.base import TextEmbedding, TextEncoder
from switti.text.build import build_text_encoder
from switti.text.config import TextConfig
from switti.tokenizer.rqvae import RQVAE
from switti.weights.hub import is_hub_id, upload

Images = list[Image.Image] | Tensor | np.ndarray


@dataclass
class PipelineOutput:
    """Result of a call with return_dict=True."""

    images: Images


@dataclass
class SwittiPipeline:
    """Text encoder, scale transformer and tokenizer together.

    autocast: run the transformer and the decoder in bfloat16 mixed precision. text_config: how the text encoder was
    built, which `save_pretrained` writes down.
    """

    generator: ScaleTransformer
    tokenizer: RQVAE
    text_encoder: TextEncoder
    sampling: SamplingConfig
    autocast: bool = False
    text_config: TextConfig | None = None

    @property
    def device(self) -> torch.device:
        return self.generator.pos_start.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the transformer's weights."""
        return self.generator.pos_start.dtype

    def to(self, *targets: torch.device | str | torch.dtype, **named: Any) -> Self:
        """Move all parts to a device, and convert the transformer's weights to a dtype; in place, and returned.

        Either or both, by position or as device=… and dtype=…. Crop frequencies, tokenizer and text encoder keep their
        types, as in `from_pretrained`.
        """
        if unknown := named.keys() - {"device", "dtype"}:
            raise UserError(f"to() takes device and dtype, not {', '.join(sorted(unknown))}")
        device, dtype = named.get("device"), named.get("dtype")
        for target in targets:
            if isinstance(target, torch.dtype):
                dtype = target
            else:
                device = target
        if dtype is not None and not dtype.is_floating_point:
            raise UserError(f"dtype={dtype} is not a floating-point type")
        self.generator.to(device=device, dtype=dtype)
        if device is not None:
            self.tokenizer.to(device)
            self.text_encoder = self.text_encoder.to(device)
        return self

    # ---- files and hubs -----------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        tokenizer: str | Path | None = None,
        text_encoder: TextEncoder | None = None,
        autocast: bool | None = None,
        revision: str | None = None,
    ) -> "SwittiPipeline":
        """An exported folder, published weights (folder or file), or a hub id of either, such as yresearch/Switti.

        dtype: of the transformer's weights (None: as exported; float32 for published ones). tokenizer, text_encoder:
        instead of the source's own, or of the released ones. autocast: instead of what the source says.
        Raises UserError naming what is missing and the remedy.
        """
        parts = read_parts(source, dtype=dtype, device=device, tokenizer=tokenizer, revision=revision)
        if text_encoder is None and not parts.text.is_built_in:
            raise UserError(
                f"{source} was trained with the text encoder {shortened(parts.text.encoder)}, which is not part of "
                "this library, and no code is imported because a folder names it: give text_encoder=…"
            )
        # A local source does not access the network for its other parts.
        encoder = text_encoder or build_text_encoder(parts.text, device, cached=not is_hub_id(source))
        mixed = parts.autocast if autocast is None else autocast
        return cls(parts.generator, parts.tokenizer, encoder, parts.sampling, mixed, parts.text)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        details: dict[str, Any] | None = None,
        facts: RunFacts | None = None,
    ) -> None:
        """Write a folder that `from_pretrained` reads, atomically. It must be empty or not exist.

        dtype: of the transformer's weights on disk; crop frequencies and tokenizer stay float32. facts: of the run that
        trained it, for the model card.
        """
        if self.text_config is None:
            raise UserError("this pipeline does not know its text encoder's settings; set text_config")
        parts = Parts(
            self.generator, self.tokenizer, self.text_config, self.sampling, self.autocast, details or {}
        )
        write_parts(folder, parts, dtype, facts)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        dtype: torch.dtype | None = None,
        private: bool = False,
        message: str = "Upload pipeline",
    ) -> str:
        """The same folder as one commit to a hub repository (made if need be). Returns the commit's address."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "pipeline"
            self.save_pretrained(folder, dtype=dtype)
            return upload(folder, repo_id, private=private, message=message)

    # ---- sampling -----------------------------------------------------------------------------------------------

    def compile(self) -> Self:
        """Compile the transformer with torch.compile, each scale as a function of its own; in place, and returned.

        The first call warms up: every scale is compiled once for each number of images that is sampled together, and
        once more without guidance, which takes seconds to minutes. Later calls of the same size find what is compiled,
        so keep `batch_size` and the number of images. On a CPU it needs a C++ compiler. Images are those without it up
        to rounding, which in rare cases changes a token.
        """
        self.generator.compile_scales()
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str] | None = None,
        *,
        num_images_per_prompt: int = 1,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        sampling: SamplingConfig | None = None,
        negative_prompt: str | Sequence[str] | None = "",
        switch_prompts: str | Sequence[str] | None = None,
        switch_scale: int | None = None,
        crop: tuple[int, int, int, int] | None = None,
        batch_size: int = 8,
        output_type: Literal["pil", "np", "pt", "latent"] = "pil",
        return_dict: bool | None = None,
        callback_on_scale_end: Callable[[ScaleTrace], None] | None = None,
        progress: bool = False,
        **changes: Any,
    ) -> Images | PipelineOutput | tuple[Images]:
        """Images in the order of the prompts, all of one prompt together.

        An image depends on its prompt, seed and settings alone, not on its batch.

        Args:
            prompts: one text or several; diffusers' name `prompt` means the same.
            seeds: one per image, each in [0, 2⁶⁴) (default 0, 1, …).
            generator: a CPU generator per image, or a single one for all; each draws one seed per image.
            sampling: settings instead of the pipeline's. **changes: single fields of them, such as guidance=6.0 or
                top_k=100. diffusers' name `guidance_scale` means `guidance`, with the same number: strength c of
                (1 + c·r)·conditional − c·r·unconditional, so that 0 switches guidance off.
            negative_prompt: what guidance leads away from, one for all or one per prompt (None: "").
            switch_prompts: the captions that are followed from scale `switch_scale` on (Section 3.4).
            crop: (height, width, top, left) of the crop condition (None: a square that was not cropped).
            output_type: "pil": PIL images; "np": an array [B, H, W, 3] in [0, 1]; "pt": a tensor [B, 3, H, W] in
                [0, 1]; "latent": the input of the tokenizer's decoder, [B, C, H, W].
            return_dict: None: the images themselves; True: an object with `images`; False: the tuple (images,), both
                as in diffusers.

        Raises:
            UserError: lists of different lengths, an argument given under two names, arguments of another type,
                settings out of range, or logits that are not finite.
        """
        prompts, changes = rename_aliases(changes, prompts)
        repeats = arguments.integer("num_images_per_prompt", num_images_per_prompt, 1)
        batch_size = arguments.integer("batch_size", batch_size, 1)
        if output_type not in ("pil", "np", "pt", "latent"):
            raise UserError(f"output_type={shortened(repr(output_type))} must be pil, np, pt or latent")
        prompts = check_texts("prompts", prompts)
        if not prompts:
            raise UserError("no prompt given")
        captions = one_each(prompts, len(prompts), repeats, "prompts")
        negative = one_each(
            "" if negative_prompt is None else negative_prompt, len(prompts), repeats, "negative_prompt"
        )
        later = self._later(switch_prompts, switch_scale, len(prompts), repeats)
        sources = random_sources(seeds, generator, len(captions))
        settings = change_settings(self.sampling if sampling is None else sampling, changes, _ARGUMENTS)
        crop_4 = None if crop is None else torch.tensor(check_crop(crop), device=self.device)
        starts = range(0, len(captions), batch_size)
        results = []
        for start in tqdm(starts, unit="batch", disable=not progress, desc="sampling"):
            part = slice(start, start + batch_size)
            text = self._encode(captions[part])
            switch = PromptSwitch(self._encode(later[part]), switch_scale or 0) if later else None
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                latent = sample_latent(
                    self.generator,
                    self.tokenizer,
                    text,
                    self._null(negative[part]),
                    settings,
                    ImageNoise(sources[part], self.device),
                    None if crop_4 is None else crop_4.expand(len(text), -1),
                    callback_on_scale_end,
                    switch,
                )
                check_latent(latent)
                results.append(latent if output_type == "latent" else self._decode(latent))
        images = _convert(torch.cat(results), output_type)
        if return_dict is None:
            return images
        return PipelineOutput(images) if return_dict else (images,)

    def _encode(self, captions: list[str]) -> TextEmbedding:
        return self.text_encoder.encode(captions).to(self.device)

    def _null(self, negative: list[str]) -> TextEmbedding:
        """One row if all are the same, so that it is encoded once, and in the same way whatever the batch."""
        return self._encode(negative[:1] if len(set(negative)) == 1 else negative)

    def _decode(self, latent: Tensor) -> Tensor:
        return (self.tokenizer.decode(latent).float().clamp(-1, 1) + 1) / 2

    def _later(
        self, prompts: str | Sequence[str] | None, scale: int | None, count: int, repeats: int
    ) -> list[str]:
        """Captions of the images after the switch; empty without one."""
        if (prompts is None) != (scale is None):
            raise UserError("switch_prompts and switch_scale belong together; give both or none")
        if prompts is None or scale is None:
            return []
        last = self.generator.pyramid.count - 1
        arguments.integer("switch_scale", scale, 1, last)
        return one_each(prompts, count, repeats, "switch_prompts")


def _convert(result: Tensor, output_type: str) -> Images:
    if output_type == "pil":
        return to_pil(result)
    return result.permute(0, 2, 3, 1).float().cpu().numpy() if output_type == "np" else result


_ARGUMENTS = inspect.getfullargspec(SwittiPipeline.__call__).kwonlyargs
