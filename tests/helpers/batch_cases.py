"""Data modules over made-up shards, and what their batches hold."""

from types import SimpleNamespace

from datamodules.config import DataConfig
from datamodules.datamodule import ShardDataModule


def module(folder, rank=0, world_size=1, seed=5, accumulate=1, resolution=8, **settings) -> ShardDataModule:
    """A data module on the folder's shards as one rank sees it."""
    defaults = {"batch_size": 4, "workers": 0, "shuffle_window_shards": 2, "caption_dropout": 0.3}
    paths = {"train": f"{folder}/train-*.tar", "validation": f"{folder}/validation-*.tar"}
    config = DataConfig(**(paths | defaults | settings))
    config.validate("data")
    data = ShardDataModule(config, seed=seed, resolution=resolution, accumulate=accumulate)
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
    return data


def take(data: ShardDataModule, batches: int) -> list[dict]:
    """So many training batches, the position advanced after each as the training loop does."""
    data.setup("fit")
    taken = []
    for batch in data.train_dataloader():
        taken.append(batch)
        data.advance()
        if len(taken) == batches:
            return taken
    raise AssertionError("the training loader has an end")


def rows(batches: list[dict]) -> list[tuple]:
    """One comparable tuple a sample."""
    return [
        (b["key"][i], b["caption"][i], int(b["seed"][i]), bool(b["dropped"][i]), b["crop"][i].tolist(),
         b["image"][i].numpy().tobytes())
        for b in batches
        for i in range(len(b["key"]))
    ]  # fmt: skip
