"""Prompts to pictures in one call."""

import inspect
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from switti import arguments
from switti.config_values import from_values
from switti.errors import UserError
from switti.models.transformer import ScaleTransformer
from switti.sampling.config import FOREIGN, SamplingConfig
from switti.sampling.image_grid import to_pil
from switti.sampling.pipeline_folder import Parts, read_parts, write_parts
from switti.sampling.sampler import PictureNoise, PromptSwitch, ScaleTrace, sample_latent
from switti.suggestions import did_you_mean, shortened
from switti.text.base import TextEmbedding, TextEncoder
from switti.text.build import build_text_encoder
from switti.text.config import TextConfig
from switti.tokenizer.rqvae import RQVAE
from switti.weights.hub import is_hub_id, upload

Seed = int | torch.Generator
MAX_CROP = 1 << 24  # px; the condition is computed in float32


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
        # What lies on this machine asks no network for the rest.
        encoder = text_encoder or build_text_encoder(parts.text, device, cached=not is_hub_id(source))
        mixed = parts.autocast if autocast is None else autocast
        return cls(parts.generator, parts.tokenizer, encoder, parts.sampling, mixed, parts.text)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: torch.dtype | None = None,
        details: dict[str, Any] | None = None,
    ) -> None:
        """Write a folder that `from_pretrained` reads: whole, or not at all. It must be empty or not exist.

        dtype: of the transformer's weights on disk; crop frequencies and tokenizer stay float32.
        """
        if self.text_config is None:
            raise UserError("this pipeline does not know its text encoder's settings; set text_config")
        parts = Parts(
            self.generator, self.tokenizer, self.text_config, self.sampling, self.autocast, details or {}
        )
        write_parts(folder, parts, dtype)

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

    @torch.no_grad()
    def __call__(
        self,
        prompts: str | Sequence[str],
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
        output_type: Literal["pil", "pt", "latent"] = "pil",
        callback_on_scale_end: Callable[[ScaleTrace], None] | None = None,
        progress: bool = False,
        **changes: Any,
    ) -> list[Image.Image] | Tensor:
        """Pictures in the order of the prompts, all of one prompt together.

        A picture depends on its prompt, seed and settings alone, not on its batch.

        seeds: one a picture, each in [0, 2⁶⁴) (default 0, 1, …). generator: a CPU generator a picture, or a single one
        for all: each draws a seed a picture and so moves on. sampling: instead of the pipeline's; **changes: single
        fields of it, such as guidance=6.0 or top_k=100. negative_prompt: what guidance leads away from, one for all or
        one a prompt (None: ""). switch_prompts: the captions that are followed from scale `switch_scale` on
        (Section 3.4). crop: (height, width, top, left) of the crop condition (None: a square that was not cropped).

        Returns PIL pictures; with output_type "pt" a tensor [B, 3, H, W] in [0, 1], with "latent" what the tokenizer
        decodes, [B, C, H, W]. Raises UserError for lists of different lengths, arguments of another type, settings out
        of range, and where logits are not finite.
        """
        repeats = arguments.integer("num_images_per_prompt", num_images_per_prompt, 1)
        batch_size = arguments.integer("batch_size", batch_size, 1)
        if output_type not in ("pil", "pt", "latent"):
            raise UserError(f"output_type={shortened(repr(output_type))} must be pil, pt or latent")
        prompts = _texts("prompts", prompts)
        if not prompts:
            raise UserError("no prompt given")
        captions = _one_each(prompts, len(prompts), repeats, "prompts")
        negative = _one_each(
            "" if negative_prompt is None else negative_prompt, len(prompts), repeats, "negative_prompt"
        )
        later = self._later(switch_prompts, switch_scale, len(prompts), repeats)
        sources = _sources(seeds, generator, len(captions))
        settings = changed(self.sampling if sampling is None else sampling, changes, _ARGUMENTS)
        crop_4 = None if crop is None else torch.tensor(_checked_crop(crop), device=self.device)
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
                    PictureNoise(sources[part], self.device),
                    None if crop_4 is None else crop_4.expand(len(text), -1),
                    callback_on_scale_end,
                    switch,
                )
                results.append(latent if output_type == "latent" else self._decode(latent))
        result = torch.cat(results)
        return to_pil(result) if output_type == "pil" else result

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
        """Captions of the pictures after the switch; empty without one."""
        if (prompts is None) != (scale is None):
            raise UserError("switch_prompts and switch_scale belong together; give both or none")
        if prompts is None or scale is None:
            return []
        last = self.generator.pyramid.count - 1
        arguments.integer("switch_scale", scale, 1, last)
        return _one_each(prompts, count, repeats, "switch_prompts")


_ARGUMENTS = inspect.getfullargspec(SwittiPipeline.__call__).kwonlyargs


def _texts(name: str, given: Any) -> list[str]:
    """One text or several as a list. Raises UserError for anything else."""
    if isinstance(given, str):
        return [arguments.text(name, given)]
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise UserError(f"{name} must be a text or a list of texts, not {type(given).__name__}")
    return [arguments.text(f"{name}[{i}]", item) for i, item in enumerate(given)]


def _one_each(given: str | Sequence[str], count: int, repeats: int, name: str) -> list[str]:
    """One text a picture: one for all, or one a prompt."""
    texts = _texts(name, given)
    if isinstance(given, str):
        texts = texts * count
    if len(texts) != count:
        raise UserError(f"{name}: {len(texts)} texts for {count} prompts; give one for all or one a prompt")
    return [text for text in texts for _ in range(repeats)]


def _checked_crop(crop: Any) -> list[list[int]]:
    """(height, width, top, left) in pixels as a row. Raises UserError."""
    if not isinstance(crop, Sequence) or isinstance(crop, str) or len(crop) != 4:
        raise UserError(f"crop={shortened(repr(crop))} must be (height, width, top, left) in pixels")
    return [[arguments.integer("crop", side, 0, MAX_CROP) for side in crop]]


def _sources(
    seeds: Sequence[int] | None, generator: torch.Generator | Sequence[torch.Generator] | None, count: int
) -> list[Seed]:
    """Where each picture's randomness comes from."""
    if generator is None:
        found: list[Seed] = list(range(count)) if seeds is None else _checked_seeds(seeds)
        name = "seeds"
    elif seeds is not None:
        raise UserError("give seeds or generator, not both")
    else:
        single = isinstance(generator, torch.Generator)
        generators = [generator] if isinstance(generator, torch.Generator) else generator
        if not isinstance(generators, Sequence) or not all(
            isinstance(g, torch.Generator) for g in generators
        ):
            raise UserError(
                f"generator={shortened(repr(generator))} must be a torch.Generator or a list of them"
            )
        for item in generators:
            if item.device.type != "cpu":
                raise UserError(
                    f"generator lives on {item.device}; noise is drawn on the CPU: torch.Generator()"
                )
        drawn = torch.randint(2**63 - 1, (count,), generator=generators[0]).tolist() if single else []
        found, name = drawn if single else list(generators), "generators"
    if len(found) != count:
        raise UserError(f"{len(found)} {name} for {count} pictures; give one a picture")
    return found


def _checked_seeds(seeds: Any) -> list[Seed]:
    if isinstance(seeds, str | bytes) or not hasattr(seeds, "__iter__"):
        raise UserError(f"seeds={shortened(repr(seeds))} must be a list with one seed a picture")
    return [arguments.seed(f"seeds[{i}]", seed) for i, seed in enumerate(seeds)]


def changed(
    sampling: SamplingConfig, changes: dict[str, Any], others: Collection[str] = ()
) -> SamplingConfig:
    """Settings with some fields replaced; others: arguments of the caller that may have been meant.

    Raises UserError for a name that is not a setting, a value of another type or out of range.
    """
    names = [item.name for item in fields(SamplingConfig)]
    for name in changes:
        if name not in names:
            hint = did_you_mean(name, [*names, *others], FOREIGN) or f"; sampling has {', '.join(names)}"
            raise UserError(f"unknown argument {name!r}{hint}")
    if not isinstance(sampling, SamplingConfig):
        raise UserError(f"sampling={shortened(repr(sampling))} must be a SamplingConfig")
    plain = {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in (asdict(sampling) | changes).items()
    }
    return from_values(SamplingConfig, plain, "sampling")
