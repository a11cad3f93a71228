"""Exported pipelines: folders in the manner of diffusers that need no run, no YAML and no Lightning.

model_index.json          what the folder is, and the sampler's settings
generator/{config.json, model.safetensors}        config.json also names the codes that it has learned
tokenizer/{config.json, model.safetensors}
text_encoder/config.json  which frozen networks encode captions; their weights are not copied
README.md                 model card; samples.png and ATTRIBUTION.md beside it where they are known
"""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from switti.config_values import from_values
from switti.errors import UserError
from switti.files import (
    kind_of,
    read_json_object,
    unique_temporary,
    write_json,
    writing,
)
from switti.models.transformer import ScaleTransformer
from switti.sampling.config import SamplingConfig
from switti.sampling.model_card import ATTRIBUTION, CARD, IMAGE, RunFacts, model_card
from switti.suggestions import printable
from switti.text.config import TextConfig
from switti.tokenizer.rqvae import CODES, RQVAE, check_codes
from switti.weights.hub import HUB_ID, fetch, is_hub_id
from switti.weights.load import load_generator, load_tokenizer
from switti.weights.published import GENERATORS, TOKENIZER
from switti.weights.read import CONFIG, INDEX, MAX_CONFIG_BYTES
from switti.weights.save import generator_state, write_weights

FORMAT = 1
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PATTERNS = (INDEX, CONFIG, "*/config.json", "*/model.safetensors", "model.safetensors", "pytorch_model.bin")

RELEASED_STOP = {10: 8, 14: 11}  # number of scales → first one without guidance


@dataclass
class Parts:
    """What a folder or a hub repository gives. details: step, source and the like, for people."""

    generator: ScaleTransformer
    tokenizer: RQVAE
    text: TextConfig
    sampling: SamplingConfig
    autocast: bool
    details: dict[str, Any] = field(default_factory=dict)


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder that becomes `target` on success and vanishes on failure.

    Several writers at once do not disturb each other: the first to finish wins. Raises UserError if `target` has
    content, before or after, and if it cannot be written.
    """
    check_new(target)
    temporary = unique_temporary(target.resolve())
    try:
        with writing(target):
            temporary.mkdir(parents=True)
            yield temporary
            check_new(target)
            os.replace(temporary, target)  # an empty folder in the way is replaced
    except OSError as error:  # another writer was first, after all
        if error.errno != errno.ENOTEMPTY:
            raise
        raise UserError(f"{target} exists already; choose another folder or remove it") from error
    except UserError as error:
        raise UserError(str(error).replace(str(temporary), str(target))) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new(target: Path) -> None:
    """UserError if there is anything but an empty folder; a link would be replaced, not followed."""
    if kind_of(target, follow=False) not in (None, "folder"):
        raise UserError(f"{target} exists already and is not a folder; choose another one")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already; choose another folder or remove it")


def write_parts(
    target: str | Path, parts: Parts, dtype: torch.dtype | None = None, facts: RunFacts | None = None
) -> None:
    """Write all parts and a model card; the folder appears complete or not at all.

    dtype: of the generator's weights on disk (None: as they are); crop frequencies and tokenizer stay float32. facts:
    of the run that trained the generator, for the card.
    """
    state = generator_state(parts.generator, dtype)
    with whole_folder(Path(target)) as folder:
        write_weights(folder / "generator" / "model.safetensors", state)
        codes = {CODES: parts.tokenizer.quantize.fingerprint()}
        write_json(folder / "generator" / CONFIG, asdict(parts.generator.config) | codes)
        write_weights(folder / "tokenizer" / "model.safetensors", parts.tokenizer.state_dict())
        write_json(folder / "tokenizer" / CONFIG, asdict(parts.tokenizer.config))
        write_json(folder / "text_encoder" / CONFIG, asdict(parts.text))
        index = {
            "_class_name": "SwittiPipeline",
            "format": FORMAT,
            "generator": ["switti", "ScaleTransformer"],
            "tokenizer": ["switti", "RQVAE"],
            "text_encoder": ["switti", parts.text.encoder],
            "sampling": asdict(parts.sampling),
            "dtype": str(state["pos_start"].dtype).removeprefix("torch."),
            "autocast": parts.autocast,
            "details": parts.details,
        }
        write_json(folder / INDEX, index)
        _write_card(folder, parts, facts or RunFacts())


def _write_card(folder: Path, parts: Parts, facts: RunFacts) -> None:
    settings = {
        "model": asdict(parts.generator.config),
        "tokenizer": asdict(parts.tokenizer.config),
        "text": asdict(parts.text),
        "sampling": asdict(parts.sampling),
    }
    card = model_card(parts.generator.config.visibility, settings, facts)
    (folder / CARD).write_text(card, encoding="utf-8")
    if facts.samples is not None:
        facts.samples.save(folder / IMAGE)
    if facts.attribution:
        (folder / ATTRIBUTION).write_text(facts.attribution, encoding="utf-8")


def read_parts(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    tokenizer: str | Path | None = None,
    revision: str | None = None,
) -> Parts:
    """The parts of an exported pipeline, or of published generator weights with what belongs to them.

    source: folder, file or hub id. dtype: of the generator's weights; None keeps an exported folder's own and is
    float32 for published ones. tokenizer: instead of the source's own or, for published weights, the released one;
    of an exported folder only one with the same codes.
    """
    path = fetch(source, _PATTERNS, revision)
    exported = path.is_dir() and kind_of(path / INDEX) is not None
    if not exported:
        generator = load_generator(
            source if str(source) in GENERATORS else path,
            dtype=dtype or torch.float32,
            device=device,
            revision=revision,
        )
        codes = load_tokenizer(
            tokenizer or TOKENIZER,
            scales=generator.config.scales,
            device=device,
            cached=tokenizer is None and not is_hub_id(source),
        )
        count = generator.pyramid.count
        # The released pipeline's settings: guidance 6 (4 in the first version), off at the last scales.
        sampling = SamplingConfig(guidance=6.0, guidance_stop=RELEASED_STOP.get(count), late_temperature=0.1)
        text = TextConfig(encoder="clip_pair", width=2048, pooled_width=1280, max_length=77)
        return Parts(generator, codes, text, sampling, False)
    index = read_json_object(path / INDEX, MAX_CONFIG_BYTES)
    if index.get("_class_name") != "SwittiPipeline" or "sampling" not in index:
        raise UserError(f"{path / INDEX} describes no SwittiPipeline")
    if index.get("format") != FORMAT:
        found = printable(index.get("format"))
        raise UserError(f"{path} has format {found}, this version reads {FORMAT}; update switti")
    text = _text_settings(path / "text_encoder" / CONFIG)
    sampling = from_values(SamplingConfig, index["sampling"], "sampling")
    generator = load_generator(
        path, dtype=dtype or DTYPES.get(str(index.get("dtype")), torch.float32), device=device
    )
    codes = load_tokenizer(tokenizer or path, scales=generator.config.scales, device=device)
    known = read_json_object(path / "generator" / CONFIG, MAX_CONFIG_BYTES)
    check_codes(known, codes, f"tokenizer={tokenizer or path}")
    details = index.get("details")
    return Parts(
        generator,
        codes,
        text,
        sampling,
        index.get("autocast") is True,
        details if isinstance(details, dict) else {},
    )


def _text_settings(path: Path) -> TextConfig:
    """The encoder that an exported folder names: one that ships, hub ids, or folders of this machine by whole paths.

    A path below the working folder means something else in every folder that a command is started in.
    """
    try:
        text = from_values(TextConfig, read_json_object(path, MAX_CONFIG_BYTES), "text")
        for name in ("clip_l", "big_g"):
            source = getattr(text, name)
            if not HUB_ID.fullmatch(source) and not (Path(source).is_absolute() and Path(source).is_dir()):
                raise UserError(
                    f"text.{name}={printable(source)} is neither a hub id nor the whole path of a folder"
                )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return text
