"""Strategies by settings, and what is refused before anything starts. No process is started here."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from configs.loading import load
from lightning_modules.config import TrainerConfig
from lightning_modules.strategies.launch_environment import check_launch, find_launcher
from lightning_modules.strategies.parallel import (
    ShardedStrategy,
    build_strategy,
    cluster_environment,
    end_step,
    set_accumulating,
    shard,
)
from switti.errors import UserError

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_NTASKS": "16"}
SRUN["SLURM_NTASKS_PER_NODE"] = "4"
BATCH = {
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "16",
    "SLURM_JOB_ID": "7",
}  # a batch script that has not called srun


def test_strategy_follows_the_settings() -> None:
    assert build_strategy(TrainerConfig()) == "auto"
    assert isinstance(build_strategy(TrainerConfig(devices=2)), DDPStrategy)
    assert isinstance(build_strategy(TrainerConfig(strategy="ddp")), DDPStrategy)
    full = build_strategy(TrainerConfig(strategy="fsdp", devices=4, num_nodes=2))
    hybrid = build_strategy(TrainerConfig(strategy="fsdp", devices=4, num_nodes=2, sharding_size=4))
    assert isinstance(full, ShardedStrategy) and full.sharding_size == 8
    assert isinstance(hybrid, ShardedStrategy) and hybrid.sharding_size == 4


@pytest.mark.parametrize("task", ["generator", "tokenizer", "decoder"])
def test_every_task_may_be_sharded(task: str) -> None:
    config = "generator/tiny" if task == "generator" else "tokenizer/tiny"
    assert load(config, [f"task={task}", "trainer.strategy=fsdp"]).trainer.strategy == "fsdp"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["trainer.sharding_size=2"], "trainer.sharding_size=2 belongs to trainer.strategy=fsdp"),
        (
            ["trainer.strategy=fsdp", "trainer.devices=4", "trainer.sharding_size=3"],
            "trainer.sharding_size=3 must divide trainer.devices × trainer.num_nodes=4",
        ),
        (["trainer.strategy=fsdp", "trainer.sharding_size=0"], "trainer.sharding_size=0 must divide"),
        (["trainer.strategy=fdsp"], "trainer.strategy=fdsp is not one of auto, ddp, fsdp"),
        (["trainer.devices=3"], "data.batch_size=8 must be a multiple of"),
        (["callbacks.keep_every=-1"], "callbacks.keep_every=-1"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        load("generator/tiny", settings)
    assert words in str(caught.value)


def test_who_has_started_the_processes() -> None:
    assert find_launcher({}) is None
    assert find_launcher(BATCH) is None
    assert find_launcher(TORCHRUN) == ("torchrun", 4)
    assert find_launcher(SRUN) == ("srun", 16)
    assert find_launcher(SRUN | TORCHRUN) == ("torchrun", 4)  # torchrun inside of a job step


def test_another_number_of_processes_is_refused() -> None:
    check_launch(TrainerConfig(devices=2, num_nodes=2), TORCHRUN)
    check_launch(TrainerConfig(devices=4, num_nodes=4), SRUN)
    check_launch(TrainerConfig(devices=4), {})
    for trainer, environment, words in (
        (TrainerConfig(), TORCHRUN, "torchrun has started 4 processes, but trainer.devices=1"),
        (TrainerConfig(devices=8), SRUN, "srun has started 16 processes, but trainer.devices=8"),
        (
            TrainerConfig(devices=4, num_nodes=4),
            {k: v for k, v in SRUN.items() if k != "SLURM_NTASKS_PER_NODE"},
            "--ntasks-per-node=4",
        ),
        (TrainerConfig(num_nodes=2), {}, "trainer.num_nodes=2 needs a launcher on every node"),
        (TrainerConfig(num_nodes=2), BATCH, "trainer.num_nodes=2 needs a launcher on every node"),
    ):
        with pytest.raises(UserError) as caught:
            check_launch(trainer, environment)
        assert words in str(caught.value)


def test_lightning_is_told_who_it_was_and_never_requeues(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (SRUN | {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "switti"}).items():
        monkeypatch.setenv(name, value)
    assert cluster_environment({}) == []
    (torchrun,) = cluster_environment(TORCHRUN)
    assert isinstance(torchrun, TorchElasticEnvironment)
    (srun,) = cluster_environment(SRUN)
    assert isinstance(srun, SLURMEnvironment) and not srun.auto_requeue


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """A group whose other rank does not exist: collectives do nothing, but are counted."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def exchanges(accumulating: bool) -> tuple[int, int]:
    """(all-gathers, reduce-scatters) of an optimizer step with two micro-batches and four units."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    shard(model, model[:3], init_device_mesh("cpu", (2,)), bfloat16=False)
    with CommDebugMode() as counted:
        for last in (False, True):
            set_accumulating(model, accumulating and not last)
            model(torch.ones(2, 8)).sum().backward()
        end_step(model)
    counts = {str(operation): number for operation, number in counted.get_comm_counts().items()}
    gathers = sum(number for operation, number in counts.items() if "allgather" in operation)
    return gathers, sum(number for operation, number in counts.items() if "reduce_scatter" in operation)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_micro_batches_neither_gather_nor_reduce_again(two_ranks: None) -> None:
    """Three blocks and what is around them: gathered once and reduced once a step, instead of in every pass."""
    assert exchanges(accumulating=True) == (4, 4)
    assert exchanges(accumulating=False) == (4 + 3 + 4 + 3, 8)  # blocks again in each backward pass
