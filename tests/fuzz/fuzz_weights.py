"""Targets of weights: exported folders, files of weights, checkpoints in one file and in shards."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fuzz_campaign import CANARY, SilentError, Target
from fuzz_mutations import (
    Chance,
    mutate_bytes,
    mutate_json,
    mutate_pickle,
    mutate_safetensors,
    mutate_text,
    mutate_zip,
)
from torch import Tensor

from callbacks.checkpoint_io import AtomicCheckpointIO
from callbacks.checkpointing import corruption, find_resume
from configs.load_run import find_run, load_generator_state
from configs.loading import load, to_yaml
from configs.schema import RunConfig
from switti.distributed import sharded_checkpoint as sharded
from switti.errors import UserError
from switti.models.config import GeneratorConfig
from switti.models.transformer import ScaleTransformer
from switti.sampling.config import SamplingConfig
from switti.sampling.noise import ImageNoise
from switti.sampling.pipeline_folder import Parts, read_parts, write_parts
from switti.sampling.sampler import sample_latent
from switti.text.base import TextEmbedding
from switti.text.config import TextConfig
from switti.tokenizer.config import RQVAEConfig
from switti.tokenizer.rqvae import RQVAE
from switti.weights.load import load_generator, load_tokenizer
from switti.weights.save import save_tokenizer

SCALES = [1, 2, 3]
SMALL = RQVAEConfig(
    scales=SCALES, codebook_size=16, code_width=4, channels=32, multipliers=[1, 1], residual_blocks=1
)  # fmt: skip
GENERATOR = GeneratorConfig(
    depth=1, width=16, heads=2, scales=SCALES, codebook_size=16, code_width=4, text_width=6, pooled_width=5
)
LARGEST = 64  # positions along a side that a sampled image may have; larger pyramids are not computed


def parts() -> Parts:
    torch.manual_seed(0)
    text = TextConfig(width=6, pooled_width=5)
    return Parts(
        ScaleTransformer(GENERATOR).eval(), RQVAE(SMALL).eval(), text, SamplingConfig(), False, {"step": 3}
    )


def sample(found: Parts) -> None:
    """An image from them, with any caption."""
    config = found.generator.config
    if max(config.scales) > LARGEST or config.depth > 4:
        return
    text = TextEmbedding(
        torch.randn(1, 3, config.text_width),
        torch.ones(1, 3, dtype=torch.bool),
        torch.randn(1, config.pooled_width),
    )
    with torch.no_grad():
        latent = sample_latent(
            found.generator,
            found.tokenizer,
            text,
            text,
            found.sampling,
            ImageNoise([0], torch.device("cpu")),
        )
        found.tokenizer.decode(latent)


def change(chance: Chance, path: Path, marker: Path) -> None:
    """One file of any kind, mutated after its kind."""
    data = path.read_bytes()
    if path.suffix == ".json":
        path.write_bytes(mutate_json(chance, json.loads(data)))
    elif path.suffix == ".safetensors":
        path.write_bytes(mutate_safetensors(chance, data))
    elif path.suffix in (".ckpt", ".pth", ".pt", ".bin") and data[:2] == b"PK":
        path.write_bytes(mutate_zip(chance, data, str(marker)))
    elif path.name == ".metadata":
        path.write_bytes(mutate_pickle(chance, data, str(marker)))
    elif path.suffix == ".yaml":
        path.write_bytes(
            mutate_text(
                chance,
                data.decode(),
                (b"null", b"[1]", b"${seed}", b"!!python/object:os.system", b"&a", b"*a", b": "),
            )
        )
    else:
        path.write_bytes(mutate_bytes(chance, data))


def one_file(chance: Chance, folder: Path) -> Path:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    small = [path for path in files if path.suffix == ".json" or path.name == ".metadata"]
    return chance.choice(small if small and chance.random() < 0.5 else files)


class Exported(Target):
    """An exported folder."""

    name = "exported"
    refusals = (UserError,)

    def build(self, home: Path) -> None:
        self.home = home
        write_parts(home / "out", parts())

    def mutate(self, chance: Chance, folder: Path) -> None:
        shutil.copytree(self.home / "out", folder / "out")
        path = one_file(chance, folder / "out")
        if chance.random() < 0.05:
            path.unlink()
        else:
            change(chance, path, self.home.parent / CANARY)

    def read(self, folder: Path) -> None:
        sample(read_parts(folder / "out"))


class Weights(Target):
    """Single files of weights with or without a config.json beside them."""

    name = "weights"
    refusals = (UserError,)

    def build(self, home: Path) -> None:
        self.home, made = home, parts()
        for name in ("t1", "t2", "g1", "g2"):
            (home / name).mkdir()
        save_tokenizer(made.tokenizer, home / "t1" / "w.safetensors")
        torch.save(made.tokenizer.state_dict(), home / "t2" / "w.pth")
        (home / "t2" / "config.json").write_text(json.dumps(vars(SMALL)))
        write_parts(home / "x", made)
        shutil.copy(home / "x" / "generator" / "model.safetensors", home / "g1" / "w.safetensors")
        shutil.copy(home / "x" / "generator" / "config.json", home / "g1")
        torch.save(
            {"state_dict": {f"generator.{k}": v for k, v in made.generator.state_dict().items()}},
            home / "g2" / "w.bin",
        )
        shutil.copy(home / "x" / "generator" / "config.json", home / "g2")
        shutil.rmtree(home / "x")

    def mutate(self, chance: Chance, folder: Path) -> None:
        shutil.copytree(self.home / chance.choice(("t1", "t2", "g1", "g2")), folder / "w")
        (folder / "kind").write_text(
            "generator"
            if (folder / "w" / "config.json").exists()
            and "depth" in (folder / "w" / "config.json").read_text()
            else "tokenizer"
        )
        change(chance, one_file(chance, folder / "w"), self.home.parent / CANARY)

    def read(self, folder: Path) -> None:
        path = next(path for path in (folder / "w").iterdir() if path.name != "config.json")
        if (folder / "kind").read_text() == "generator":
            load_generator(path)
        else:
            load_tokenizer(path)


def tiny_run(home: Path, name: str) -> RunConfig:
    config = load(
        "generator/tiny",
        [f"runs_dir={home}", "study=s", f"name={name}", f"tokenizer_weights={home}/t.safetensors"],
    )
    (config.run_dir / "checkpoints").mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    return config


def state() -> dict[str, Any]:
    """A checkpoint as training leaves it, as small as may be."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    weights = {
        f"{name}.{k}": v for name in ("generator", "ema_generator") for k, v in model.state_dict().items()
    }
    return {
        "state_dict": weights, "global_step": 8, "epoch": 0, "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last_epoch": 8}], "callbacks": {"DataPosition": {"consumed": 256}},
        "pytorch-lightning_version": "2.6.0",
        "random": [{"torch": torch.get_rng_state(), "python": (3, tuple(range(9)), None)}], "config": {"seed": 0},
    }  # fmt: skip


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


class Checkpoints(Target):
    """A run with a checkpoint: sampled from, exported, resumed."""

    name = "checkpoints"
    refusals = (UserError,)

    def build(self, home: Path) -> None:
        self.home = home
        self.run = tiny_run(home, "r").run_dir
        torch.save(state(), self.run / "checkpoints" / "step_000008.ckpt")

    def mutate(self, chance: Chance, folder: Path) -> None:
        shutil.copytree(self.run, folder / "r")
        path = folder / "r" / ("checkpoints/step_000008.ckpt" if chance.random() < 0.9 else "config.yaml")
        change(chance, path, self.home.parent / CANARY)

    def read(self, folder: Path) -> None:
        checkpoint = find_resume(folder / "r")
        if checkpoint is not None:
            AtomicCheckpointIO().load_checkpoint(checkpoint)
        _, checkpoint = find_run(folder / "r" / "checkpoints" / "step_000008.ckpt")
        load_generator_state(checkpoint)


class ShardedCheckpoints(Target):
    """The same in the parts of several ranks, with checksums: what passes them is what was written."""

    name = "sharded"
    refusals = (UserError,)

    def build(self, home: Path) -> None:
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Replicate, distribute_tensor

        self.home = home
        self.run = tiny_run(home, "r").run_dir
        dist.init_process_group("gloo", init_method=f"file://{home}/rendezvous", rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            content = state()
            content["state_dict"] = {
                k: distribute_tensor(v, mesh, [Replicate()]) for k, v in content["state_dict"].items()
            }
            content["optimizer_states"] = []
            path = self.run / "checkpoints" / "step_000008.ckpt"
            work = path.with_name(".step_000008.ckpt.tmp")
            sharded.write_sharded(content, work)
            sharded.publish(path)
        finally:
            dist.destroy_process_group()
        self.expected = sharded.read_tensors(self.run / "checkpoints" / "step_000008.ckpt")

    def mutate(self, chance: Chance, folder: Path) -> None:
        shutil.copytree(self.run, folder / "r")
        checkpoint = folder / "r" / "checkpoints" / "step_000008.ckpt"
        path = one_file(chance, checkpoint)
        if chance.random() < 0.05:
            path.unlink()
        else:
            change(chance, path, self.home.parent / CANARY)

    def read(self, folder: Path) -> None:
        path = folder / "r" / "checkpoints" / "step_000008.ckpt"
        whole = path.exists() and corruption(path) is None
        find_resume(folder / "r")
        _, checkpoint = find_run(path)
        found = sharded.read_tensors(checkpoint)
        if whole and not same(found, self.expected):
            raise SilentError("its checksums are right, its tensors are others")
        load_generator_state(checkpoint)
        sharded.read_unsharded(checkpoint)
