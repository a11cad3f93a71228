"""Sharded checkpoints in one process: a group of one rank writes what any number of them can read."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from switti.distributed.optimizer_state import named_state
from switti.distributed.sharded_checkpoint import (
    corruption,
    holds_shards,
    is_sharded,
    load_into,
    publish,
    read_tensors,
    read_unsharded,
    snapshot,
    write_sharded,
)
from switti.errors import UserError
from switti.files import temporary_beside
from switti.weights.fill import WeightsError

pytestmark = pytest.mark.usefixtures("group_of_one")


def trained(width: int = 6) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A sharded net after two steps, with two groups of parameters in another order than that of their names."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 3))
    for module in (*model, model):
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == n], "weight_decay": 0.1 * n} for n in (2, 1)
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for _ in range(2):
        model(torch.randn(5, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    return {
        "state_dict": get_model_state_dict(model),
        "optimizer_states": [named_state(model, optimizer)],
        "global_step": 2,
    }


def write(path: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    pair = trained()
    write_sharded(checkpoint(*pair), temporary_beside(path))
    assert not is_sharded(path)
    publish(path)
    return pair


def test_read_as_one_device_would_have_written_it(tmp_path: Path) -> None:
    model, optimizer = write(tmp_path / "a.ckpt")
    assert is_sharded(tmp_path / "a.ckpt") and corruption(tmp_path / "a.ckpt") is None
    plain = read_unsharded(tmp_path / "a.ckpt")
    twin = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    twin.load_state_dict(plain["state_dict"])
    groups = [{"params": [p for p in twin.parameters() if p.ndim == n]} for n in (2, 1)]
    again = torch.optim.AdamW(groups, lr=9.0)
    again.load_state_dict(plain["optimizer_states"][0])
    assert [group["weight_decay"] for group in again.param_groups] == [0.2, 0.1]
    batch = torch.randn(7, 4)
    for net, its in ((model, optimizer), (twin, again)):  # a further step of both
        net(batch).square().mean().backward()
        its.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.to_local(), b, rtol=1e-6, atol=1e-7)


def test_filled_in_place(tmp_path: Path) -> None:
    model, optimizer = write(tmp_path / "a.ckpt")
    other, fresh = trained()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.to_local().add_(1)
    rest = load_into(tmp_path / "a.ckpt", other, [fresh])
    assert rest == {"global_step": 2}
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.to_local(), b.to_local())
        for field in ("exp_avg", "exp_avg_sq", "step"):
            before, after = optimizer.state[a][field], fresh.state[b][field]
            assert torch.equal(_local(before), _local(after))


def test_parameters_that_were_never_stepped_have_no_state(tmp_path: Path) -> None:
    """Neither does saving give them one, nor loading: their first step is the first, as Adam's correction counts."""
    model, _ = trained()
    late = torch.optim.AdamW(model.parameters(), lr=0.1)
    half = torch.optim.AdamW(model.parameters(), lr=0.1)
    model[0](torch.randn(5, 4)).square().mean().backward()
    half.step()
    half.zero_grad()
    content = checkpoint(model, late)
    content["optimizer_states"] = [named_state(model, optimizer) for optimizer in (late, half)]
    assert not late.state and len(half.state) == 2
    write_sharded(content, temporary_beside(tmp_path / "a.ckpt"))
    publish(tmp_path / "a.ckpt")
    plain = read_unsharded(tmp_path / "a.ckpt")["optimizer_states"]
    assert [sorted(state["state"]) for state in plain] == [[], [0, 1]]
    torch.save({**content, "state_dict": read_unsharded(tmp_path / "a.ckpt")["state_dict"], "optimizer_states": plain},
               tmp_path / "whole.ckpt")  # fmt: skip
    for source in ("a.ckpt", "whole.ckpt"):
        other, _ = trained()
        fresh = [torch.optim.AdamW(other.parameters(), lr=9.0) for _ in range(2)]
        load_into(tmp_path / source, other, fresh)
        assert not fresh[0].state and [group["lr"] for o in fresh for group in o.param_groups] == [0.1, 0.1]
        assert set(fresh[1].state) == set(other[0].parameters())
        for a, b in zip(model[0].parameters(), other[0].parameters(), strict=True):
            for field in ("exp_avg", "exp_avg_sq", "step"):
                assert torch.equal(_local(half.state[a][field]), _local(fresh[1].state[b][field]))


def _local(value: Any) -> torch.Tensor:
    return value.to_local() if hasattr(value, "to_local") else value


def test_another_width_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.ckpt")
    model, optimizer = trained(width=8)
    with pytest.raises(WeightsError, match=r"state_dict\.0\.weight is \[6, 4\], the settings need \[8, 4\]"):
        load_into(tmp_path / "a.ckpt", model, [optimizer])


def test_part_of_the_tensors(tmp_path: Path) -> None:
    model, _ = write(tmp_path / "a.ckpt")
    found = read_tensors(tmp_path / "a.ckpt", "state_dict.1.")
    assert found.keys() == {"weight", "bias"}
    assert torch.equal(found["weight"], model[1].weight.to_local())


def test_a_snapshot_does_not_change_with_the_model() -> None:
    model, optimizer = trained()
    content = checkpoint(model, optimizer)
    assert holds_shards(content) and not holds_shards({"state_dict": {"a": torch.ones(1)}})
    copy = snapshot(content)
    before = model[0].weight.to_local().clone()
    with torch.no_grad():
        model[0].weight.to_local().zero_()
    assert torch.equal(copy["state_dict"]["0.weight"].to_local(), before)


def test_code_in_the_list_of_contents_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.ckpt")

    class Call:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "called"),)

    (tmp_path / "a.ckpt/.metadata").write_bytes(pickle.dumps(Call()))
    with pytest.raises(UserError, match=r"would run code \(posix\.mkdir\)"):
        read_tensors(tmp_path / "a.ckpt")
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("what", ["folder", "content"])
def test_a_failed_write_leaves_nothing(tmp_path: Path, what: str) -> None:
    content = checkpoint(*trained())
    target = tmp_path / "file" / ".a.ckpt.tmp" if what == "folder" else tmp_path / ".a.ckpt.tmp"
    (tmp_path / "file").write_text("in the way")
    if what == "content":
        content["rest"] = lambda: None  # cannot be saved
    with pytest.raises(RuntimeError, match=r"Not a directory|File exists|pickle"):
        write_sharded(content, target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "rendezvous"]
