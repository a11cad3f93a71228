"""python tests/helpers/synthetic_runs.py DIR: a made-up study (2 variants × 2 seeds) and a search, to look at."""

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
            "heads": 8,
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


SPACE = {
    "optimizer.learning_rate": {"choices": None, "low": 1e-5, "high": 1e-2, "step": None, "log": True},
    "model.depth": {"choices": None, "low": 2, "high": 8, "step": 2, "log": False},
    "model.norms": {"choices": ["sandwich", "pre"], "low": None, "high": None, "step": None, "log": False},
    "data.caption_dropout": {"choices": None, "low": 0.0, "high": 0.5, "step": None, "log": False},
}
# Optimum of the made-up search: learning rate 1e-3, as deep as may be, norms hardly matter, dropout not at all.
STEPS = 200


def trial_loss(parameters: dict[str, Any], step: int) -> float:
    rate = abs(np.log10(parameters["optimizer.learning_rate"]) + 3)
    value = 5.0 + rate - 0.05 * parameters["model.depth"] + 0.02 * (parameters["model.norms"] == "pre")
    return float(value + 3 * np.exp(-step / 60))


def write_trial(folder: Path, number: int, parameters: dict[str, Any], state: str, **changes: Any) -> Path:
    """A trial's run folder. state: finished, failed, running, or pruned half-way."""
    name = f"trial_{number:04d},learning_rate={parameters['optimizer.learning_rate']:.4g}"
    settings = config("non_causal", 0, name, [1, 2, 4]) | {
        "study": folder.name,
        "callbacks": {"prunable": True},
    }
    for key, value in parameters.items():
        group, _, last = key.partition(".")
        settings[group][last] = value
    settings["model"]["norms"] = parameters["model.norms"]
    status = {"pruned": "interrupted"}.get(state, state)
    end = {"pruned": STEPS // 2, "failed": 0, "running": STEPS // 4}.get(state, STEPS)
    error = "ValueError: loss is not finite" if state == "failed" else None
    entry = record(
        name, 0, status=status, step=end, max_steps=STEPS, error=error, study=folder.name, **changes
    )
    points = [(step, "validation/loss", trial_loss(parameters, step)) for step in range(20, end + 1, 20)]
    run = write_run(folder / name, settings, entry, points)
    if state == "pruned":
        (run / "prune.json").write_text(
            json.dumps({"trial": number, "step": end, "metric": "validation/loss", "value": 1.0})
        )
    return run


def write_search(root: Path, trials: int = 24, name: str = "rates", **changes: Any) -> Path:
    """A search below `root` as sweeps leave it: every fifth trial was pruned, every eleventh failed."""
    folder, rng = root / name, np.random.default_rng(0)
    folder.mkdir(parents=True)
    search = {"space": SPACE, "metric": "validation/loss", "direction": "minimize", "trials": trials, "sampler": "tpe",
              "seed": 0, "pruner": "median", "startup_trials": 5, "warmup_steps": 0, "storage": None}  # fmt: skip
    study = {
        "format": 1,
        "name": name,
        "base": "generator/tiny",
        "vary": {},
        "pair_by": None,
        "points": {},
        "runs": [],
    }
    (folder / "study.json").write_text(json.dumps(study | {"search": search | changes}))
    for number in range(trials):
        parameters = {
            "optimizer.learning_rate": float(10 ** rng.uniform(-5, -2)),
            "model.depth": int(2 * rng.integers(1, 5)),
            "model.norms": str(rng.choice(["sandwich", "pre"])),
            "data.caption_dropout": float(rng.uniform(0, 0.5)),
        }
        state = "pruned" if number % 5 == 4 else "failed" if number % 11 == 10 else "finished"
        write_trial(folder, number, parameters, state)
    return folder


if __name__ == "__main__":
    print(write_study(Path(sys.argv[1])))
    print(write_search(Path(sys.argv[1])))
