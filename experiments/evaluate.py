"""python -m experiments.evaluate STUDY|RUN|CHECKPOINT … [--pictures N] [--stopped-early] [key=value …]

Measures trained generators: the metrics of a run's `metrics` settings on N generated pictures (default
metrics.prompts), and the time of each scale with guidance as configured and stopped two scales early. Prints a table
and writes evaluation.json into each run's folder, where experiments.compare finds it.

Runs that are given together are timed in turn, round by round, so that their times can be compared on a machine that
does other work as well; all of them are in memory at once. --stopped-early takes the metrics a second time, on the
same captions and noise with guidance stopped two scales early.

    python -m experiments.evaluate tokenizer=A,B,… [--data SHARDS] [--pictures 300] [--scales …] [--out DIR]

Table 1 for any tokenizers side by side, each a run folder (task tokenizer or decoder), a weights file or folder, a hub
id, or embedded:demo: PSNR, SSIM, LPIPS, CLIP-IQA, the distance of the two sets of pictures, use of the codebook,
perplexity and what is missing of the latent after each scale. A tokenizer is convolutional: --scales reads it at a
resolution that it was not trained at. Writes table.csv, pictures.csv, and the worst pictures with reconstructions and
differences as page.html and worst.png.
"""

import argparse
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import tokenizer_evaluation
from experiments.command import run
from switti.errors import UserError
from switti.files import write_json
from switti.report.runs import find_runs
from switti.run_folder import CONFIG, EVALUATION

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from switti.sampling.config import SamplingConfig
    from switti.sampling.pipeline import SwittiPipeline

TIMED_BATCH = 8
EARLY = 2  # scales; the paper leaves guidance out at the last two (Section 3.5)
_SETTING = re.compile(r"[\w.]+=.*")


@dataclass
class Trained:
    """A run that is measured. folder: where evaluation.json goes."""

    folder: Path
    pipeline: "SwittiPipeline"
    config: "RunConfig"
    step: int

    @property
    def early(self) -> "SamplingConfig":
        """The run's sampling with guidance stopped early (or as early as it is configured to stop)."""
        stop = max(0, len(self.config.model.scales) - EARLY)
        configured = self.config.sampling.guidance_stop
        return replace(
            self.config.sampling, guidance_stop=stop if configured is None else min(stop, configured)
        )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="STUDY|RUN|CHECKPOINT|key=value",
        help="runs, and settings of the sampler; or tokenizer=…",
    )
    parser.add_argument("--pictures", type=int, help="number of captions to generate (metrics.prompts)")
    parser.add_argument(
        "--stopped-early", action="store_true", help="metrics with guidance stopped early, too"
    )
    for_tokenizers = tokenizer_evaluation.add_options(parser)
    options = parser.parse_intermixed_args(argv)
    if any(word.startswith(tokenizer_evaluation.WORD) for word in options.words):
        return evaluate_tokenizers(options)
    if given := [name for name in for_tokenizers if getattr(options, name) is not None]:
        raise UserError(f"--{given[0].replace('_', '-')} is for tokenizers: tokenizer=…")
    if options.pictures is not None and options.pictures < 2:
        raise UserError(f"--pictures {options.pictures} must be at least 2")
    targets, settings = split_words(options.words)

    from experiments.trained import find_run, load_pipeline

    runs = [Trained(find_run(target)[0], *load_pipeline(target, settings)) for target in targets]
    results = [measure(trained, options.pictures, options.stopped_early) for trained in runs]
    for result, timings in zip(results, time_runs(runs), strict=True):
        result |= timings
    for trained, result in zip(runs, results, strict=True):
        write_json(trained.folder / EVALUATION, result)
        show(result)
        print(trained.folder / EVALUATION)
    return 0


def evaluate_tokenizers(options: argparse.Namespace) -> int:
    """Tokenizers alone: a generator run has one of its own, with which it is measured."""
    others = [word for word in options.words if not word.startswith(tokenizer_evaluation.WORD)]
    if others or options.stopped_early:
        wrong = others[0] if others else "--stopped-early"
        raise UserError(f"{wrong}: generators and their settings are measured without tokenizer=")
    return tokenizer_evaluation.evaluate(tokenizer_evaluation.sources_in(options.words), options)


def split_words(words: list[str]) -> tuple[list[Path], list[str]]:
    """(runs and checkpoints, settings). The name of a run's folder may hold an = as well: what exists is a run."""
    settings = [word for word in words if _SETTING.fullmatch(word) and not Path(word).exists()]
    targets: list[Path] = []
    for word in words:
        if word in settings:
            continue
        path = Path(word)
        known = path.is_file() or (path / CONFIG).is_file()
        targets += [path] if known else find_runs([word])
    if not targets:
        raise UserError(f"no run is given besides the settings {' '.join(settings)}")
    return list(dict.fromkeys(targets)), settings


def measure(trained: Trained, pictures: int | None, stopped_early: bool) -> dict[str, Any]:
    """Metrics on the pictures of the split's captions."""
    from experiments.assembly import build_datamodule

    config = trained.config
    count = pictures or config.metrics.prompts
    datamodule = build_datamodule(config, None)
    datamodule.config.embeddings = None  # the pipeline encodes the captions itself
    batch = datamodule.examples(config.metrics.captions, count)
    result = {
        "step": trained.step,
        "pictures": count,
        "captions": config.metrics.captions,
        "settings": asdict(config.sampling),
        "metrics": score(trained, batch, config.sampling),
    }
    if stopped_early:
        result["metrics_stopped_early"] = score(trained, batch, trained.early)
    return result


def score(trained: Trained, batch: dict[str, Any], sampling: "SamplingConfig") -> dict[str, float]:
    """The chosen metrics of pictures sampled from the batch's captions, against its pictures."""
    from tqdm import tqdm

    from switti.metrics.collection import build_metrics

    pipeline, size = trained.pipeline, trained.config.metrics.batch
    metrics = build_metrics(trained.config.metrics, pipeline.device)
    metrics.update_real((batch["image"] + 1) / 2)
    captions = batch["caption"]
    for start in tqdm(range(0, len(captions), size), unit="batch", desc=f"sampling {trained.folder.name}"):
        part = captions[start : start + size]
        seeds = list(range(start, start + len(part)))
        pictures = pipeline(part, seeds=seeds, sampling=sampling, batch_size=size, output_type="pt")
        metrics.update(pictures, part)
    return metrics.compute()


def time_runs(runs: list[Trained]) -> list[dict[str, Any]]:
    """For each run the times as configured and with guidance stopped early, all measured in turn."""
    from experiments.assembly import build_datamodule
    from switti.sampling.timing import TimedCase, time_in_turn

    cases = []
    for trained in runs:
        datamodule = build_datamodule(trained.config, None)
        datamodule.config.embeddings = None
        captions = datamodule.examples(trained.config.metrics.captions, TIMED_BATCH)["caption"]
        text = trained.pipeline.text_encoder.encode(captions)
        for sampling in (trained.config.sampling, trained.early):
            cases.append(TimedCase(trained.pipeline, text, sampling))
    times = time_in_turn(cases)
    return [
        {"sampling": full, "sampling_stopped_early": early}
        for full, early in zip(times[::2], times[1::2], strict=True)
    ]


def show(result: dict[str, Any]) -> None:
    """The table on the screen."""
    print(f"step {result['step']}, {result['pictures']} captions of the {result['captions']} split")
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
            f"  {1000 * timing['seconds_total']:.1f} ms for {timing['batch']} pictures, {title}; by scale: {scales}"
        )


if __name__ == "__main__":
    run(main)
