"""python -m experiments.evaluate STUDY|RUN|CHECKPOINT … [--images N] [--stopped-early] [key=value …]
python -m experiments.evaluate FOLDER|HUB-ID … --data SHARDS [--out DIR] [--images N] [key=value …]
python -m experiments.evaluate IMAGES … --metrics NAME,… [--reference FILE.npz …] [--out DIR] [metrics.key=value …]

Measures generators: the metrics of a run's `metrics` settings on N generated images (default metrics.prompts), and
the time of each scale with guidance as configured and stopped two scales early. Prints a table. Of runs it writes
evaluation.json into each run's folder, where experiments.compare finds it. Exported folders and published weights stay
as they are: their result goes to evaluation/NAME.json (or DIR/NAME.json); captions and images are those of SHARDS.

Generators that are given together are timed in turn, round by round, so that their times can be compared on a machine
that does other work as well; all of them are in memory at once. --stopped-early takes the metrics a second time, on the
same captions and noise with guidance stopped two scales early.

IMAGES are folders of experiments.generate, complete and of the same prompts. Every metric is computed image by image
and kept (IMAGES/scores/*.parquet, IMAGES/features), so that a further metric needs no image again; several processes
share the work as they do for experiments.generate. The table has 95 % intervals by a bootstrap over prompts and, from
the second folder on, paired differences to the first; --out DIR also writes it as Markdown and LaTeX. FID and KID need
--reference files of experiments.reference_stats.

    python -m experiments.evaluate images/causal images/non_causal --metrics mini_clip_score,clip_score --out table
"""

import argparse
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from experiments.cli import argument_parser, run
from reports.data.runs import find_runs
from switti.errors import UserError
from switti.files import check_output_folder, check_target, write_json
from switti.run_folder import CONFIG, EVALUATION
from switti.weights.hub import is_hub_id

if TYPE_CHECKING:
    from torch import Tensor

    from datamodules.datamodule import ShardDataModule
    from switti.metrics.config import MetricsConfig
    from switti.sampling.config import SamplingConfig
    from switti.sampling.pipeline import SwittiPipeline

TIMED_BATCH = 8
INDEX, WEIGHTS_CONFIG = "model_index.json", "config.json"  # of an exported folder and of published weights
# Scales; the paper stops guidance before the last two (Section 3.5).
EARLY = 2
_SETTING = re.compile(r"[\w.]+=.*")


@dataclass
class System:
    """A generator that is measured. result: file of the results. data: where captions and images are from."""

    name: str
    result: Path
    pipeline: "SwittiPipeline"
    metrics: "MetricsConfig"
    data: "ShardDataModule"
    step: int | None

    @property
    def early(self) -> "SamplingConfig":
        """Its sampling with guidance stopped early (or as early as it is configured to stop)."""
        stop = max(0, self.pipeline.generator.pyramid.count - EARLY)
        configured = self.pipeline.sampling.guidance_stop
        return replace(
            self.pipeline.sampling, guidance_stop=stop if configured is None else min(stop, configured)
        )


def main(argv: list[str]) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "words",
        nargs="+",
        metavar="STUDY|RUN|CHECKPOINT|FOLDER|HUB-ID|key=value",
        help="generators, and settings of the sampler",
    )
    parser.add_argument("--images", type=int, help="number of captions to generate (metrics.prompts)")
    parser.add_argument(
        "--stopped-early", action="store_true", help="metrics with guidance stopped early, too"
    )
    parser.add_argument(
        "--data", nargs="+", help="shards, or a folder of them, for exported folders and published weights"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the results (runs: their own; images: their own, and the table here)",
    )
    parser.add_argument("--metrics", metavar="NAME,…", help="of generated images")
    parser.add_argument(
        "--reference", type=Path, nargs="+", default=[], metavar="FILE.npz", help="statistics of real images"
    )
    options = parser.parse_intermixed_args(argv)
    if folders := image_folders(options.words):
        return evaluate_images(folders, options)
    for name in ("metrics", "reference"):
        if getattr(options, name):
            raise UserError(f"--{name} is for folders of generated images (experiments.generate)")
    if options.images is not None and options.images < 2:
        raise UserError(f"--images {options.images} must be at least 2")
    targets, settings = split_words(options.words)
    results = result_files(targets, options.data, options.out)
    for file in results:
        check_output_folder(file.parent)
        check_target(file)

    systems = [
        open_system(target, settings, options.data, result)
        for target, result in zip(targets, results, strict=True)
    ]
    measured = [measure(system, options.images, options.stopped_early) for system in systems]
    for result, timings in zip(measured, time_systems(systems), strict=True):
        result |= timings
    for system, result in zip(systems, measured, strict=True):
        write_json(system.result, result)
        show(system.name, result)
        print(system.result)
    return 0


def image_folders(words: list[str]) -> list[Path]:
    """The folders of generated images among the words; all targets are, or none."""
    from evaluation.scoring import is_image_set

    targets = [word for word in words if not (_SETTING.fullmatch(word) and not os.path.exists(word))]
    found = [Path(word) for word in targets if is_image_set(Path(word))]
    if found and len(found) < len(targets):
        other = next(word for word in targets if Path(word) not in found)
        raise UserError(
            f"{found[0]} holds generated images and {other} does not: evaluate them apart, or generate images of "
            f"{other} first"
        )
    return found


def evaluate_images(folders: list[Path], options: argparse.Namespace) -> int:
    """Score, reduce and compare sets of generated images."""
    from configs.loading import load
    from evaluation.image_sets import evaluate_image_sets, save
    from evaluation.numbered_work import Worker
    from evaluation.references import load_reference

    for name, given in (("--data", options.data), ("--images", options.images)):
        if given is not None:
            raise UserError(f"{name} is for generators; {folders[0]} holds images already")
    settings = [word for word in options.words if Path(word) not in folders]
    foreign = [setting for setting in settings if not setting.startswith("metrics.")]
    if foreign:
        raise UserError(f"{foreign[0]}: images are there already; only metrics.* can be given here")
    if not options.metrics:
        raise UserError("--metrics NAME,… says what to measure, such as --metrics mini_clip_score,clip_score")
    names = ",".join(filter(None, (name.strip() for name in options.metrics.split(","))))
    config = load("generator/tiny", [*settings, f"metrics.names=[{names}]"]).metrics
    if options.out is not None:
        check_output_folder(options.out)
    references = [load_reference(path) for path in options.reference]
    worker = Worker.from_environment()
    results = evaluate_image_sets(folders, config, references, worker)
    if worker.number == 0:
        save(results, options.out)
    return 0


def result_files(targets: list[Path], data: list[str] | None, out: Path | None) -> list[Path]:
    """Where the result of each target goes. Raises UserError where two would share a file, or data are missing."""
    from configs.load_run import find_run, is_run

    files = []
    for target in targets:
        if is_run(target):
            if data is not None and not any(not is_run(other) for other in targets):
                raise UserError(
                    "--data is for exported folders and published weights; a run names its own data"
                )
            folder = find_run(target)[0]
            files.append(out / f"{folder.name}.json" if out else folder / EVALUATION)
            continue
        if data is None:
            raise UserError(f"{target} is not a run, whose settings name its data: give --data SHARDS")
        files.append((out or Path("evaluation")) / f"{name_of(target)}.json")
    for file in files:
        if files.count(file) > 1:
            raise UserError(
                f"two results would go to {file}; evaluate one after the other, each with its own --out"
            )
    return files


def name_of(target: Path) -> str:
    """A name for a file: the folder's or file's, or OWNER--NAME of a hub id."""
    if not target.exists():
        return str(target).replace("/", "--")
    return target.resolve().name if target.is_dir() else target.stem


def open_system(target: Path, settings: list[str], data: list[str] | None, result: Path) -> System:
    """A run or one of its checkpoints with its own settings, or what has been exported or published."""
    from configs.build import build_datamodule
    from configs.load_run import is_run, load_pipeline, open_pipeline
    from datamodules.config import DataConfig
    from datamodules.datamodule import ShardDataModule
    from datamodules.shards.shard_paths import split_pattern
    from switti.metrics.config import MetricsConfig

    if is_run(target):
        pipeline, config, step = load_pipeline(target, settings)
        # The pipeline encodes the captions itself.
        module = build_datamodule(replace(config, data=replace(config.data, embeddings=None)), None)
        return System(name_of(target), result, pipeline, config.metrics, module, step)
    pipeline, _ = open_pipeline(target, settings)
    shards = [split_pattern(entry) for entry in data or []]
    given = DataConfig(train=shards, validation=shards)
    given.validate("data")
    module = ShardDataModule(given, seed=0, resolution=pipeline.tokenizer.config.resolution)
    return System(name_of(target), result, pipeline, MetricsConfig(), module, None)


def split_words(words: list[str]) -> tuple[list[Path], list[str]]:
    """(generators, settings). The name of a run's folder may hold an = as well: what exists is a run."""
    settings = [word for word in words if _SETTING.fullmatch(word) and not os.path.exists(word)]
    targets: list[Path] = []
    for word in words:
        if word in settings:
            continue
        path = Path(word)
        single = any(map(os.path.isfile, (path, *(path / name for name in (CONFIG, INDEX, WEIGHTS_CONFIG)))))
        published = is_hub_id(word) and not (Path("runs") / word).is_dir()
        targets += [path] if single or published else find_runs([word])
    if not targets:
        raise UserError(f"no run is given besides the settings {' '.join(settings)}")
    return list(dict.fromkeys(targets)), settings


def measure(system: System, images: int | None, stopped_early: bool) -> dict[str, Any]:
    """Metrics on the images of the split's captions."""
    from switti.metrics.catalogue import to_record
    from switti.metrics.collection import extra_infos

    count, sampling = images or system.metrics.prompts, system.pipeline.sampling
    values, used = score(system, count, sampling)
    result = {
        "step": system.step,
        "pictures": used,
        "captions": system.metrics.captions,
        "settings": asdict(sampling),
        "metrics": values,
    }
    if system.metrics.extra:
        result["about"] = to_record(extra_infos(system.metrics))
    if stopped_early:
        result["metrics_stopped_early"], _ = score(system, count, system.early)
    return result


def score(system: System, count: int, sampling: "SamplingConfig") -> tuple[dict[str, float], int]:
    """(the chosen metrics of images sampled from the captions of `count` samples, against their images; how many
    there are). One batch of images is in memory at a time."""
    from tqdm import tqdm

    from configs.build import candidate_captions
    from switti.metrics.collection import build_metrics

    pipeline, size = system.pipeline, system.metrics.batch
    metrics = build_metrics(system.metrics, pipeline.device)
    captions: list[str] = []
    for batch in system.data.example_batches(system.metrics.captions, count, size):
        metrics.update_real((batch["image"] + 1) / 2)
        captions += batch["caption"]
    metrics.set_candidates(candidate_captions(system.data, system.metrics.captions, captions))
    for start in tqdm(range(0, len(captions), size), unit="batch", desc=f"sampling {system.name}"):
        part = captions[start : start + size]
        seeds = list(range(start, start + len(part)))
        images = pipeline(part, seeds=seeds, sampling=sampling, batch_size=size, output_type="pt")
        metrics.update(cast("Tensor", images), part)
    return metrics.compute(), len(captions)


def time_systems(systems: list[System]) -> list[dict[str, Any]]:
    """For each the times as configured and with guidance stopped early, all measured in turn."""
    from switti.sampling.timing import TimedCase, time_in_turn

    cases = []
    for system in systems:
        captions = system.data.examples(system.metrics.captions, TIMED_BATCH)["caption"]
        text = system.pipeline.text_encoder.encode(captions)
        for sampling in (system.pipeline.sampling, system.early):
            cases.append(TimedCase(system.pipeline, text, sampling))
    times = time_in_turn(cases)
    return [
        {"sampling": full, "sampling_stopped_early": early}
        for full, early in zip(times[::2], times[1::2], strict=True)
    ]


def show(name: str, result: dict[str, Any]) -> None:
    """The table on the screen."""
    what = name if result["step"] is None else f"step {result['step']}"
    print(f"{what}, {result['pictures']} captions of the {result['captions']} split")
    early = result.get("metrics_stopped_early", {})
    for name, value in result["metrics"].items():
        beside = f"   {early[name]:9.4f} with guidance stopped early" if name in early else ""
        print(f"  {name:32} {value:9.4f}{beside}")
    for name, title in (
        ("sampling", "as configured"),
        ("sampling_stopped_early", f"guidance stopped {EARLY} scales early"),
    ):
        timing = result[name]
        scales = " ".join(f"{1000 * seconds:.1f}" for seconds in timing["seconds_per_scale"])
        print(
            f"  {1000 * timing['seconds_total']:.1f} ms for {timing['batch']} images, {title}; by scale: {scales}"
        )


if __name__ == "__main__":
    run(main)
