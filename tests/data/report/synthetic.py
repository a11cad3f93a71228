"""python tests/data/report/synthetic.py DIR: a made-up study of 2 variants × 2 seeds, to look at the report."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageDraw

SIDES = [1, 2, 3, 4, 6, 9, 13, 18, 24, 32]
BLOCKS = 8
PROMPTS = [
    "red apple, twemoji style",
    "dog face, openmoji style, animal, pet",
    "flag of France, twemoji style",
    "a very long caption that goes on about a smiling face with sunglasses, openmoji style, cool, weather, summer",
]
COLOURS = ["#d33", "#a7703a", "#36c", "#fc3"]


def config(visibility: str, seed: int, name: str, sides: list[int] = SIDES) -> dict[str, Any]:
    return {
        "task": "generator",
        "name": name,
        "study": "visibility",
        "runs_dir": "runs",
        "seed": seed,
        "tokenizer": {"scales": sides, "codebook_size": 4096, "commitment": 0.25},
        "tokenizer_weights": "embedded:demo",
        "model": {
            "visibility": visibility,
            "scales": sides,
            "codebook_size": 4096,
            "depth": BLOCKS,
            "width": 512,
        },
        "data": {
            "train": "t-*.tar",
            "validation": "v-*.tar",
            "resolution": 512,
            "batch_size": 32,
            "workers": 2,
        },
        "optimizer": {"learning_rate": 1e-4},
        "trainer": {"max_steps": 2000, "precision": "bf16-mixed"},
    }


def record(name: str, seed: int, **changes: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "name": name,
        "study": "visibility",
        "task": "generator",
        "status": "finished",
        "error": None,
        "started": "2025-03-01T10:00:00",
        "updated": "2025-03-01T12:10:00",
        "ended": "2025-03-01T12:10:00",
        "command": "python -m experiments.train configs/generator/tiny.yaml",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
        "versions": {"python": "3.11.9", "torch": "2.6.0", "lightning": "2.5.0", "torchmetrics": "1.9.0"},
        "device": "cpu, 2 cores",
        "host": "desk",
        "world_size": 1,
        "seed": seed,
        "parameters": {"trained": 62_000_000, "frozen": 11_000_000},
        "tokens_per_image": sum(side * side for side in SIDES),
        "step": 2000,
        "max_steps": 2000,
        "train_seconds": 7800.0 - 300 * seed,
        "peak_memory_bytes": 5 * 2**30,
        "resumed": [],
    } | changes


def write_run(
    folder: Path,
    config: dict[str, Any],
    record: dict[str, Any],
    metrics: list[tuple[int, str, float]] = (),
    evaluation: dict[str, Any] | None = None,
) -> Path:
    """A run folder as training leaves it; metrics: (step, name, value)."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "record.json").write_text(json.dumps(record))
    with (folder / "metrics.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["step", "epoch", "metric", "value", "time"])
        writer.writerows([step, step // 100, name, value, 1.7e9 + step] for step, name, value in metrics)
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def write_samples(
    folder: Path, prompts: list[str], seeds: list[int], shift: int = 0, step: int = 2000
) -> None:
    latest = folder / "samples" / "latest"
    latest.mkdir(parents=True)
    files = [f"{i:02d}.png" for i in range(len(prompts))]
    for i, file in enumerate(files):
        picture = Image.new("RGB", (64, 64), "white")
        box = (8 + shift, 8 + i % 4, 50 + shift, 52)
        ImageDraw.Draw(picture).ellipse(box, fill=COLOURS[i % 4], outline="#333", width=2)
        picture.save(latest / file)
    index = {"step": step, "sampling": {"guidance": 4.0}, "prompts": prompts, "seeds": seeds, "files": files}
    (latest / "index.json").write_text(json.dumps(index))


def curves(visibility: str, seed: int, sides: list[int]) -> list[tuple[int, str, float]]:
    """Losses that fall, norms that grow, metrics that improve; the causal variant a little slower and heavier."""
    rng, causal = np.random.default_rng([seed, visibility == "causal"]), visibility == "causal"
    luck, points = np.random.default_rng(seed).normal(0, 0.02), []
    sizes = np.array(sides) ** 2
    entropies = np.linspace(5.5, 7.9, len(sides))
    for step in range(10, 2001, 10):
        progress = 1 - np.exp(-step / 500)
        loss = 8.3 - (1.9 + 0.05 * causal) * progress + luck
        points += [
            (step, "train/loss", loss + rng.normal(0, 0.08)),
            (step, "train/gradient_norm", float(np.exp(rng.normal(-step / 2000, 0.25)))),
            (step, "train/learning_rate", 1e-4 * (1 - 0.9 * step / 2000)),
            (step, "time/step_seconds", (3.9 if causal else 3.1) + abs(rng.normal(0, 0.1))),
            (step, "time/samples_per_second", 32 / (3.9 if causal else 3.1)),
        ]
        if step % 50 == 0:
            growth = (3 if causal else 2) * step / 2000
            points += [
                (step, f"norms/last/{k}", 10 ** (m + growth)) for k, m in (("mean", 1.2), ("max", 2.5))
            ]
            for block in range(BLOCKS):
                power = 0.3 + growth * block / BLOCKS
                points += [
                    (step, f"norms/block_{block}/{k}", 10 ** (power + m))
                    for k, m in (("mean", 0), ("max", 1.3))
                ]
        if step % 200 == 0:
            by_scale = (
                entropies + 0.4 - (1.5 + 0.07 * causal) * progress * np.linspace(1.3, 0.5, len(sides)) + luck
            )
            points.append((step, "validation/loss", float((by_scale * sizes).sum() / sizes.sum())))
            for k in range(len(sides)):
                points += [
                    (step, f"validation/loss_by_scale/{k}", by_scale[k] + rng.normal(0, 0.02)),
                    (
                        step,
                        f"validation/accuracy_by_scale/{k}",
                        0.25 * progress / (k + 1) + rng.normal(0, 0.002),
                    ),
                    (step, f"validation/unigram_entropy_by_scale/{k}", entropies[k]),
                ]
            points += [
                (step, "metrics/fid_alexnet", 40 - 22 * progress + 1.2 * causal + rng.normal(0, 0.4)),
                (step, "metrics/mini_clip_score", 0.1 + 0.35 * progress + rng.normal(0, 0.01)),
                (step, "metrics/mini_clip_score_shuffled", 0.08 + rng.normal(0, 0.01)),
            ]
    return [*points, (2000, "memory/peak_gib", 6.1 if causal else 5.2)]


def evaluation(visibility: str, seed: int, sides: list[int]) -> dict[str, Any]:
    causal = visibility == "causal"
    seconds = [0.02 + 0.004 * side**1.5 * (1.25 if causal else 1.0) for side in sides]
    return {
        "step": 2000,
        "metrics": {
            "fid_alexnet": 19.3 + 0.9 * causal + 0.3 * seed,
            "kid_alexnet": 0.0041 + 0.0007 * causal,
            "mini_clip_score": 0.42 - 0.01 * causal + 0.004 * seed,
            "mini_clip_score_shuffled": 0.081 + 0.001 * seed,
        },
        "sampling": {
            "seconds_per_scale": seconds,
            "seconds_total": sum(seconds) + 0.01 * seed,
            "batch": 8,
            "guidance_stop": None,
            "cache_bytes": 310 * 2**20 if causal else 0,
        },
        "sampling_stopped_early": {
            "seconds_per_scale": seconds,
            "seconds_total": 0.7 * sum(seconds),
            "batch": 8,
            "guidance_stop": len(sides) - 2,
        },
        "pictures": 512,
        "captions": "validation",
    }


def write_study(root: Path, seeds: tuple[int, ...] = (0, 1), sides: list[int] = SIDES) -> Path:
    """runs of both variants below `root`/visibility."""
    for visibility in ("causal", "non_causal"):
        for seed in seeds:
            name = f"visibility={visibility},seed={seed}"
            folder = root / "visibility" / name
            points = curves(visibility, seed, sides)
            write_run(
                folder,
                config(visibility, seed, name, sides),
                record(name, seed),
                points,
                evaluation(visibility, seed, sides),
            )
            write_samples(folder, PROMPTS, [0, 1, 2, 3], 2 * seed + 5 * (visibility == "causal"))
    return root / "visibility"


if __name__ == "__main__":
    print(write_study(Path(sys.argv[1])))
