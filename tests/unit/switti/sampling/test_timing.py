"""Timing in turn, on a clock of the test's own: medians, order, and what a loaded machine does to it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from switti.sampling import timing
from switti.sampling.config import SamplingConfig
from switti.sampling.timing import TimedCase, time_in_turn

SECONDS = {"slow": (1.0, 3.0), "fast": (1.0, 2.0)}  # of the two scales


class Words(list):
    def to(self, device: torch.device) -> "Words":
        return self


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which case was sampled, in order. Each round of the two cases finds a machine twice as busy as the last."""
    clock, order = SimpleNamespace(now=0.0), list[str]()

    def sample(
        model: str, _tokenizer: Any, _text: Any, _null: Any, _sampling: Any, _noise: Any, **hooks: Any
    ):
        for scale, seconds in enumerate(SECONDS[model]):
            clock.now += seconds * 2.0 ** (len(order) // 2)
            hooks["on_scale_end"](SimpleNamespace(scale=scale, cache_bytes=scale * len(model)))
        order.append(model)

    monkeypatch.setattr(timing, "sample_latent", sample)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)
    return order


def cases() -> list[TimedCase]:
    encoder = SimpleNamespace(encode=Words)
    return [
        TimedCase(
            SimpleNamespace(  # type: ignore[arg-type]
                device=torch.device("cpu"),
                autocast=False,
                text_encoder=encoder,
                generator=name,
                tokenizer=None,
            ),
            Words(["a", "b"]),  # type: ignore[arg-type]
            SamplingConfig(guidance_stop=stop),
        )
        for name, stop in (("slow", None), ("fast", 0))
    ]


def test_rounds_meet_the_same_load_and_begin_in_turn(played: list[str]) -> None:
    slow, fast = time_in_turn(cases(), rounds=3)
    assert played == ["slow", "fast", "slow", "fast", "fast", "slow", "slow", "fast"]
    # The warm-up had load 1, the rounds 2, 4 and 8: medians are those of load 4, the warm-up's is left out.
    assert slow["seconds_by_round"] == [8.0, 16.0, 32.0] and fast["seconds_by_round"] == [6.0, 12.0, 24.0]
    assert slow["seconds_per_scale"] == [4.0, 12.0] and slow["seconds_total"] == 16.0
    assert {a / b for a, b in zip(slow["seconds_by_round"], fast["seconds_by_round"], strict=True)} == {4 / 3}
    assert (slow["batch"], slow["guidance_stop"], fast["guidance_stop"]) == (2, None, 0)
    assert (slow["cache_bytes"], fast["cache_bytes"]) == (4, 4)


def test_one_call_is_told_from_another(played: list[str]) -> None:
    first, second = time_in_turn(cases(), rounds=1), time_in_turn(cases(), rounds=1)
    assert first[0]["timed_together"] == first[1]["timed_together"] != second[0]["timed_together"]
