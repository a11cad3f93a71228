"""Evaluation of folders of generated images: score what is missing, reduce, compare on the same prompts."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.numbered_work import Progress, Work, Worker, do_units
from evaluation.references import Reference
from evaluation.scoring import (
    ImageSet,
    PromptMeans,
    feature_maker,
    feature_work,
    metric_digest,
    open_image_set,
    read_features,
    read_scores,
    score_maker,
    score_work,
)
from evaluation.statistics import (
    RESAMPLES,
    Estimate,
    frechet_distance,
    mean_over_prompts,
    paired_difference,
    statistics_of,
)
from evaluation.tables import Row, interval, latex, markdown, published_rows, terminal
from switti.errors import UserError
from switti.files import atomic_write, write_json
from switti.metrics.catalogue import IMAGE_METRICS, MetricInfo, find_info, to_record
from switti.metrics.config import MetricsConfig
from switti.run_folder import EVALUATION

DISTANCES = {"fid": "fid_", "kid": "kid_"}


@dataclass
class Evaluated:
    """Results on one set of images. metrics: by label. differences: against the first set, by label."""

    images: ImageSet
    metrics: dict[str, Estimate] = field(default_factory=dict)
    differences: dict[str, Estimate] = field(default_factory=dict)


def is_distance(name: str) -> bool:
    """Whether a metric compares sets of images rather than scoring each."""
    return name.startswith(tuple(DISTANCES.values()))


def labels_of(config: MetricsConfig, name: str) -> list[str]:
    """Labels of a metric's values, without building its network."""
    from switti.metrics.clip_score import clip_score_name
    from switti.metrics.retrieval import VALUES

    if name == "clip_score":
        return [clip_score_name(config.clip_model)]
    if name == "mini_clip_top1":
        return [f"mini_clip_{value}" for value in VALUES]
    return [IMAGE_METRICS[name].label or name]


def evaluate_image_sets(
    folders: list[Path], config: MetricsConfig, references: list[Reference], worker: Worker
) -> list[Evaluated]:
    """Scores of every set, then means, intervals and differences. With several workers each does its share of the
    scoring, and all wait for the rest.

    Raises:
        UserError: a set is incomplete, the sets have different prompts, or a distance has no reference of its network.
    """
    sets = [open_image_set(folder) for folder in folders]
    _check_prompts(sets)
    # Once: the files of networks are read for it.
    digests = {name: metric_digest(config, name) for name in config.names}
    found = {
        name: _reference_for(name, references, digests[name]) for name in config.names if is_distance(name)
    }
    results = [Evaluated(images) for images in sets]
    for name in config.names:
        works = _score_all(sets, name, digests[name], config, worker)
        if is_distance(name):
            for result, work in zip(results, works, strict=True):
                result.metrics[name] = _distance(name, work, found[name])
            continue
        for label in labels_of(config, name):
            _reduce(results, [read_scores(work, label) for work in works], label)
    return results


def _reduce(results: list[Evaluated], columns: list[PromptMeans], label: str) -> None:
    """Means and differences of one value; none where it is defined for no prompt, as is style without styles."""
    if not len(columns[0].index_P):
        return
    for result, column in zip(results, columns, strict=True):
        result.metrics[label] = mean_over_prompts(column.mean_P)
    first = columns[0]
    for result, column in zip(results[1:], columns[1:], strict=True):
        if not np.array_equal(first.index_P, column.index_P):
            raise UserError(
                f"{label} of {result.images.folder} is undefined for other prompts; score it again"
            )
        result.differences[label] = paired_difference(first.mean_P, column.mean_P)


def _check_prompts(sets: list[ImageSet]) -> None:
    first = sets[0]
    for other in sets[1:]:
        if other.prompts_digest != first.prompts_digest:
            a, b = (f"{s.folder} has {s.manifest['prompts']['name']}" for s in (first, other))
            counts = {s.manifest["prompts"]["name"] for s in (first, other)}
            more = " with other prompts or another number of images" if len(counts) == 1 else ""
            raise UserError(f"{a}, {b}{more}; systems are compared on the same prompts: evaluate them apart")


def _reference_for(name: str, references: list[Reference], digest: str) -> Reference:
    network = IMAGE_METRICS[name].network
    fitting = [reference for reference in references if reference.network == network]
    # Files of other programs do not say what they are; the published ones are of this convention.
    if network == "inception_pytorch_fid":
        fitting += [reference for reference in references if not reference.network]
    if not fitting:
        there = ", ".join(reference.network or "unnamed" for reference in references) or "none"
        raise UserError(
            f"{name} needs statistics of real images under {network} (given: {there}); make them with "
            f"python -m experiments.reference_stats DATA --network {network} --out FILE.npz, and give --reference "
            "FILE.npz"
        )
    reference = fitting[0]
    if reference.digest and reference.digest != digest:
        raise UserError(
            f"{name}: the reference of {reference.source} was made with another network file; make it again"
        )
    if name.startswith(DISTANCES["kid"]) and reference.features_NF is None:
        raise UserError(
            f"{name} needs the features of the real images, and {reference.source} holds mean and covariance alone; "
            "make them with python -m experiments.reference_stats"
        )
    return reference


def _score_all(
    sets: list[ImageSet], name: str, digest: str, config: MetricsConfig, worker: Worker
) -> list[Work]:
    """The finished work of one metric on each set. Its network is built once, and only if something is missing."""
    import torch

    from switti.metrics.collection import build_metrics

    info, labels = IMAGE_METRICS[name], labels_of(config, name)
    works = [
        feature_work(images, info.network, digest)
        if is_distance(name)
        else score_work(images, labels[0], digest)
        for images in sets
    ]
    missing = [(images, work) for images, work in zip(sets, works, strict=True) if work.missing()]
    if not missing:
        return works
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    built = build_metrics(replace(config, names=[name], extra=[]), device)
    for images, work in missing:
        if is_distance(name):
            (group,) = built.distances
            make = feature_maker(images, group.network, work, config.batch, device)
        else:
            built.set_candidates(images.prompts())
            (metric,) = built.scores.values()
            make = score_maker(images, metric.score, labels, work, config.batch, device)
        progress = Progress(work, shown=worker.number == 0)
        try:
            do_units(work, make, worker, progress)
        finally:
            progress.close()
    return works


def _distance(name: str, work: Work, reference: Reference) -> Estimate:
    """Without an interval: a distance is not a mean over prompts."""
    import torch

    from switti.metrics.fid import kernel_distance

    features = read_features(work)
    width = reference.statistics.mean_F.shape[0]
    if features.shape[1] != width:
        raise UserError(f"{name}: {reference.source} has {width} features, the images {features.shape[1]}")
    if name.startswith(DISTANCES["fid"]):
        value = frechet_distance(reference.statistics, statistics_of(features.numpy()))
    else:
        assert reference.features_NF is not None  # _reference_for has looked
        value = float(kernel_distance(torch.from_numpy(reference.features_NF), features, torch.float32))
    if not np.isfinite(value):
        raise UserError(f"{name} of {work.folder} is not finite")
    return Estimate(value, None, None, len(features))


def facts_of(results: list[Evaluated]) -> dict[str, MetricInfo]:
    """Facts about every label of the table."""
    return {label: info for label in results[0].metrics if (info := find_info(label)) is not None}


def save(results: list[Evaluated], out: Path | None) -> None:
    """evaluation.json in each folder, the table on the screen, and in `out` as Markdown and LaTeX."""
    infos = facts_of(results)
    rows = [Row(result.images.name, result.metrics, result.differences) for result in results]
    for result in results:
        write_json(result.images.folder / EVALUATION, as_json(result, infos, results[0].images.name))
    prompts = results[0].images.manifest["prompts"]
    rows += published_rows(prompts, list(infos))
    note = (
        f"{prompts['count']} prompts ({prompts['name']}) × {prompts['images_per_prompt']} images; intervals by "
        f"{RESAMPLES} bootstrap resamples of the prompts."
    )
    print(note)
    print(terminal(rows, infos))
    for row in rows:
        for label, difference in row.differences.items():
            print(f"{row.name} − {rows[0].name}, {infos[label].title}: {interval(difference)}")
    if out is not None:
        for name, text in (("table.md", markdown(rows, infos, note)), ("table.tex", latex(rows, infos))):
            with atomic_write(out / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
            print(out / name)


def as_json(result: Evaluated, infos: dict[str, MetricInfo], baseline: str) -> dict[str, Any]:
    """What evaluation.json holds."""
    manifest = result.images.manifest
    differences = None
    if result.differences:
        differences = {"against": baseline, "metrics": _numbers(result.differences)}
    return {
        "kind": "images",
        "name": result.images.name,
        "digest": manifest["digest"],
        "system": manifest["system"],
        "prompts": manifest["prompts"],
        "metrics": _numbers(result.metrics),
        "differences": differences,
        "about": to_record(infos),
    }


def _numbers(estimates: dict[str, Estimate]) -> dict[str, dict[str, float | int | None]]:
    return {label: asdict(estimate) for label, estimate in estimates.items()}
