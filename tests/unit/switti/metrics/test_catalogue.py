"""The registry of image metrics: complete entries, facts from classes, and facts from files that hold anything."""

from typing import Any

import pytest
import torch
from torchmetrics import Metric

from switti.errors import UserError
from switti.import_path import load_object
from switti.metrics.catalogue import BUILT_IN, IMAGE_METRICS, find_info, from_record, info_of, to_record
from switti.metrics.collection import build_metrics
from switti.metrics.config import MetricsConfig


class MeanRed(Metric):
    """Mean of the red channel.

    Further sentences stay out of reports.
    """

    title, unit, higher_is_better = "red", "%", True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, images: torch.Tensor, captions: list[str]) -> None:
        self.total += images[:, 0].double().mean((1, 2)).sum()
        self.count += len(captions)

    def compute(self) -> torch.Tensor:
        return self.total / self.count


class FidAlexnet(MeanRed):
    """Its label is that of a built-in metric."""


def test_every_entry_is_complete() -> None:
    assert set(BUILT_IN) >= {
        "fid_alexnet",
        "mini_clip_score",
        "mini_clip_top1",
        "clip_score",
        "pick_score",
        "image_reward",
    }
    conventions = ("pytorch_fid", "torch_fidelity", "clean")
    assert {f"{kind}_inception_{name}" for kind in ("fid", "kid") for name in conventions} <= set(BUILT_IN)
    for name, info in IMAGE_METRICS.items():
        assert info.name == name and info.title and info.meaning
        assert find_info(info.label or name) is info
    for name in BUILT_IN:
        assert (
            callable(load_object("metrics.names", IMAGE_METRICS[name].build)) and IMAGE_METRICS[name].network
        )
    assert find_info("clip_score_vit_h_14").title == "CLIPScore (vit_h_14)"  # type: ignore[union-attr]
    assert find_info("unknown") is None


def test_a_metric_of_ones_own_is_measured_beside_the_built_in_ones() -> None:
    metrics = build_metrics(MetricsConfig(names=[], extra=[f"{__name__}:MeanRed"]))
    images = torch.zeros(4, 3, 2, 2)
    images[:, 0] = 0.5
    metrics.update(images, ["a", "b", "c", "d"])
    assert metrics.compute() == {"mean_red": 128.0}
    metrics.reset()
    assert metrics.compute() == {}


def test_facts_survive_a_run_folder() -> None:
    info = info_of(MeanRed)
    assert (info.name, info.title, info.better, info.unit) == ("mean_red", "red", "higher", "%")
    assert info.meaning == "Mean of the red channel."
    assert from_record(to_record({"mean_red": info})) == {"mean_red": info}


@pytest.mark.parametrize(
    "content",
    [None, 3, [], {"x": 3}, {"x": {"better": "up"}}, {"x": {"better": None, "title": 3}},
     {"x": {"better": "lower", "title": "t" * 81}}, {"x": {"better": ["lower"]}}],
)  # fmt: skip
def test_facts_that_are_none_are_ignored(content: Any) -> None:
    assert from_record(content) == {}


def test_a_label_that_is_taken_is_refused() -> None:
    with pytest.raises(UserError, match="there is a metric fid_alexnet already; rename the class"):
        build_metrics(MetricsConfig(names=[], extra=[f"{__name__}:FidAlexnet"]))
