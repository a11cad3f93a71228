"""Preflight check of what a study's runs need: shards, embeddings, tokenizer, initial weights, code of the user's own.

Reads manifests, file sizes and headers: no torch, no network, and nothing that grows with the size of the data but a
look at each shard's entry in its folder. Code is imported only where the settings name it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from configs.extensions import check_extensions
from configs.loading import from_run
from configs.schema import RunConfig
from sweeps.preflight_data import data_problems, problems_of
from sweeps.study import StudyRun
from switti.errors import UserError
from switti.files import kind_of, open_regular
from switti.models.config import FREE_FIELDS, GeneratorConfig
from switti.run_folder import CHECKPOINTS, CONFIG
from switti.weights.hub import is_hub_id
from switti.weights.tokenizer_file import EMBEDDED, check_settings, read_header, weights_path

_CODES = "quantize.embedding.weight"
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
# Runs in one message.
_NAMED = 3


def check_files(runs: Sequence[StudyRun]) -> None:
    """Raise UserError with everything that is missing, each once, with the names of the runs that need it."""
    missing: dict[str, list[str]] = {}
    known: dict[str, list[str]] = {}
    for run in runs:
        for find, settings in _CHECKS:
            key = repr((find.__name__, *(_setting(run.config, name) for name in settings)))
            if key not in known:
                known[key] = find(run.config)
            for problem in known[key]:
                missing.setdefault(problem, []).append(run.name)
    if not missing:
        return
    lines = [f"{problem} ({_runs(names, len(runs))})" for problem, names in missing.items()]
    if len(lines) == 1:
        raise UserError(lines[0])
    raise UserError(
        f"{len(lines)} things are missing or do not fit:\n" + "\n".join(f"  {line}" for line in lines)
    )


def _setting(config: RunConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def _runs(names: list[str], total: int) -> str:
    if len(names) == total:
        return "all runs" if total > 1 else f"run {names[0]}"
    shown = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    return f"{'run' if len(names) == 1 else 'runs'} {shown}"


# ---- weights ------------------------------------------------------------------------------------------------------


def _tokenizer(config: RunConfig) -> list[str]:
    """The frozen tokenizer of generators and of decoder tuning."""
    weights = config.tokenizer_weights
    if config.task == "tokenizer":
        return []
    if not weights:
        return ["tokenizer_weights is not set; give a file, or embedded:demo for the one that ships"]
    setting = f"tokenizer_weights={weights}"
    try:
        path = weights_path(weights)
    except UserError as error:
        return [f"tokenizer_weights: {error}"]
    if kind_of(path) is None:
        return [] if _on_a_hub(weights) else [f"{setting}: no such file or folder"]
    if path.is_dir():
        inside = (folder / name for folder in (path / "tokenizer", path) for name in _WEIGHT_FILES)
        present = next((file for file in inside if file.is_file()), None)
        if present is None:
            own = path / "tokenizer.safetensors"
            remedy = f"give {own}" if own.is_file() else "give a weights file"
            return [f"{setting}: the folder holds none of {', '.join(_WEIGHT_FILES)}; {remedy}"]
        path = present
    return [f"{setting}: {problem}" for problem in problems_of(lambda: _check_tokenizer(config, path))]


def _check_tokenizer(config: RunConfig, path: Path) -> None:
    if path.suffix != ".safetensors":
        # Only torch can read its content.
        open_regular(path).close()
        return
    settings, shapes = read_header(path)
    check_settings(config.tokenizer, settings, path, other_scales=config.task == "decoder")
    codes = next((shape for name, shape in shapes.items() if name.endswith(_CODES)), None)
    ours = (config.tokenizer.codebook_size, config.tokenizer.code_width)
    if codes is None:
        raise UserError(f"{path} holds no tokenizer (no {_CODES})")
    if codes != ours:
        raise UserError(
            f"its codebook has {codes[0]} codes of {codes[-1]} channels, but tokenizer.codebook_size={ours[0]} and "
            f"tokenizer.code_width={ours[1]}"
        )


def _first_weights(config: RunConfig) -> list[str]:
    """What `init_from` names, for a run that begins."""
    source = config.init_from
    if not source or _has_checkpoint(config.run_dir):
        return []
    if config.task != "generator":
        return [f"init_from={source} is for generators; a {config.task} run starts from scratch"]
    path = Path(source).expanduser()
    if kind_of(path) is None:
        return [] if _on_a_hub(source) else [f"init_from={source}: no such run, file or folder"]
    above = path if path.is_dir() and (path / CONFIG).is_file() else path.parent.parent
    if (above / CONFIG).is_file():
        return [
            f"init_from={source}: {problem}" for problem in problems_of(lambda: _check_first(config, above))
        ]
    inside = ("config.json", "model_index.json", *_WEIGHT_FILES)
    if path.is_dir() and not any((path / name).is_file() for name in inside):
        return [f"init_from={source}: the folder is not a run and holds none of {', '.join(inside)}"]
    return []


def _check_first(config: RunConfig, folder: Path) -> None:
    before = from_run(folder)
    if before.task != "generator":
        raise UserError(f"it is a {before.task} run; model.* starts from generator runs")
    if not _has_checkpoint(folder):
        raise UserError("the run has no checkpoint yet")
    names = [name for name in GeneratorConfig.__dataclass_fields__ if name not in FREE_FIELDS]
    differing = [
        f"model.{name}={mine} (it has {theirs})"
        for name in names
        if (mine := getattr(config.model, name)) != (theirs := getattr(before.model, name))
    ]
    if differing:
        raise UserError(f"it was trained with other settings than {', '.join(differing)}")


def _has_checkpoint(folder: Path) -> bool:
    return any((folder / CHECKPOINTS).glob("*.ckpt"))


def _on_a_hub(source: str) -> bool:
    """Whether a name that is not a path can only mean a repository of a hub."""
    if source.startswith(EMBEDDED) or source.endswith(_WEIGHT_SUFFIXES):
        return False
    return is_hub_id(source) and not Path(source).parent.is_dir()


# Each check with the settings that it depends on.
def _extensions(config: RunConfig) -> list[str]:
    """The user's own code that the settings name; nothing is imported for a run without any."""
    return problems_of(lambda: check_extensions(config))


_CHECKS: tuple[tuple[Callable[[RunConfig], list[str]], tuple[str, ...]], ...] = (
    (data_problems, ("task", "data", "text")),
    (_tokenizer, ("task", "tokenizer_weights", "tokenizer")),
    (_first_weights, ("task", "init_from", "model", "run_dir")),
    (
        _extensions,
        ("task", "trainer.loggers", "callbacks.extra", "metrics.extra", "text.encoder", "data.source"),
    ),
)
