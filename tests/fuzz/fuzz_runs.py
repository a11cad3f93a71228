"""Targets of runs and settings: run folders, YAML, command lines, sampling, golden tensors."""

import contextlib
import io
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from fuzz_campaign import SilentError, Target
from fuzz_mutations import ODD, Chance, mutate_bytes, mutate_json, mutate_safetensors, mutate_text
from fuzz_weights import parts
from PIL import Image

from configs.loading import SETTINGS, from_run, load, to_yaml
from experiments import compare, parity, status
from reports.data.study import group
from sweeps.study import load_study
from switti.errors import UserError
from switti.sampling.config import SamplingConfig
from switti.sampling.pipeline import SwittiPipeline
from switti.text.base import TextEmbedding

MINUTE = "2026-01-01T00:1{}:00+00:00"
RECORD: dict[str, Any] = {
    "format": 1, "status": "finished", "name": "a", "study": "s", "task": "generator", "seed": 0, "step": 30,
    "max_steps": 30, "error": None, "pid": 99, "host": "h", "started": MINUTE.format(0), "updated": MINUTE.format(5),
    "ended": MINUTE.format(5), "train_seconds": 60.0, "resumed": [10], "parameters": {"generator": 1000},
    "versions": {"torch": "2"}, "tokens_per_image": 30, "world_size": 1, "peak_memory_bytes": 10**8, "commit": "abc",
    "device": "cpu", "command": "python -m experiments.train",
    "data": {"train": {"digest": "a" * 16}, "validation": {"digest": "b" * 16}},
}  # fmt: skip
EVALUATION = {
    "step": 30, "pictures": 4, "captions": "validation", "settings": {"guidance": 4.0},
    "metrics": {"mini_clip_score": 0.1, "fid_alexnet": 20.0}, "metrics_stopped_early": {"fid_alexnet": 21.0},
    "sampling": {
        "seconds_per_scale": [0.1, 0.2, 0.3], "seconds_total": 0.6, "batch": 8, "guidance_stop": None,
        "cache_bytes": 0, "seconds_by_round": [0.6, 0.7], "processor_seconds_by_round": [0.6, 0.6],
        "timed_together": "x",
    },
}  # fmt: skip
YAML_WORDS = (
    b"null", b"[]", b"{}", b"&a [*a]", b"*a", b"!!python/object/apply:os.system [ls]", b"${seed}", b"${oc.env:HOME}",
    b"base: x.yaml\n", b": ", b"- ", b"\t", b"1e999", b".nan", b".inf", b"0o17", b"seed: 1\n", b"<<: {a: 1}\n",
    b"2026-01-01", b"yes",
)  # fmt: skip
STUDY = """\
name: x
base: generator/tiny
vary:
  seed: [0, 1]
  model.visibility: [causal, non_causal]
pair_by: seed
"""
SEARCH = """\
name: y
base: generator/tiny
search:
  metric: validation/loss
  trials: 3
  space:
    optimizer.learning_rate: {low: 0.0001, high: 0.01, log: true}
"""


class RunFolders(Target):
    """A study of two runs with one file damaged: status, comparison, settings."""

    name = "runs"
    refusals = (UserError,)
    slowness = 6.0

    def build(self, home: Path) -> None:
        self.study = home / "s"
        for name, visibility in (("a", "causal"), ("b", "non_causal")):
            config = load(
                "generator/tiny",
                [f"runs_dir={home}", "study=s", f"name={name}", f"model.visibility={visibility}"],
            )
            folder = config.run_dir
            for inside in ("samples/latest", "heartbeat", "checkpoints"):
                (folder / inside).mkdir(parents=True)
            (folder / "config.yaml").write_text(to_yaml(config))
            (folder / "record.json").write_text(json.dumps(RECORD | {"name": name}))
            rows = [
                f"{step},0,{metric},{1 / step},{time.time()}"
                for step in (10, 20, 30)
                for metric in (
                    "train/loss",
                    "validation/loss",
                    "validation/loss_by_scale/0",
                    "validation/unigram_entropy",
                    "metrics/fid_alexnet",
                )
            ]
            (folder / "metrics.csv").write_text("step,epoch,metric,value,time\n" + "\n".join(rows) + "\n")
            (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
            index = {"prompts": ["a", "b"], "seeds": [0, 1], "files": ["0.png", "1.png"], "step": 30}
            (folder / "samples/latest/index.json").write_text(json.dumps(index))
            for n in range(2):
                Image.new("RGB", (8, 8), "red").save(folder / f"samples/latest/{n}.png")
            (folder / "heartbeat/rank_0.json").write_text(
                json.dumps({"format": 1, "time": time.time(), "step": 30, "phase": "training", "pid": 9})
            )
            (folder / "damaged.csv").write_text(
                "shard,key,kind,reason\ntrain-000000,k,undecodable_picture,x\n"
            )
        runs = [{"name": "a"}, {"name": "b"}]
        (self.study / "study.json").write_text(
            json.dumps(
                {
                    "format": 1,
                    "name": "s",
                    "runs": runs,
                    "vary": {"model.visibility": ["causal", "non_causal"]},
                }
            )
        )

    def mutate(self, chance: Chance, folder: Path) -> None:
        shutil.copytree(self.study, folder / "s")
        if chance.random() < 0.02:
            # The whole page, which takes seconds.
            (folder / "report").touch()
        path = chance.choice(sorted(path for path in (folder / "s").rglob("*") if path.is_file()))
        if (
            path.name in ("record.json", "metrics.csv", "config.yaml", "evaluation.json")
            or chance.random() < 0.5
        ):
            data = path.read_bytes()
        else:
            path = folder / "s" / "a" / chance.choice(("record.json", "metrics.csv"))
            data = path.read_bytes()
        if path.suffix == ".json":
            path.write_bytes(mutate_json(chance, json.loads(data)))
        elif path.suffix in (".csv", ".yaml"):
            words = (
                b"validation/loss",
                b"nan",
                b"inf",
                b"-1",
                b"9" * 30,
                b"1e400",
                b'"',
                b",,",
                b"null",
                b"${seed}",
                b"!!python/name:os.system",
            )
            path.write_bytes(mutate_text(chance, data.decode(), words))
        else:
            path.write_bytes(mutate_bytes(chance, data))

    def read(self, folder: Path) -> None:
        study = folder / "s"
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            status.main([str(study), "--once"])
        if not {"a", "b"} <= set(printed.getvalue().split()):
            raise SilentError("status forgets a run")
        runs, _ = compare.read_runs([study / "a", study / "b"], set())
        group(runs, "seed", None)
        if (folder / "report").exists():
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                compare.main([str(study), "--out", str(folder / "page")])
        from_run(study / "a")


class Yaml(Target):
    """Files of settings and of studies."""

    name = "yaml"
    refusals = (UserError,)

    def build(self, home: Path) -> None:
        self.config = to_yaml(load("generator/tiny"))
        self.study, self.search = STUDY, SEARCH

    def mutate(self, chance: Chance, folder: Path) -> None:
        kind = chance.choice(("config", "study", "search"))
        (folder / f"{kind}.yaml").write_bytes(mutate_text(chance, getattr(self, kind), YAML_WORDS))

    def read(self, folder: Path) -> None:
        path = next(folder.glob("*.yaml"))
        load(path) if path.stem == "config" else load_study(str(path))


class CommandLines(Target):
    """`key=value` of any kind."""

    name = "command_lines"
    refusals = (UserError,)

    def mutate(self, chance: Chance, folder: Path) -> None:
        settings = []
        for _ in range(chance.randint(1, 3)):
            name = chance.choice(sorted(SETTINGS))
            if chance.random() < 0.2:
                name = mutate_bytes(chance, name.encode()).decode("utf-8", "surrogateescape")
            value = chance.choice(ODD)
            settings.append(f"{name}={value if isinstance(value, str) else json.dumps(value)}")
        (folder / "settings.json").write_text(json.dumps(settings))

    def read(self, folder: Path) -> None:
        config = load("generator/tiny", json.loads((folder / "settings.json").read_text()))
        to_yaml(config).encode("utf-8", "surrogatepass")


class Letters:
    """A text encoder whose values follow from the caption alone."""

    name, width, pooled_width, max_length, truncated, fingerprint = "letters", 6, 5, 4, 0, "f"

    def encode(self, captions: list[str]) -> TextEmbedding:
        rows = [torch.Generator().manual_seed(sum(map(ord, caption))) for caption in captions]
        tokens = torch.stack([torch.randn(4, 6, generator=row) for row in rows])
        pooled = torch.stack([torch.randn(5, generator=row) for row in rows])
        return TextEmbedding(tokens, torch.ones(len(captions), 4, dtype=torch.bool), pooled)


class Sampling(Target):
    """Calls of the pipeline with arguments of any kind."""

    name = "sampling"
    refusals = (UserError,)

    def build(self, home: Path) -> None:
        made = parts()
        self.pipeline = SwittiPipeline(
            made.generator, made.tokenizer, Letters(), SamplingConfig(), False, made.text
        )  # type: ignore[arg-type]

    def mutate(self, chance: Chance, folder: Path) -> None:
        call: dict[str, Any] = {"prompts": "a"}
        names = (
            "guidance",
            "guidance_start",
            "guidance_stop",
            "late_temperature",
            "top_k",
            "top_p",
            "gumbel",
            "gumbel_start",
        )
        others = (
            "seeds", "negative_prompt", "prompts", "num_images_per_prompt", "batch_size", "output_type",
            "switch_prompts", "switch_scale", "crop", "generator", "sampling",
        )  # fmt: skip
        for _ in range(chance.randint(1, 3)):
            name = chance.choice(names if chance.random() < 0.6 else others)
            usual = (
                0,
                1,
                2,
                3,
                0.5,
                1.0,
                0.999,
                1e5,
                1e-5,
                -1.0,
                None,
                True,
                False,
                "a",
                [1],
                ["a"],
                [2**64 - 1],
            )
            odd = (*ODD, 1e39, 1e38, 1e-300, 10**9, ["a", "b"], [2**64], ["\udcff"])
            value = chance.choice(usual if chance.random() < 0.7 else odd)
            large = name == "num_images_per_prompt" and type(value) in (int, float) and value > 4
            call[name] = 2 if large else value
        (folder / "call.json").write_text(json.dumps(call))

    def read(self, folder: Path) -> None:
        call = json.loads((folder / "call.json").read_text())
        found = self.pipeline(call.pop("prompts"), **({"output_type": "pt"} | call))
        if isinstance(found, torch.Tensor) and not found.isfinite().all():
            raise SilentError("an image that is not finite")


class GoldenFolders(Target):
    """Golden tensors and their settings."""

    name = "golden"
    refusals = (UserError,)

    def build(self, home: Path) -> None:
        source = Path(__file__).parents[1] / "data" / "parity"
        meta = json.loads((source / "meta.json").read_text())
        self.meta = {key: meta[key] for key in ("patch_nums", "functions")}
        self.tensors = (source / "functions.safetensors").read_bytes()

    def mutate(self, chance: Chance, folder: Path) -> None:
        tensors = chance.random() < 0.5
        (folder / "meta.json").write_bytes(
            json.dumps(self.meta).encode() if tensors else mutate_json(chance, self.meta)
        )
        (folder / "functions.safetensors").write_bytes(
            mutate_safetensors(chance, self.tensors) if tensors else self.tensors
        )

    def read(self, folder: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            if parity.main([str(folder)]) not in (0, 1):
                raise SilentError("another exit code")
