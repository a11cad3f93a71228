"""OnlineMetrics with a small module: when it measures, what it samples, what it leaves untouched."""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from callbacks.online_metrics import OnlineMetrics, same_modes, shares
from callbacks.prompt_set import PromptSet
from switti.errors import UserError
from switti.sampling.config import SamplingConfig
from switti.text.base import TextEmbedding

PROMPTS = [f"image {index}" for index in range(5)]
SAMPLING = SamplingConfig(guidance=3.0)


class Module(pl.LightningModule):
    """Generates images whose grey value is seed / 100; draws random numbers, as a careless model might."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Dropout(0.5))
        self.frozen = torch.nn.Dropout(0.5).eval()
        self.calls: list[tuple[int, int, list[int]]] = []
        self.draws: list[float] = []

    def generate(
        self, text: TextEmbedding, null: TextEmbedding, seeds: list[int], sampling: SamplingConfig
    ) -> Tensor:
        assert sampling is SAMPLING
        assert text.pooled_BP[:, 0].tolist() == [seed % 10 for seed in seeds]
        self.calls.append((self.trainer.global_step, len(null), list(seeds)))
        self.eval()
        torch.rand(3), np.random.rand(3), random.random()
        return torch.tensor(seeds).view(-1, 1, 1, 1).expand(-1, 3, 4, 4) / 100

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        self.draws += [float(torch.rand(())), np.random.rand(), random.random()]
        return self.layer(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Recorder:
    """Mean grey value of what was passed, and the captions in order."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.real = 0
        self.grey: list[float] = []
        self.captions: list[str] = []
        self.candidates: list[str] = []

    def set_candidates(self, captions: list[str]) -> None:
        self.candidates = captions

    def update(self, images: Tensor, captions: list[str]) -> None:
        self.grey += images.mean(dim=(1, 2, 3)).tolist()
        self.captions += captions

    def update_real(self, images: Tensor) -> None:
        self.real += len(images)

    def compute(self) -> dict[str, float]:
        return {"grey": sum(self.grey) / len(self.grey)}

    def reset(self) -> None:
        self.grey, self.captions = [], []


def _embedding(count: int) -> TextEmbedding:
    rows = torch.arange(count, dtype=torch.float32)
    return TextEmbedding(torch.zeros(count, 2, 3), torch.ones(count, 2).bool(), rows.view(-1, 1))


def _prompts(**values: Any) -> PromptSet:
    settings: dict[str, Any] = {
        "prompts": PROMPTS, "text": _embedding(5), "null": _embedding(1), "seeds": [10, 11, 12, 13, 14],
        "sampling": SAMPLING,
    } | values  # fmt: skip
    return PromptSet(**settings)


def _callback(every: int = 2) -> OnlineMetrics:
    return OnlineMetrics(every, _prompts(), torch.rand(7, 3, 4, 4), Recorder, batch=2)


def _fit(
    tmp_path: Any, callbacks: list[pl.Callback], steps: int = 5, accumulate: int = 1
) -> tuple[Module, pl.Trainer]:
    pl.seed_everything(0, verbose=False)
    module = Module()
    trainer = pl.Trainer(
        max_steps=steps, accumulate_grad_batches=accumulate, callbacks=callbacks, accelerator="cpu",
        logger=CSVLogger(tmp_path, flush_logs_every_n_steps=1), log_every_n_steps=1000, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(64, 2), batch_size=2))
    return module, trainer


def test_candidates_are_those_given_or_the_prompts(tmp_path: Any) -> None:
    for given, expected in ((None, PROMPTS), (["x", "y"], ["x", "y"])):
        callback = OnlineMetrics(2, _prompts(), torch.rand(7, 3, 4, 4), Recorder, batch=2, candidates=given)
        _fit(tmp_path, [callback], steps=1)
        assert callback.metrics is not None and callback.metrics.candidates == expected


def test_measures_on_its_steps_and_at_the_end(tmp_path: Any) -> None:
    callback = _callback()
    module, trainer = _fit(tmp_path, [callback])
    # steps 2, 4 and the last one, 5; three batches of at most two images each
    assert [call[0] for call in module.calls] == [2] * 3 + [4] * 3 + [5] * 3
    assert [call[2] for call in module.calls[:3]] == [[10, 11], [12, 13], [14]]
    assert {call[1] for call in module.calls} == {1}
    metrics = callback.metrics
    assert isinstance(metrics, Recorder)
    assert metrics.captions == PROMPTS
    assert metrics.real == 7
    rows = np.genfromtxt(f"{trainer.logger.log_dir}/metrics.csv", delimiter=",", names=True, deletechars="")
    assert rows["step"].tolist() == [2, 4, 5]
    np.testing.assert_allclose(rows["metrics/grey"], 0.12, rtol=1e-5)
    assert float(trainer.callback_metrics["metrics/grey"]) == pytest.approx(0.12)


def test_measures_once_while_gradients_accumulate(tmp_path: Any) -> None:
    module, _ = _fit(tmp_path, [_callback()], steps=4, accumulate=3)
    assert [call[0] for call in module.calls] == [2] * 3 + [4] * 3


def test_leaves_random_numbers_and_modes_alone(tmp_path: Any) -> None:
    watched, _ = _fit(tmp_path / "a", [_callback(every=1)])
    plain, _ = _fit(tmp_path / "b", [])
    assert watched.draws == plain.draws
    for ours, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def _evaluate_and_fail(module: Module) -> None:
    with same_modes(module):
        module.eval()
        raise ValueError("inside")


def test_modes_come_back_after_an_error() -> None:
    module = Module()
    module.train()
    module.frozen.eval()
    with pytest.raises(ValueError, match="inside"):
        _evaluate_and_fail(module)
    assert module.training and module.layer[1].training and not module.frozen.training


@pytest.mark.parametrize(
    ("count", "world", "batch"), [(5, 1, 2), (5, 4, 1), (3, 4, 2), (64, 3, 16), (7, 7, 3)]
)
def test_shares_cover_all_rows_once_in_equally_many_batches(count: int, world: int, batch: int) -> None:
    ranks = [list(shares(count, rank, world, batch)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(0 < len(rows) <= batch for batches in ranks for rows, _ in batches)
    counted = [row for batches in ranks for rows, counts in batches if counts for row in rows]
    assert sorted(counted) == list(range(count))


@pytest.mark.parametrize("values", [{"seeds": [1, 2]}, {"text": _embedding(4)}])
def test_unequal_rows_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="as many captions"):
        _prompts(**values)


def test_metrics_without_a_caption_are_refused() -> None:
    none = _prompts(prompts=[], text=_embedding(0), seeds=[])
    with pytest.raises(UserError, match=r"callbacks\.metrics_every=0"):
        OnlineMetrics(1, none, torch.rand(7, 3, 4, 4), Recorder)
