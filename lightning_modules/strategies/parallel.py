"""Parallel strategies: one device, DDP, or FSDP2 with full or hybrid sharding.

The mesh is (replicas, shards): parameters are sharded within a replica and copied over the replicas, so that
all-gathers stay among `trainer.sharding_size` neighbouring ranks, usually one node. The optimizer's state and the EMA
are sharded in the same way. Frozen networks are not submodules of the trained ones and stay unsharded.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.environments import (
    ClusterEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lightning_modules.config import TrainerConfig
from lightning_modules.strategies.launch_environment import find_launcher
from switti.distributed.optimizer_state import named_state
from switti.distributed.sharded_checkpoint import load_into
from switti.weights.describe import check_run

MESH_NAMES = ("replicas", "shards")


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2. The module shards itself in `configure_model`, with `build_mesh`.

    Checkpoints go through the trainer's CheckpointIO like those of the other strategies, on every rank. Loading takes
    sharded folders of any world size and unsharded files alike. Micro-batches that only accumulate neither reduce
    gradients nor gather weights again: weights and gradients stay unsharded on each rank until the step, which costs
    their memory and saves (accumulate − 1)/accumulate of the communication.
    """

    def __init__(self, sharding_size: int, world_size: int) -> None:
        super().__init__(data_parallel_size=world_size, tensor_parallel_size=1)
        self.sharding_size = sharding_size

    def build_mesh(self) -> DeviceMesh:
        return build_mesh(self.root_device.type, self.world_size, self.sharding_size)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Around the forward and backward pass of a micro-batch that is not the last one of its step."""
        # Lightning has set it up.
        assert self.model is not None
        set_accumulating(self.model, True)
        try:
            yield
        finally:
            set_accumulating(self.model, False)

    def optimizer_step(self, *arguments: Any, **options: Any) -> Any:
        """The last micro-batch, whose passes are the optimizer's closure, and the step."""
        result = super().optimizer_step(*arguments, **options)
        assert self.model is not None
        end_step(self.model)
        return result

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Sharded tensors as they are: the CheckpointIO copies them off the device if needed."""
        assert self.model is not None
        return get_model_state_dict(self.model, options=StateDictOptions())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Sharded as well, by parameter names."""
        assert self.model is not None
        return named_state(self.model, getattr(optimizer, "optimizer", optimizer))

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        assert self.model is not None
        path = Path(self.broadcast(str(checkpoint_path)))
        checkpoint = load_into(path, self.model, self.optimizers)
        check_run(checkpoint, path)
        return checkpoint


def build_mesh(device_type: str, world_size: int, sharding_size: int | None) -> DeviceMesh:
    """[replicas, shards] over all ranks; one dimension if there is a single replica, as with sharding_size=None."""
    size = sharding_size or world_size
    replicas = world_size // size
    shape = (size,) if replicas == 1 else (replicas, size)
    return init_device_mesh(device_type, shape, mesh_dim_names=MESH_NAMES[-len(shape) :])


def set_accumulating(model: nn.Module, accumulating: bool) -> None:
    """Whether the next micro-batch is one of several of a step, and not the last of them.

    From the first of them on, blocks stay unsharded between forward and backward pass, until `end_step`.
    """
    for unit in sharded_units(model):
        unit.set_requires_gradient_sync(not accumulating, recurse=False)
        unit.set_reshard_after_backward(not accumulating, recurse=False)
        unit.set_is_last_backward(not accumulating)
        if accumulating and _is_block(unit):
            unit.set_reshard_after_forward(False, recurse=False)


def end_step(model: nn.Module) -> None:
    """Reshard blocks after each forward pass again; the next one may be a step's only micro-batch, or a validation."""
    for unit in sharded_units(model):
        if _is_block(unit):
            unit.set_reshard_after_forward(True, recurse=False)


def _is_block(unit: FSDPModule) -> bool:
    """The model around the blocks stays unsharded after a forward pass anyway."""
    return len(sharded_units(unit)) == 1  # type: ignore[arg-type]


def sharded_units(model: nn.Module) -> list[FSDPModule]:
    """The modules that are gathered as one: the model itself and each of its blocks; none if it is not sharded."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def build_strategy(config: TrainerConfig) -> Strategy | str:
    """Lightning's name or object for trainer.strategy."""
    world_size = config.world_size
    if config.strategy == "fsdp":
        return ShardedStrategy(config.sharding_size or world_size, world_size)
    if config.strategy == "ddp" or world_size > 1:
        # Buffers are tables, the same everywhere, or counts, which each rank keeps of its own images.
        return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)
    return "auto"


def shard(model: nn.Module, blocks: nn.ModuleList, mesh: DeviceMesh, bfloat16: bool) -> None:
    """Shard `model` over the mesh, each of its blocks as a unit of its own.

    bfloat16: blocks compute with bfloat16 weights, gathered in bfloat16; gradients are reduced in float32. What is
    outside of the blocks, above all the head, is gathered and computed in float32. Activations keep their types, as
    autocast gives them on a single device.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bfloat16 else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    outside = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=outside)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Unsharded weights of a model on every rank while sampling, which calls parts of it scale by scale.

    One all-gather instead of one per block and scale; costs the weights in the type in which blocks compute. No-op for
    a model that is not sharded. Every rank must take part.
    """
    units = sharded_units(model)
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


def cluster_environment(environment: Mapping[str, str] = os.environ) -> list[ClusterEnvironment]:
    """Lightning's plugin for the launcher of the processes; under SLURM without its own requeueing."""
    launcher = find_launcher(environment)
    if launcher is None:
        return []
    return [TorchElasticEnvironment() if launcher[0] == "torchrun" else SLURMEnvironment(auto_requeue=False)]
