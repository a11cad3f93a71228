"""Generation of images by numbered units: folder, manifest, what is missing, and the unit function."""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evaluation.image_shards import EncodedImage, stamp_of, write_unit
from evaluation.numbered_work import Make, Work
from evaluation.prompt_sets import Prompt, PromptSet
from evaluation.systems import System
from switti.errors import UserError
from switti.files import kind_of, read_json_object, write_json

MANIFEST, PROMPTS = "manifest.json", "prompts.json"
STEM = "images"
# Images of a unit: what a killed worker has to make again, at most.
UNIT = 256
_FORMAT = 1


def manifest_of(system: System, prompts: PromptSet, batch: int) -> dict[str, Any]:
    """What determines the bytes of a folder of generated images."""
    content = {
        "format": _FORMAT,
        "system": system.identity,
        "prompts": {
            "name": prompts.name,
            "count": len(prompts.texts),
            "images_per_prompt": prompts.images,
            "digest": prompts.digest,
        },
        "unit": UNIT,
        "batch": batch,
    }
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return content | {"name": system.name, "digest": hashlib.sha256(text.encode()).hexdigest()}


def publish_manifest(folder: Path, manifest: dict[str, Any], prompts: PromptSet) -> None:
    """Write what the folder holds, or compare it with what is there.

    Raises:
        UserError: the folder holds images of another system, other prompts or other settings.
    """
    before = read_manifest(folder)
    if before is None:
        rows = [
            {"prompt": text, **details}
            for text, details in zip(
                prompts.texts, prompts.details or ({},) * len(prompts.texts), strict=True
            )
        ]
        write_json(folder / PROMPTS, rows)
        write_json(folder / MANIFEST, manifest)
        return
    if before["digest"] == manifest["digest"]:
        return
    changed = _differences(before, manifest)
    raise UserError(f"{folder} holds other images ({'; '.join(changed[:3])}); give another --out")


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    old, new = _flat(before), _flat(now)
    names = [name for name in {**old, **new} if name.startswith(("system", "prompts", "unit", "batch"))]
    return [
        f"{name} was {_short(old.get(name))}, now {_short(new.get(name))}"
        for name in names
        if old.get(name) != new.get(name)
    ]


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{name}.{key}" if name else key)
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text[:40]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a folder of generated images holds; None if there is no manifest.

    Raises:
        UserError: it is not a manifest of generated images.
    """
    path = folder / MANIFEST
    if kind_of(path) is None:
        return None
    content = read_json_object(path)
    prompts = content.get("prompts")
    valid = isinstance(prompts, dict) and isinstance(content.get("digest"), str)
    counts = [] if not isinstance(prompts, dict) else [prompts.get("count"), prompts.get("images_per_prompt")]
    counts.append(content.get("unit"))
    if not valid or not all(type(count) is int and count > 0 for count in counts):
        raise UserError(f"{path} is not a manifest of generated images; give another folder")
    return content


def work_of(folder: Path, manifest: dict[str, Any]) -> Work:
    """The units of a folder of generated images."""
    total = manifest["prompts"]["count"] * manifest["prompts"]["images_per_prompt"]
    return Work(folder, STEM, ".tar", unit_sizes(total, manifest["unit"]), manifest["digest"], stamp_of)


def unit_sizes(total: int, unit: int) -> tuple[int, ...]:
    """Items of each unit; the last one may be smaller."""
    return tuple(min(unit, total - start) for start in range(0, total, unit))


def maker(system: System, prompts: PromptSet, work: Work, batch: int) -> Make:
    """The unit function: images of a unit, `batch` at a time, as a shard."""

    def make(unit: int, path: Path, advance: Callable[[int], None]) -> None:
        first = unit * UNIT

        def images() -> Iterator[tuple[Prompt, EncodedImage]]:
            for start in range(first, first + work.sizes[unit], batch):
                stop = min(start + batch, first + work.sizes[unit])
                part = [prompts[number] for number in range(start, stop)]
                yield from zip(part, system.generate(part), strict=True)

        write_unit(path, work.digest, unit, images(), system.settings, advance)

    return make
