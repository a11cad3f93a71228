"""The pyramid's geometry against sums done by hand."""

import pytest
import torch

from benchmarks.reference_model import dense_mask
from switti.errors import UserError
from switti.scales import Pyramid

RELEASED = {
    256: ((1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 680),
    512: ((1, 2, 3, 4, 6, 9, 13, 18, 24, 32), 2240),
    1024: ((1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64), 9451),
}


@pytest.mark.parametrize("resolution", RELEASED)
def test_published_lengths(resolution: int) -> None:
    sides, length = RELEASED[resolution]
    pyramid = Pyramid(sides)
    assert pyramid.length == length
    assert pyramid.spans[-1] == (length - sides[-1] ** 2, length)
    assert pyramid.latent_side * 16 == resolution


def test_levels_spans_and_masks_by_hand() -> None:
    pyramid = Pyramid((1, 2, 3))
    assert pyramid.spans == ((0, 1), (1, 5), (5, 14))
    assert pyramid.levels().tolist() == [0] + [1] * 4 + [2] * 9
    assert [pyramid.ratio(k) for k in range(3)] == [0.0, 0.5, 1.0]
    own, prefix = dense_mask(pyramid, "non_causal"), dense_mask(pyramid, "causal")
    assert own.sum().item() == 1 + 16 + 81
    assert prefix.sum().item() == 1 + 4 * 5 + 9 * 14
    assert prefix[3, 1] and not prefix[3, 5] and not own[5, 1]
    assert [part.shape[1] for part in pyramid.split(torch.zeros(2, 14))] == [1, 4, 9]


@pytest.mark.parametrize("sides", [(), (0, 1), (2, 2), (3, 1)])
def test_impossible_pyramids(sides: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="strictly increasing"):
        Pyramid(sides)
