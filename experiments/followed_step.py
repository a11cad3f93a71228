"""Follows one training step of a generator run, as rank 0 of its processes sees it. Not a command itself.

The network is built, divided and run by the code that trains, but with tensors that have no data (torch's
FakeTensorMode) and in a group of processes that are not there (torch's "fake" backend). So the numbers are those of
what would run, for 128 ranks as well as for one.
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.flop_counter import FlopCounterMode

from configs.schema import RunConfig
from experiments.command import hand_back_freed_memory
from lightning_modules.generator import GeneratorModule
from lightning_modules.optimization import build_optimizer
from lightning_modules.parallel import build_mesh, end_step, set_accumulating, shard
from switti.bench.measure import peak_bytes
from switti.checkpoint import build_empty
from switti.models import attention
from switti.models.rqvae import RQVAE
from switti.models.transformer import ScaleTransformer
from switti.optimizer_state import local_part
from switti.planning.trace import FUSED_ON_CPU, StepTrace

WEIGHTS, TOKENIZER, AVERAGE, OPTIMIZER = "weights", "frozen tokenizer", "average", "optimizer"
ACTIVATIONS, WORKING = "activations", "working memory"


@dataclass
class Followed:
    """One optimiser step of one rank.

    memory: bytes by kind when most is needed. whole: trained parameters of the model, of which this rank keeps
    `parameters`; frozen: the tokenizer's. half, single: operations in bfloat16 and in float32, which the head computes
    in; a multiplication with an addition counts as two. received: bytes by collective.
    """

    memory: dict[str, int]
    whole: int
    parameters: int
    frozen: int
    half: int
    single: int
    received: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


def micro_batch(config: RunConfig) -> int:
    """Pictures that a rank computes at a time."""
    return config.data.batch_size // (config.trainer.world_size * config.trainer.accumulate)


def follow(config: RunConfig, checkpointing: bool, fused: bool) -> Followed:
    """The step of a rank. fused: attention runs as it does on a GPU; otherwise as on the CPU of this machine."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of sharding, about views that nothing writes to
        if fused:
            stack.enter_context(patch.object(attention, "use_products", lambda q: False))
        if config.trainer.world_size > 1:
            stack.enter_context(_absent_ranks(config.trainer.world_size))
        device, sharded = torch.device("cpu"), config.trainer.strategy == "fsdp"
        generator, tokenizer = build_empty(config.model), _empty_tokenizer(config)
        mesh = _mesh(config, device) if sharded else None
        # Autograd looks for devices at its first backward pass, and must not find the GPU that the next line feigns.
        torch.zeros((), requires_grad=True).backward()
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for module in (generator, tokenizer):
            module.to_empty(device=device)
        if mesh is not None:
            shard(generator, generator.blocks, mesh, _half(config))
        generator.checkpointing = checkpointing
        return _follow(config, generator, tokenizer, device)


def _half(config: RunConfig) -> bool:
    return config.trainer.precision == "bf16-mixed"


def _mesh(config: RunConfig, device: torch.device) -> DeviceMesh:
    return build_mesh(device.type, config.trainer.world_size, config.trainer.sharding_size)


@contextmanager
def _absent_ranks(count: int) -> Iterator[None]:
    torch.distributed.init_process_group("fake", rank=0, world_size=count)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _empty_tokenizer(config: RunConfig) -> RQVAE:
    with torch.device("meta"):
        return RQVAE(config.tokenizer)


def _follow(
    config: RunConfig, generator: ScaleTransformer, tokenizer: RQVAE, device: torch.device
) -> Followed:
    trace = StepTrace()
    parameters = [p for p in generator.parameters() if p.requires_grad]
    trace.count(generator.parameters(), WEIGHTS)
    trace.count(tokenizer.parameters(), TOKENIZER)
    trace.count_gradients(parameters)
    micro_batches = 2 if _gradients_stay(config) else 1  # of any number, the last finds most
    with trace:
        run_step(config, generator, tokenizer, device, micro_batches, trace)
    own = sum(local_part(p).nbytes for p in parameters)
    # Two moments of AdamW, which fused kernels update in place, like the average.
    memory = {**trace.peak, OPTIMIZER: 2 * own}
    if config.callbacks.ema_decay is not None:
        memory[AVERAGE] = own
    accumulate = config.trainer.accumulate
    return Followed(
        {kind: size for kind, size in memory.items() if size},
        sum(p.numel() for p in parameters),
        sum(local_part(p).numel() for p in parameters),
        sum(p.numel() for p in tokenizer.parameters()),
        *(trace.operations[dtype] * accumulate // micro_batches for dtype in (torch.bfloat16, torch.float32)),
        _received(config, dict(trace.received), own),
    )


def _gradients_stay(config: RunConfig) -> bool:
    """Whether gradients of before are there in a backward pass: of other micro-batches, or in DDP's buckets."""
    ddp = config.trainer.strategy != "fsdp" and config.trainer.world_size > 1
    return ddp or config.trainer.accumulate > 1


def _received(config: RunConfig, followed: dict[str, int], gradients: int) -> dict[str, int]:
    """Bytes of a step. DDP, which does not run here, reduces each gradient once."""
    ranks = config.trainer.world_size
    if config.trainer.strategy != "fsdp" and ranks > 1:
        return {"all-reduce": 2 * gradients * (ranks - 1) // ranks}
    return followed


def run_step(
    config: RunConfig,
    generator: ScaleTransformer,
    tokenizer: RQVAE,
    device: torch.device,
    micro_batches: int,
    trace: StepTrace | None = None,
) -> None:
    """Forward and backward passes of made-up pictures, with gradients left in the parameters."""
    module = GeneratorModule(
        config.model, tokenizer, config.optimizer, config.loss, config.trainer, seed=0, averaged=False
    )
    half = _half(config)
    for i in range(micro_batches):
        set_accumulating(generator, i + 1 < micro_batches)
        _set_phase(trace, ACTIVATIONS)
        with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
            losses, *_ = module.compute_token_losses(_pictures(config, device), generator, 0.0)
            loss = losses.mean() / micro_batches
        del losses, _
        _set_phase(trace, WORKING)
        loss.backward()
        del loss
    end_step(generator)


def _set_phase(trace: StepTrace | None, phase: str) -> None:
    if trace is not None:
        trace.phase = phase


def _pictures(config: RunConfig, device: torch.device) -> dict[str, Any]:
    count, side = micro_batch(config), config.tokenizer.resolution
    text = config.text
    return {
        "image": torch.zeros(count, 3, side, side, device=device),
        "seed": torch.zeros(count, dtype=torch.int64, device=device),
        "text": torch.zeros(count, text.max_length, text.width, device=device),
        "text_mask": torch.ones(count, text.max_length, dtype=torch.bool, device=device),
        "pooled": torch.zeros(count, text.pooled_width, device=device),
        "crop": torch.zeros(count, 4, dtype=torch.int64, device=device),
    }


@dataclass
class Measured:
    """What one device of this machine really needed: bytes at most, operations as torch's own counter counts them."""

    peak: int
    operations: int


def measure(config: RunConfig) -> Measured:
    """Two real steps of made-up pictures with optimiser and average on this process's device.

    With trainer.strategy=fsdp every rank must take part.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def build() -> tuple[ScaleTransformer, RQVAE]:
        generator = ScaleTransformer(config.model).to(device)
        generator.checkpointing = config.trainer.checkpointing
        if config.trainer.strategy == "fsdp":
            shard(generator, generator.blocks, _mesh(config, device), _half(config))
        return generator, RQVAE(config.tokenizer).to(device).eval().requires_grad_(False)

    def train() -> None:
        generator, tokenizer = build()
        averaged = config.callbacks.ema_decay is not None
        average = [local_part(p).detach().clone() for p in generator.parameters() if averaged]
        optimizer, _ = build_optimizer(generator, config.optimizer, config.trainer.max_steps)
        for _ in range(2):
            run_step(config, generator, tokenizer, device, config.trainer.accumulate)
            optimizer.step()
            optimizer.zero_grad()
        del average

    hand_back_freed_memory()
    train()  # once without measuring: kernels are loaded and keep what they need
    peak = peak_bytes(train)
    with FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter:
        run_step(config, *build(), device, config.trainer.accumulate)
    return Measured(peak, counter.get_total_flops())
