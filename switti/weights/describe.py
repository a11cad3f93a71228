"""Describe, the second of the four steps of loading: whose weights these are and which settings they imply.

Weights may be ours or published ones. Published generators carry two buffers that can be recomputed: they are checked
against each other, name the pyramid and the variant, and are dropped.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from switti.errors import UserError
from switti.models.config import GeneratorConfig
from switti.scales import MAX_SCALES, PYRAMIDS, Pyramid
from switti.suggestions import printable
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import CODES
from switti.weights.published import HEAD_WIDTH, LEVELS, MASK, Visibility, visible_keys
from switti.weights.read import CONFIG, Contents

Config = TypeVar("Config", GeneratorConfig, RQVAEConfig)


@dataclass(frozen=True)
class GeneratorDescription:
    """state: weights under our keys. implied: fields of GeneratorConfig that shapes and buffers show.

    masked: the variant that the mask shows, None without one.
    """

    contents: Contents
    state: dict[str, Tensor]
    implied: dict[str, Any]
    masked: Visibility | None

    @cached_property
    def stated(self) -> dict[str, Any]:
        """Fields of GeneratorConfig in the file's metadata and in the config.json beside it."""
        return config_fields(self.contents.stored, GeneratorConfig, self.contents.source)

    @property
    def defaults(self) -> dict[str, Any]:
        """What is assumed, or known of a release, where neither shapes nor settings say it."""
        known: dict[str, Any] = {"heads": max(1, self.implied["width"] // HEAD_WIDTH)}
        if (release := self.contents.release) is not None:
            known |= {"scales": PYRAMIDS[release.resolution], "visibility": release.visibility}
        return known

    @property
    def codes(self) -> dict[str, Any]:
        """What `check_codes` asks of an exported generator; {} for any other source."""
        stored = self.contents.stored
        return {CODES: stored[CODES]} if self.contents.release is None and CODES in stored else {}


@dataclass(frozen=True)
class TokenizerDescription:
    """implied: fields of RQVAEConfig that shapes show."""

    contents: Contents
    implied: dict[str, Any]

    @cached_property
    def stated(self) -> dict[str, Any]:
        """Fields of RQVAEConfig in the file's metadata and in the config.json beside it."""
        return config_fields(self.contents.stored, RQVAEConfig, self.contents.source)


def describe_generator(contents: Contents) -> GeneratorDescription:
    """Raises UserError if these weights are not a scale transformer's, or if a buffer contradicts its pyramid."""
    state, source = contents.tensors, contents.source
    implied = generator_fields(state, source)
    scales: list[int] | None = implied.get("scales")
    visibility = None
    if MASK in state:
        if scales is None:
            raise UserError(f"{source} holds {MASK} without {LEVELS}, which says what it masks")
        visibility = _read_mask(state[MASK], Pyramid(tuple(scales)), source)
    ours = {key: value for key, value in state.items() if key not in (LEVELS, MASK)}
    return GeneratorDescription(contents, ours, implied, visibility)


def describe_tokenizer(contents: Contents) -> TokenizerDescription:
    """Raises UserError if these weights are not an RQ-VAE's."""
    return TokenizerDescription(contents, tokenizer_fields(contents.tensors, contents.source))


# ---- settings in the shapes -------------------------------------------------------------------------------------


def generator_fields(state: Mapping[str, Tensor], source: str = "these weights") -> dict[str, Any]:
    """Fields of GeneratorConfig that the weights themselves show. `scales` needs the buffer `lvl_1L`.

    What they cannot show: visibility, heads, head_precision, query_key_norm, rope_theta, rope_size and crop_base.
    """
    needed = ["word_embed.weight", "text_pooler.weight", "head.weight", "blocks.0.cross_attn.to_kv.weight"]
    _check_matrices(state, needed, "a scale transformer", source)
    width, code_width = state["word_embed.weight"].shape[:2]
    implied = {
        "depth": _count(state, "blocks", "cross_attn.to_kv.weight"),
        "width": width,
        "code_width": code_width,
        "codebook_size": state["head.weight"].shape[0],
        "pooled_width": state["text_pooler.weight"].shape[1],
        "text_width": state["blocks.0.cross_attn.to_kv.weight"].shape[1],
        "crop_condition": "crop_proj.weight" in state,
        "rope": "pos_1LC" not in state,
        "ffn": "swiglu" if "blocks.0.ffn.gate_proj.weight" in state else "gelu",
        "norms": "sandwich" if "blocks.0.self_attention_norm2.weight" in state else "pre",
    }
    return implied | ({"scales": _read_levels(state[LEVELS], source)} if LEVELS in state else {})


def tokenizer_fields(state: Mapping[str, Tensor], source: str = "these weights") -> dict[str, Any]:
    """Fields of RQVAEConfig that the weights themselves show: all but scales, phi_ratio and commitment."""
    needed = ["quantize.embedding.weight", "encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight"]
    _check_matrices(state, needed, "an RQ-VAE", source)
    codebook_size, code_width = state["quantize.embedding.weight"].shape[:2]
    channels = state["encoder.conv_in.weight"].shape[0]
    levels = _count(state, "encoder.down", "block.0.conv1.weight")
    return {
        "codebook_size": codebook_size,
        "code_width": code_width,
        "channels": channels,
        "multipliers": [
            state[f"encoder.down.{i}.block.0.conv1.weight"].shape[:1].numel() // channels
            for i in range(levels)
        ],
        "patch_size": math.isqrt(state["encoder.conv_in.weight"].shape[1] // 3),
        "linear_shortcut": "encoder.shortcut.weight" in state,
        "residual_blocks": _count(state, "encoder.down.0.block", "conv1.weight"),
        "phi_count": _count(state, "quantize.quant_resi.qresi_ls", "weight"),
    }


def _check_matrices(state: Mapping[str, Tensor], needed: Sequence[str], kind: str, source: str) -> None:
    """UserError unless weights hold these matrices (or, of a tokenizer, convolutions)."""
    missing = [key for key in needed if key not in state]
    if missing:
        raise UserError(f"{source} is not {kind}: {', '.join(missing)} missing")
    for key in needed:
        if state[key].ndim not in (2, 4) or not state[key].numel():
            raise UserError(f"{source} is not {kind}: {key} is {list(state[key].shape)}")


def _count(state: Mapping[str, Tensor], prefix: str, suffix: str) -> int:
    """Number of consecutive keys <prefix>.0.<suffix>, <prefix>.1.<suffix>, …"""
    return next(i for i in range(len(state) + 1) if f"{prefix}.{i}.{suffix}" not in state)


# ---- settings in the published buffers --------------------------------------------------------------------------


def _read_levels(levels_1L: Tensor, source: str) -> list[int]:
    """The pyramid's scales."""
    levels_L = levels_1L.flatten().long()
    if levels_L.numel() == 0 or not 0 <= int(levels_L.min()) <= int(levels_L.max()) < MAX_SCALES:
        raise UserError(f"{source}: {LEVELS} is not a pyramid of square token maps")
    scales = [math.isqrt(size) for size in levels_L.bincount().tolist()]
    if (
        0 in scales
        or scales != sorted(set(scales))
        or not torch.equal(levels_L, Pyramid(tuple(scales)).levels())
    ):
        raise UserError(f"{source}: {LEVELS} is not a pyramid of square token maps")
    return scales


def _read_mask(mask_11LL: Tensor, pyramid: Pyramid, source: str) -> Visibility | None:
    """The variant that a mask belongs to; None if it could be either (a pyramid of one scale)."""
    if tuple(mask_11LL.shape) != (1, 1, pyramid.length, pyramid.length):
        raise UserError(f"{source}: {MASK} is {list(mask_11LL.shape)}, {LEVELS} has {pyramid.length} tokens")
    mask_LL = mask_11LL[0, 0]
    open_LL = mask_LL == 0
    if not bool((open_LL | (mask_LL == -torch.inf)).all()):
        raise UserError(f"{source}: {MASK} holds other values than 0 and -inf")
    variants: tuple[Visibility, ...] = ("causal", "non_causal")
    fitting = [variant for variant in variants if torch.equal(open_LL, visible_keys(pyramid, variant))]
    if not fitting:
        raise UserError(f"{source}: {MASK} is neither causal nor non-causal for scales {list(pyramid.sides)}")
    return fitting[0] if len(fitting) == 1 else None


# ---- settings stored beside the weights -------------------------------------------------------------------------


def config_fields(content: Mapping[str, Any], kind: type[Config], source: str) -> dict[str, Any]:
    """Fields of a config class from our config.json or a published one; names that neither has are ignored."""
    names = {item.name for item in fields(kind)}
    stated = {key: value for key, value in content.items() if key in names}
    resolution = content.get("reso")
    if resolution is not None:
        if not isinstance(resolution, int) or resolution not in PYRAMIDS:
            raise UserError(
                f"{source}: reso={printable(resolution)} in {CONFIG} is not one of "
                f"{', '.join(map(str, PYRAMIDS))}"
            )
        stated["scales"] = PYRAMIDS[resolution]
    if kind is GeneratorConfig:
        if isinstance(stated.get("depth"), int) and "width" not in stated:
            stated |= {"width": HEAD_WIDTH * stated["depth"], "heads": stated["depth"]}
        for theirs, ours, meaning in (
            ("use_ar", "visibility", ("non_causal", "causal")),
            ("use_swiglu_ffn", "ffn", ("gelu", "swiglu")),
            ("use_crop_cond", "crop_condition", (False, True)),
        ):
            if theirs in content:
                if not isinstance(content[theirs], bool):
                    raise UserError(
                        f"{source}: {theirs}={printable(content[theirs])} in {CONFIG} must be true or false"
                    )
                stated[ours] = meaning[content[theirs]]
    return stated


# ---- checkpoints of runs ----------------------------------------------------------------------------------------

# Of the checkpoint's entries: the type, and that of each item of a list.
_FORM: dict[str, tuple[type, type | None]] = {
    "pytorch-lightning_version": (str, None), "epoch": (int, None), "global_step": (int, None), "loops": (dict, None),
    "callbacks": (dict, None), "optimizer_states": (list, dict), "lr_schedulers": (list, dict), "random": (list, dict),
    "ShardDataModule": (dict, None), "tokenizer_codes": (str, None),
}  # fmt: skip
_NEEDED = ("pytorch-lightning_version", "global_step")


def check_run(checkpoint: Mapping[str, Any], path: Path) -> None:
    """UserError if the entries that a run resumes from, beside its weights, do not have the form that runs write."""
    for name, (kind, items) in _FORM.items():
        if name not in checkpoint and name not in _NEEDED:
            continue
        value: Any = checkpoint.get(name)
        valid = type(value) is kind
        if isinstance(value, list):
            valid = valid and all(type(item) is items for item in value)
        if not valid or (kind is int and value < 0):
            actual = printable(value) if kind in (int, str) else type(value).__name__
            raise UserError(f"{path} is not a checkpoint of a run: its {name} is {actual}")
