"""python -m experiments.evaluate RUN|CHECKPOINT [--pictures N] [key=value …]

Measures a trained generator: the metrics of the run's `metrics` settings on N generated pictures (default
metrics.prompts), and the time of each scale with guidance as configured and stopped two scales early. Prints a table
and writes evaluation.json into the run folder, where experiments.compare finds it.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.command import run
from switti.errors import UserError
from switti.files import write_json

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from switti.sampling.pipeline import SwittiPipeline

TIMED_BATCH = 8


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="run folder or checkpoint")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the sampler")
    parser.add_argument("--pictures", type=int, help="number of captions to generate (metrics.prompts)")
    options = parser.parse_intermixed_args(argv)
    if options.pictures is not None and options.pictures < 2:
        raise UserError(f"--pictures {options.pictures} must be at least 2")

    from experiments.trained import find_run, load_pipeline

    folder, _ = find_run(options.run)
    pipeline, config, step = load_pipeline(options.run, options.settings)
    count = options.pictures or config.metrics.prompts
    result = {
        "step": step,
        "pictures": count,
        "captions": config.metrics.captions,
        "settings": asdict(config.sampling),
        **measure(pipeline, config, count),
    }
    write_json(folder / "evaluation.json", result)
    show(result)
    print(folder / "evaluation.json")
    return 0


def measure(pipeline: "SwittiPipeline", config: "RunConfig", count: int) -> dict[str, Any]:
    """Metrics on `count` pictures of the split's captions, and timings."""
    from tqdm import tqdm

    from experiments.assembly import build_datamodule
    from switti.metrics.collection import build_metrics
    from switti.sampling.timing import time_scales

    datamodule = build_datamodule(config, None)
    datamodule.config.embeddings = None  # the pipeline encodes the captions itself
    batch = datamodule.examples(config.metrics.captions, count)
    metrics = build_metrics(config.metrics, pipeline.device)
    metrics.update_real((batch["image"] + 1) / 2)
    captions, size = batch["caption"], config.metrics.batch
    for start in tqdm(range(0, len(captions), size), unit="batch", desc="sampling"):
        part = captions[start : start + size]
        seeds = list(range(start, start + len(part)))
        metrics.update(pipeline(part, seeds=seeds, batch_size=size, output_type="pt"), part)
    text = pipeline.text_encoder.encode(captions[:TIMED_BATCH])
    early = replace(config.sampling, guidance_stop=max(0, len(config.model.scales) - 2))
    return {
        "metrics": metrics.compute(),
        "sampling": time_scales(pipeline, text, config.sampling),
        "sampling_stopped_early": time_scales(pipeline, text, early),
    }


def show(result: dict[str, Any]) -> None:
    """The table on the screen."""
    print(f"step {result['step']}, {result['pictures']} captions of the {result['captions']} split")
    for name, value in result["metrics"].items():
        print(f"  {name:32} {value:9.4f}")
    for name, title in (
        ("sampling", "as configured"),
        ("sampling_stopped_early", "guidance stopped two scales early"),
    ):
        timing = result[name]
        scales = " ".join(f"{1000 * seconds:.1f}" for seconds in timing["seconds_per_scale"])
        print(
            f"  {1000 * timing['seconds_total']:.1f} ms for {timing['batch']} pictures, {title}; by scale: {scales}"
        )


if __name__ == "__main__":
    run(main)
