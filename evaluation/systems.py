"""Systems that are compared: runs, exported and published weights, diffusers' pipelines, images from elsewhere.

A system turns prompts and seeds into images. What it is, its weights included, stands in its `identity`: two systems
with equal identities give equal images.
"""

import hashlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from evaluation.image_shards import EncodedImage
from evaluation.prompt_sets import Prompt, PromptSet
from switti.errors import UserError
from switti.files import kind_of, read_bytes
from switti.import_path import FORM, is_import_path, load_object
from switti.suggestions import shortened

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

    from switti.sampling.pipeline import SwittiPipeline

FOLDER, DIFFUSERS = "folder:", "diffusers:"
# Endings of image files that are taken as they are.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MAX_IMAGE = 256 << 20
# Steps of the paper's Table 8, guidance of the models' own cards.
PUBLISHED_STEPS: dict[str, dict[str, Any]] = {
    "stabilityai/stable-diffusion-xl-base-1.0": {"num_inference_steps": 25},
    "stabilityai/sdxl-turbo": {"num_inference_steps": 4, "guidance_scale": 0.0},
    "tianweiy/DMD2": {"num_inference_steps": 4, "guidance_scale": 0.0},
    "stabilityai/stable-diffusion-3-medium-diffusers": {"num_inference_steps": 28},
}


class System(Protocol):
    """identity: JSON values that determine the images. settings: those of them that each image's JSON repeats."""

    name: str
    identity: dict[str, Any]
    settings: dict[str, Any]

    def generate(self, prompts: Sequence[Prompt]) -> list[EncodedImage]:
        """One image a prompt, which depends on the prompt and its seed alone."""


@runtime_checkable
class ImageGenerator(Protocol):
    """Form of a system of a user's own (`package.module:Name`), built without arguments."""

    # Version and settings, whatever determines the images.
    identity: dict[str, Any]

    def generate(self, texts: Sequence[str], seeds: Sequence[int]) -> "list[Image]": ...


def png(image: "Image") -> EncodedImage:
    """8-bit RGB, compressed fast."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=1)
    return EncodedImage(buffer.getvalue(), "png")


def open_system(source: str, settings: list[str], prompts: PromptSet, dtype: str | None = None) -> System:
    """The system that a command line names. Raises UserError if there is none, or a setting is not its own."""
    if source.startswith(FOLDER):
        _no_settings(source, settings)
        return ImageFolder(Path(source.removeprefix(FOLDER)).expanduser(), prompts)
    if source.startswith(DIFFUSERS):
        return DiffusersSystem(source.removeprefix(DIFFUSERS), settings, dtype or "float16")
    if is_import_path(source):
        _no_settings(source, settings)
        return OwnSystem(source)
    from configs.load_run import open_pipeline

    pipeline, _ = open_pipeline(Path(source), settings)
    return ScaleWiseSystem(source, pipeline)


def _no_settings(source: str, settings: list[str]) -> None:
    if settings:
        raise UserError(f"{settings[0]}: {source} takes no settings")


class ScaleWiseSystem:
    """A generator of this library."""

    def __init__(self, source: str, pipeline: "SwittiPipeline") -> None:
        self.name = Path(source).resolve().name if Path(source).exists() else source
        self.pipeline = pipeline
        self.settings = {"sampling": asdict(pipeline.sampling), "autocast": pipeline.autocast}
        self.identity = {
            "kind": "scale_wise",
            "weights": weights_digest(pipeline),
            "size": pipeline.tokenizer.config.resolution,
            **self.settings,
        }

    def generate(self, prompts: Sequence[Prompt]) -> list[EncodedImage]:
        images = self.pipeline(
            [prompt.text for prompt in prompts],
            seeds=[prompt.seed for prompt in prompts],
            batch_size=len(prompts),
        )
        return [png(image) for image in cast("list[Image]", images)]


def weights_digest(pipeline: "SwittiPipeline") -> str:
    """SHA-256 over names, types and bytes of all weights, and what the text encoder says of itself."""
    digest = hashlib.sha256()
    for part in (pipeline.generator, pipeline.tokenizer):
        _add_weights(digest, part)
    digest.update(pipeline.text_encoder.fingerprint.encode())
    return digest.hexdigest()


def _add_weights(digest: "hashlib._Hash", part: "nn.Module", prefix: str = "") -> None:
    import torch

    for name, tensor in sorted(part.state_dict().items()):
        digest.update(f"{prefix}{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


class OwnSystem:
    """A class of the user's own."""

    def __init__(self, source: str) -> None:
        named = load_object("SYSTEM", source)
        built = named() if callable(named) else named
        if not isinstance(built, ImageGenerator) or not isinstance(built.identity, dict):
            raise UserError(
                f"{source} is not a system: its class needs `identity` (a dict) and `generate(texts, seeds)`"
            )
        self.name = source.rpartition(":")[2]
        self.settings: dict[str, Any] = built.identity
        self.identity = {"kind": source, "identity": built.identity}
        self._generator = built

    def generate(self, prompts: Sequence[Prompt]) -> list[EncodedImage]:
        images = self._generator.generate([p.text for p in prompts], [p.seed for p in prompts])
        if len(images) != len(prompts):
            raise UserError(f"{self.name} returned {len(images)} images for {len(prompts)} prompts")
        return [png(image) for image in images]


class DiffusersSystem:
    """A text-to-image pipeline of diffusers, at its native size, with one CPU generator a prompt."""

    def __init__(self, source: str, settings: list[str], dtype: str) -> None:
        import torch

        try:
            from diffusers import AutoPipelineForText2Image
        except ImportError as error:
            raise UserError(
                f"{DIFFUSERS}{source} needs diffusers: pip install 'diffusers>=0.35,<1' (or -e '.[diffusion]')"
            ) from error
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # Half precision has no kernels for many of a CPU's operations.
        kind = torch.float32 if device == "cpu" else getattr(torch, dtype)
        self._call = PUBLISHED_STEPS.get(source, {}) | _typed(source, settings)
        try:
            pipeline = AutoPipelineForText2Image.from_pretrained(
                source, torch_dtype=kind, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"{DIFFUSERS}{source} cannot be loaded: {' '.join(str(error).split())}"
            ) from error
        pipeline.set_progress_bar_config(disable=True)
        self._pipeline = pipeline.to(device)
        self.name = source.rstrip("/").rpartition("/")[2]
        self.settings = {"dtype": str(kind)[6:], **self._call}
        self.identity = {
            "kind": "diffusers",
            "source": source,
            "class": type(pipeline).__name__,
            "weights": self._digest(),
            **self.settings,
        }

    def _digest(self) -> str:
        import torch

        digest = hashlib.sha256()
        for part, module in sorted(self._pipeline.components.items()):
            if not isinstance(module, torch.nn.Module):
                digest.update(f"{part} {type(module).__name__}\n".encode())
                continue
            _add_weights(digest, module, f"{part}.")
        return digest.hexdigest()

    def generate(self, prompts: Sequence[Prompt]) -> list[EncodedImage]:
        import torch

        sources = [torch.Generator("cpu").manual_seed(prompt.seed) for prompt in prompts]
        result = self._pipeline(
            prompt=[prompt.text for prompt in prompts], generator=sources, output_type="pil", **self._call
        )
        return [png(image) for image in result.images]


# Arguments of a pipeline's call that may be given as key=value.
_CALL = {"num_inference_steps": int, "guidance_scale": float, "height": int, "width": int}


def _typed(source: str, settings: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in _CALL:
            raise UserError(f"{setting}: {DIFFUSERS}{source} takes {', '.join(_CALL)}")
        try:
            values[name] = _CALL[name](text)
        except ValueError:
            raise UserError(
                f"{setting} is not {'an integer' if _CALL[name] is int else 'a number'}"
            ) from None
    return values


class ImageFolder:
    """Images from elsewhere, one file for each prompt and ordinal.

    Names: `000012-01.png` (index, ordinal), `000012.png` or `12.png` (index, one image a prompt), or GenEval's layout
    `00012/samples/0001.png`. Bytes are kept as they are.
    """

    def __init__(self, folder: Path, prompts: PromptSet) -> None:
        if kind_of(folder) != "folder":
            raise UserError(f"{FOLDER}{folder}: there is no such folder")
        self.name = folder.resolve().name
        self._files = _numbered_files(folder)
        absent = [
            (p.index, p.ordinal)
            for p in map(prompts.__getitem__, range(len(prompts)))
            if (p.index, p.ordinal) not in self._files
        ]
        if absent:
            some = ", ".join(f"{index:06d}-{ordinal:02d}" for index, ordinal in absent[:3])
            raise UserError(
                f"{FOLDER}{folder} has images for {len(prompts) - len(absent)} of {len(prompts)} "
                f"({prompts.name}); missing: {some}{' …' if len(absent) > 3 else ''}"
            )
        self.settings: dict[str, Any] = {}
        listing = hashlib.sha256()
        for (index, ordinal), path in sorted(self._files.items()):
            listing.update(f"{index} {ordinal} {path.name} {path.stat().st_size}\n".encode())
        self.identity = {"kind": "folder", "files": listing.hexdigest()}

    def generate(self, prompts: Sequence[Prompt]) -> list[EncodedImage]:
        encoded = []
        for prompt in prompts:
            path = self._files[prompt.index, prompt.ordinal]
            try:
                content = read_bytes(path, MAX_IMAGE)
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror}") from error
            suffix = path.suffix.lower().removeprefix(".")
            encoded.append(EncodedImage(content, "jpg" if suffix == "jpeg" else suffix))
        return encoded


_FLAT = re.compile(r"(\d+)(?:-(\d+))?")


def _numbered_files(folder: Path) -> dict[tuple[int, int], Path]:
    files: dict[tuple[int, int], Path] = {}
    for entry in os.scandir(folder):
        path = Path(entry.path)
        if path.suffix.lower() in IMAGE_SUFFIXES and (match := _FLAT.fullmatch(path.stem)):
            _put(files, (int(match[1]), int(match[2] or 0)), path)
        elif entry.name.isdigit() and entry.is_dir() and (path / "samples").is_dir():
            for sample in sorted((path / "samples").iterdir()):
                if sample.suffix.lower() in IMAGE_SUFFIXES and sample.stem.isdigit():
                    _put(files, (int(entry.name), int(sample.stem)), sample)
    if not files:
        raise UserError(
            f"{FOLDER}{folder} holds no image named by its number (000012-01.png, 000012.png or 00012/samples/0001.png)"
        )
    return files


def _put(files: dict[tuple[int, int], Path], place: tuple[int, int], path: Path) -> None:
    if place in files:
        raise UserError(f"{files[place]} and {path} are both image {place[0]}-{place[1]}; keep one")
    files[place] = path


def describe_sources() -> str:
    """For help texts and errors."""
    return f"a run, checkpoint, exported folder or hub id, {DIFFUSERS}ID|PATH, {FOLDER}PATH, or {FORM}"


def check_source(source: str) -> None:
    """UserError for a text that cannot name a system."""
    if not source.strip() or "\n" in source:
        raise UserError(f"SYSTEM {shortened(source)!r} is not {describe_sources()}")
