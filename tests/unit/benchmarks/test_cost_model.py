"""A planned step against closed forms and against a real one."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost_model import simulated_step
from benchmarks.cost_model.hardware import ACCELERATORS, Accelerator, Layout, find_accelerator, step_time
from benchmarks.cost_model.simulated_step import simulate_step
from benchmarks.cost_model.trace import GATHERED, StepTrace
from benchmarks.flops import head_flops, training_flops
from configs.loading import load
from configs.schema import RunConfig
from experiments import plan
from switti.errors import UserError
from switti.models.transformer import ScaleTransformer
from switti.tokenizer.rqvae import RQVAE


def tiny(*settings: str) -> RunConfig:
    return load("generator/tiny", ["data.batch_size=16", *settings])


HYBRID = ["trainer.strategy=fsdp", "trainer.devices=2", "trainer.num_nodes=2", "trainer.sharding_size=2"]


# ---- what is traced -----------------------------------------------------------------------------------------------


def test_memory_is_counted_by_kind_and_let_go() -> None:
    kept, trace = torch.zeros(10, dtype=torch.float64), StepTrace()
    trace.count([kept, kept[:5]], "before")  # two views of one storage
    with trace:
        trace.phase = "first"
        a = torch.zeros(100)
        b = a + 1
        view = b[:50].view(5, 10)
        del a
        trace.phase = "second"
        c = view * 2
        del b, c
        d = torch.zeros(20)
        assert d.sum() == 0
    # a and b at once; c came when a had gone, d when c had, but the view still holds b.
    assert trace.peak == {"before": 80, "first": 800}


def test_the_largest_moment_counts() -> None:
    trace = StepTrace()
    with trace:
        for size in (5, 50, 20):
            trace.phase = f"of {size}"
            x = torch.zeros(size)
            del x
    assert {kind: size for kind, size in trace.peak.items() if size} == {"of 50": 200}


def test_each_section_has_its_largest_moment() -> None:
    trace = StepTrace()
    with trace:
        for section, sizes in (("a", (5, 50, 20)), ("b", (7, 3))):
            trace.section = (section,)
            for size in sizes:
                x = torch.zeros(size)
                del x
    assert {section: kinds["other"] for (section,), kinds in trace.peaks.items()} == {"a": 200, "b": 28}


def test_gathered_weights_that_are_emptied_in_place_do_not_count() -> None:
    """And torch's own method is not replaced for that."""
    gathered, trace, method = torch.zeros(100), StepTrace(), torch.UntypedStorage.resize_
    trace.count([gathered], GATHERED)
    with trace:
        assert torch.UntypedStorage.resize_ is method
        x = torch.zeros(10)
        gathered.untyped_storage().resize_(0)
        trace.section = ("emptied",)
        y = torch.zeros(20)
        gathered.untyped_storage().resize_(400)
        trace.section = ("filled",)
        z = torch.zeros(5)
    assert [sum(kinds.values()) for kinds in trace.peaks.values()] == [440, 120, 540]
    del x, y, z


def test_operations_by_type() -> None:
    trace, x = StepTrace(), torch.randn(7, 11, requires_grad=True)
    with trace:
        y = x @ torch.randn(11, 13)
        (y.bfloat16() @ torch.randn(13, 3, dtype=torch.bfloat16)).sum().backward()
    assert trace.operations == {torch.float32: 2 * 2 * 7 * 11 * 13, torch.bfloat16: 2 * 2 * 7 * 13 * 3}


# ---- a step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("visibility", ["causal", "non_causal"])
def test_operations_are_those_of_the_formula(visibility: str) -> None:
    config = load("generator/demo", [f"model.visibility={visibility}", "data.batch_size=4"])
    found = simulate_step(config, checkpointing=False, backend="fused")
    tokenizer = RQVAE(config.tokenizer).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tokenizer.teacher_forcing(tokenizer.tokenize(torch.zeros(4, 3, 64, 64)))
    of_tokenizer = counter.get_total_flops()
    expected = training_flops(config.model, 4, config.text.max_length)
    assert found.bfloat16 + found.float32 == pytest.approx(expected + of_tokenizer, rel=0.02)
    # The tolerance is for scores, which fused attention computes again in its backward pass.
    assert found.float32 >= 3 * head_flops(config.model, 4)  # the search for codes is in float32, too
    recomputed = simulate_step(config, checkpointing=True, backend="fused")
    assert recomputed.bfloat16 > 1.2 * found.bfloat16
    assert recomputed.memory["activations"] < 0.1 * found.memory["activations"]


def test_a_sharded_step_exchanges_what_the_formula_says() -> None:
    """bfloat16 blocks, float32 outside of them; gradients reduced in float32; once a step."""
    model = ScaleTransformer(tiny().model)
    trained = [p for p in model.parameters() if p.requires_grad]
    in_blocks = sum(p.numel() for p in model.blocks.parameters())
    outside = sum(p.numel() for p in model.parameters()) - in_blocks
    for accumulate in (1, 4):
        config = tiny(*HYBRID, "trainer.precision=bf16-mixed", f"trainer.accumulate={accumulate}")
        found = simulate_step(config, checkpointing=False, backend="fused")
        gathers = 2 if accumulate == 1 else 1  # of a block: again for the backward pass, unless it has stayed
        # Parts of unequal size are filled up, hence the tolerance.
        assert found.received["all-gather"] == pytest.approx(
            (2 * gathers * in_blocks + 4 * outside) / 2, rel=0.02
        )
        gradients = 4 * sum(p.numel() for p in trained)
        assert found.received["reduce-scatter"] == pytest.approx(gradients / 2, rel=0.02)
        assert found.received["all-reduce"] == pytest.approx(2 * gradients / 2 / 2, rel=0.02)
        assert found.parameters == pytest.approx(found.unsharded / 2, rel=0.02)
        assert found.memory["optimizer"] == pytest.approx(2 * found.memory["weights"], rel=0.02)


def test_a_ring_of_copies_reduces_each_gradient_once() -> None:
    found = simulate_step(
        tiny("trainer.strategy=ddp", "trainer.devices=4"), checkpointing=False, backend="fused"
    )
    trained = sum(p.numel() for p in ScaleTransformer(tiny().model).parameters() if p.requires_grad)
    assert found.received == {"all-reduce": 2 * 4 * trained * 3 // 4}
    assert found.parameters == found.unsharded == trained


@pytest.mark.parametrize(
    "settings, checkpointing",
    [
        # Most at the end: gradients outweigh activations.
        pytest.param(["trainer.strategy=ddp", "trainer.devices=2"], False, marks=pytest.mark.slow),
        pytest.param(["model.visibility=causal", "data.batch_size=64"], True, marks=pytest.mark.slow),
        ([*HYBRID, "trainer.accumulate=2", "trainer.precision=bf16-mixed"], True),
        pytest.param([*HYBRID, "data.batch_size=64"], False, marks=pytest.mark.slow),
        pytest.param(["trainer.strategy=fsdp", "trainer.devices=3", "data.batch_size=3"], True, marks=pytest.mark.slow),
    ],
    ids=str,
)  # fmt: skip
def test_a_deep_network_needs_what_simulating_all_of_its_blocks_gives(
    settings: list[str], checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("model.depth=7", *settings)
    found = simulate_step(config, checkpointing, backend="fused")
    monkeypatch.setattr(simulated_step, "FEW_BLOCKS", 7)
    expected = simulate_step(config, checkpointing, backend="fused")
    # The count of kernels is extrapolated from a few blocks, and may be one off.
    assert found.kernels == pytest.approx(expected.kernels, rel=1e-3)
    assert replace(found, kernels=expected.kernels) == expected


def test_no_group_of_processes_is_left() -> None:
    simulate_step(tiny("trainer.strategy=fsdp", "trainer.devices=8", "data.batch_size=8"), False, "fused")
    assert not torch.distributed.is_initialized()


SETTINGS = [
    ["data.batch_size=32"],
    pytest.param(["data.batch_size=32", "trainer.checkpointing=true"], marks=pytest.mark.slow),
    pytest.param(["data.batch_size=32", "trainer.accumulate=2", "callbacks.ema_decay=null"], marks=pytest.mark.slow),
    pytest.param(["data.batch_size=16", "trainer.precision=32-true"], marks=pytest.mark.slow),
    pytest.param(["data.batch_size=32", "model.visibility=causal", "model.depth=3"], marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_real_step_needs_what_was_planned(settings: list[str], tmp_path: Path, root: Path) -> None:
    """In a process of its own: what tests before this one have left in memory would count."""
    out = tmp_path / "plan.json"
    command = [sys.executable, "-m", "experiments.plan", "generator/demo", *settings]
    done = subprocess.run(
        [*command, "--measure", "--json", str(out)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["measured"]
    assert found["peak"] == pytest.approx(found["planned_peak"], rel=0.1)
    assert found["operations"] == pytest.approx(found["planned_operations"], rel=0.1)
    assert "two steps on this machine" in done.stdout


# ---- time ---------------------------------------------------------------------------------------------------------

ROUND = Accelerator(
    bfloat16=1000.0, float32=100.0, memory=1.0, bandwidth=1.0, link=50.0, network=10.0, source="made up"
)


def test_time_is_the_longer_of_computing_and_exchanging() -> None:
    received = {"all-gather": 300, "reduce-scatter": 200, "all-reduce": 40}
    time = step_time(800.0, 20.0, received, Layout(2, 2, 2), ROUND, 0.5)
    assert time.computing == pytest.approx((0.8 + 0.2) / 0.5)
    assert time.exchanging == pytest.approx(500 / 50 + 40 / 10)
    assert time.seconds == time.exchanging


def test_shards_on_several_nodes_share_the_nodes_cards() -> None:
    received = {"all-gather": 400}
    assert step_time(0, 0, received, Layout(2, 2, 4), ROUND, 1.0).seconds == pytest.approx(400 / 20)
    assert step_time(0, 0, received, Layout(1, 4, 4), ROUND, 1.0).seconds == pytest.approx(400 / 50)


# ---- the command --------------------------------------------------------------------------------------------------


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    assert (
        plan.main(["generator/tiny", "--gpu", "a100-40gb", "data.batch_size=16", *HYBRID, "--json", str(out)])
        == 0
    )
    text = capsys.readouterr().out
    for words in (
        "hybrid (2 share a copy)",
        "full sharding (4 share a copy)",
        "GPU hours",
        "fits in 40 GB with 40.0 GB to spare (* as configured)",
        "2 nodes × 2 GPUs = 4 a100-40gb (trainer.num_nodes=2, trainer.devices=2)",
    ):
        assert words in text
    content = json.loads(out.read_text())
    assert set(content["layouts_by_shards"]) == {"2", "4"}
    assert content["passes"]["all_kept"]["unsharded"] == content["passes"]["checkpointing"]["unsharded"]
    hours = content["layouts_by_shards"]["2"]
    expected = max(hours["computing"], hours["exchanging"]) * tiny().trainer.max_steps * 4 / 3600
    assert content["gpu_hours"] == pytest.approx(expected)


def test_a_plan_says_by_how_much_a_run_exceeds_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(plan.ACCELERATORS["a100-40gb"], memory=10**6)
    monkeypatch.setitem(plan.ACCELERATORS, "small", small)
    assert re.search(r"exceeds 0 GB by 0\.00\d GB", plan.Plan(tiny(), "small", 0.4).text())


@pytest.mark.parametrize(
    "name, key",
    [
        ("h100", "h100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),  # as the driver calls it
        ("Tesla V100-SXM2-32GB", "v100-32gb"),
        ("A100 80GB", "a100-80gb"),
        ("RTX4090", "rtx-4090"),
        ("GeForce RTX 3090", "rtx-3090"),
        ("5090", "rtx-5090"),
        ("a6000", "rtx-a6000"),
        ("MI300X", "mi300x-192gb"),
        ("b200", "b200-180gb"),
        *((key, key) for key in ACCELERATORS),
    ],
)
def test_a_gpu_is_known_by_its_usual_names(name: str, key: str) -> None:
    assert find_accelerator(name) == key


def test_the_list_of_gpus_gives_figures_and_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--gpu", "list"]) == 0
    text = capsys.readouterr().out
    for key, gpu in ACCELERATORS.items():
        (line,) = [line for line in text.splitlines() if line.startswith(key)]
        assert f" {gpu.bfloat16 / 1e12:g} " in line and gpu.source in line
    assert "no bfloat16 tensor cores" in text
    assert all(gpu.bfloat16 >= gpu.float32 for gpu in ACCELERATORS.values())


def test_a_gpu_without_bfloat16_is_said_to_have_none() -> None:
    assert "no bfloat16 tensor cores" in plan.Plan(tiny(), "v100-32gb", 0.4).text()


@pytest.mark.parametrize(
    "words, said",
    [
        (["generator/tiny", "--gpu", "a100"], "--gpu a100: which one, a100-40gb or a100-80gb?"),
        (["generator/tiny", "--gpu", "h101-80gb"], "did you mean 'h100-80gb'"),
        (["generator/tiny", "--gpu", "gtx"], "there are rtx-3090"),
        (["generator/tiny", "--utilisation", "40"], "--utilisation 40"),
        (["tokenizer/tiny"], "task=tokenizer"),
        (["generator/tiny", "trainer.devices=2", "--measure"], "trainer.devices × num_nodes=2"),
        (["generator/tiny", "data.batch_size=999999999999"], "raise trainer.accumulate"),
        (["generator/tiny", "model.dept=2"], "did you mean 'model.depth'"),
    ],
)
def test_mistakes_are_named(words: list[str], said: str) -> None:
    with pytest.raises(UserError) as error:
        plan.main(words)
    assert said in str(error.value)
