"""The paper's text encoders: CLIP ViT-L/14 and OpenCLIP ViT-bigG/14, through transformers.

Shape suffixes: B captions, T token positions, C = channels of both networks together (768 + 1280 = 2048).

Two conventions decide the values, and both are those of the published weights. Token states are
`last_hidden_state`, that is after each network's final layer norm (not `hidden_states[-1]`, which in CLIP is before
it). The pooled state is the bigG network's final state at the end token, after that norm and before the text
projection (transformers' `pooler_output`); both are 1280 wide, so a mix-up would go unnoticed.
"""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from switti.errors import UserError, first_line
from switti.text.base import TextEmbedding, fingerprint_of, word_pieces
from switti.text.config import CLIP_POSITIONS
from switti.text.quiet import quiet_transformers
from switti.weights.transformers_folder import check_folder

STATES = "last_hidden_state"
POOLED = "pooler_output"
_BATCH = 32


def load_clip_text(source: str, setting: str, cached: bool = False) -> tuple[Any, nn.Module]:
    """(tokenizer, text network in float32) from a hub id or a local folder that holds both.

    cached: no network is asked for a hub id.
    Raises UserError that names `setting`, the source and the remedy.
    """
    from transformers import CLIPTextModel, CLIPTokenizer

    local = Path(source).expanduser()
    if source.startswith((".", "/", "~")) and not local.is_dir():
        raise UserError(
            f"{setting}={source}: no such folder; give a folder in transformers format or a hub id"
        )
    if cached and not local.is_dir():
        local = _downloaded(source, setting)
    if local.is_dir():
        check_folder(local, f"{setting}={source}")
    place = str(local) if local.is_dir() else source
    options: dict[str, Any] = {"local_files_only": local.is_dir()}
    try:
        tokenizer = CLIPTokenizer.from_pretrained(place, **options)
        # The vision part of a full CLIP would be reported as unexpected.
        with quiet_transformers():
            loaded: Any = CLIPTextModel.from_pretrained(
                place, **options, output_loading_info=True, dtype=torch.float32
            )
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(
            f"{setting}={source} cannot be loaded ({reason}); give a local folder with config.json, "
            "model.safetensors and tokenizer files, or download it on a machine with network: hf download <id>"
        ) from error
    model, info = loaded
    if info["missing_keys"]:
        raise UserError(f"{setting}={source} lacks text weights such as {sorted(info['missing_keys'])[0]}")
    return tokenizer, model.eval().requires_grad_(False)


def _downloaded(source: str, setting: str) -> Path:
    """The folder of a hub id in the cache, looked up without the request that the hub's own loader makes first."""
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(source, "config.json")
    if not isinstance(cached, str):
        raise UserError(
            f"{setting}={source} has not been downloaded, and a local folder makes no network "
            f"requests; run hf download {source}"
        )
    return Path(cached).parent


def state_digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of a network's state: the same for sharded, single or pickled files."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class ClipPairEncoder:
    """Last hidden states of both networks joined on channels; pooled state of the second (module docstring)."""

    name = "clip_pair"

    def __init__(
        self,
        clip_l: str,
        big_g: str,
        max_length: int = CLIP_POSITIONS,
        device: torch.device | str = "cpu",
        cached: bool = False,
    ) -> None:
        self.max_length = max_length
        self.device = torch.device(device)
        self.truncated = 0
        pairs = [
            load_clip_text(clip_l, "text.clip_l", cached),
            load_clip_text(big_g, "text.big_g", cached),
        ]
        self.tokenizers = [tokenizer for tokenizer, _ in pairs]
        self.models: list[Any] = [model.to(self.device) for _, model in pairs]
        self.width = sum(model.config.hidden_size for model in self.models)
        self.pooled_width: int = self.models[1].config.hidden_size

    def check_widths(self, width: int, pooled_width: int) -> None:
        """UserError if the settings do not fit the networks that were loaded."""
        for setting, given, actual in (
            ("text.width", width, self.width),
            ("text.pooled_width", pooled_width, self.pooled_width),
        ):
            if given != actual:
                raise UserError(f"{setting}={given} does not fit the loaded networks; set it to {actual}")

    @cached_property
    def fingerprint(self) -> str:
        settings: dict[str, object] = {"max_length": self.max_length, "states": STATES, "pooled": POOLED}
        return fingerprint_of(self.name, [state_digest(model) for model in self.models], settings)

    def to(self, device: torch.device | str) -> Self:
        self.device = torch.device(device)
        self.models = [model.to(self.device) for model in self.models]
        return self

    def pieces(self, caption: str) -> list[str]:
        """The word pieces of one caption, with the start and end tokens. Both tokenizers cut words alike."""
        return word_pieces(self.tokenizers[1], caption, self.max_length)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> TextEmbedding:
        """B captions → tokens [B, T, C], mask [B, T], pooled [B, P], with T = max_length.

        The mask is that of the second tokenizer; both cut words alike. The empty caption has two real tokens.
        """
        if not captions:
            empty = torch.zeros(0, self.max_length, self.width, device=self.device)
            return TextEmbedding(empty, empty[..., 0].bool(), empty[:, 0, : self.pooled_width])
        starts = range(0, len(captions), _BATCH)
        return TextEmbedding.concatenate([self._encode(captions[start : start + _BATCH]) for start in starts])

    def _encode(self, captions: list[str]) -> TextEmbedding:
        lengths = [
            len(ids) for ids in self.tokenizers[1](captions, truncation=False, verbose=False)["input_ids"]
        ]
        self.truncated += sum(length > self.max_length for length in lengths)
        states = []
        for tokenizer, model in zip(self.tokenizers, self.models, strict=True):
            batch = tokenizer(
                captions,
                padding="max_length",
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            ).to(self.device)
            output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            states.append(getattr(output, STATES).float())
        return TextEmbedding(
            torch.cat(states, dim=-1), batch["attention_mask"].bool(), getattr(output, POOLED).float()
        )
