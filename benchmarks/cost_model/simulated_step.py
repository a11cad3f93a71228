"""Simulated training step: memory, operations and communication of rank 0 of a generator run, without data or GPUs.

The network is built, sharded and run by the training code itself, but with tensors that have no data (torch's
FakeTensorMode) and in a process group without other processes (torch's "fake" backend). The numbers are therefore those
of what would run, for 128 ranks as well as for one.

All blocks are alike, so a deep network is simulated with four blocks and with five: every number is linear in the
depth, memory section by section (before, in and after each of the first and last blocks, forward and backward).
"""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cost_model.trace import FUSED_ON_CPU, StepTrace
from benchmarks.measure import peak_bytes
from configs.schema import RunConfig
from lightning_modules.generator import GeneratorModule
from lightning_modules.optimization import build_optimizer
from lightning_modules.strategies.parallel import build_mesh, end_step, set_accumulating, shard
from switti.allocator import return_freed_memory
from switti.distributed.optimizer_state import local_shard
from switti.models.kernels import Backend
from switti.models.transformer import ScaleTransformer
from switti.tokenizer.rqvae import RQVAE
from switti.weights.fill import build_empty

WEIGHTS, TOKENIZER, EMA, OPTIMIZER = "weights", "frozen tokenizer", "EMA", "optimizer"
ACTIVATIONS, WORKING = "activations", "working memory"

FEW_BLOCKS = 4
# Blocks at either end that differ from those between them: sharding gathers weights ahead.
ENDS = 2
MIDDLE = "middle"

# Micro-batch, phase, block or nothing.
Section = tuple[str, ...]
# Such as ("memory", section, kind) → bytes, ("operations", type) → number.
Counts = dict[tuple[Any, ...], int]


@dataclass
class StepProfile:
    """Memory, operations and communication of one optimizer step of one rank.

    memory: bytes by kind at the peak. unsharded: trained parameters of the model, of which this rank keeps
    `parameters`; frozen: the tokenizer's. bfloat16, float32: operations by type, float32 being the head's; a
    multiplication with an addition counts as two. received: bytes by collective. kernels: launches of all forward and
    backward passes, without the optimizer's few; at most, since RMSNorm is five operations here and one on a GPU.
    """

    memory: dict[str, int]
    unsharded: int
    parameters: int
    frozen: int
    bfloat16: int
    float32: int
    received: dict[str, int]
    kernels: int

    @property
    def peak(self) -> int:
        return sum(self.memory.values())


def micro_batch(config: RunConfig) -> int:
    """Images of one rank and forward pass."""
    return config.data.batch_size // (config.trainer.world_size * config.trainer.accumulate)


def simulate_step(config: RunConfig, checkpointing: bool, backend: Backend) -> StepProfile:
    """The step of one rank. backend: "fused" for the kernels of a GPU, "auto" for those of this machine's CPU."""
    depth = config.model.depth
    if depth <= FEW_BLOCKS + 1:
        return _sum_up(_count(config, checkpointing, backend))
    few, one_more = (
        _count(replace(config, model=replace(config.model, depth=blocks)), checkpointing, backend)
        for blocks in (FEW_BLOCKS, FEW_BLOCKS + 1)
    )
    return _sum_up(_deepen(few, one_more, depth - FEW_BLOCKS))


def _deepen(few: Counts, one_more: Counts, blocks: int) -> Counts:
    """Counts with `blocks` more blocks than `few` has. Memory peaks in an outer block; between them it is linear."""
    outer = [key for key in one_more if not (key[0] == "memory" and MIDDLE in key[1])]
    return {key: few.get(key, 0) + blocks * (one_more[key] - few.get(key, 0)) for key in outer}


def _count(config: RunConfig, checkpointing: bool, backend: Backend) -> Counts:
    """Builds the network and traces its step."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # Sharding warns about views that nothing writes to.
        warnings.simplefilter("ignore")
        if config.trainer.world_size > 1:
            stack.enter_context(_absent_ranks(config.trainer.world_size))
        device, sharded = torch.device("cpu"), config.trainer.strategy == "fsdp"
        generator, tokenizer = build_empty(config.model, backend=backend), _empty_tokenizer(config)
        mesh = _mesh(config, device) if sharded else None
        # Autograd looks for devices at its first backward pass, and must not find FakeTensorMode's pretended GPU.
        torch.zeros((), requires_grad=True).backward()
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        for module in (generator, tokenizer):
            module.to_empty(device=device)
        if mesh is not None:
            shard(generator, generator.blocks, mesh, _mixed(config))
        generator.checkpointing = checkpointing
        return _trace(config, generator, tokenizer, device)


def _mixed(config: RunConfig) -> bool:
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


def _trace(config: RunConfig, generator: ScaleTransformer, tokenizer: RQVAE, device: torch.device) -> Counts:
    trace = StepTrace()
    parameters = [p for p in generator.parameters() if p.requires_grad]
    trace.count(generator.parameters(), WEIGHTS)
    trace.count(tokenizer.parameters(), TOKENIZER)
    trace.count_gradients(parameters)
    _name_sections(generator, trace)
    # Of any number of micro-batches, memory peaks in the last.
    micro_batches = 2 if _gradients_stay(config) else 1
    with trace:
        run_step(config, generator, tokenizer, device, micro_batches, trace)
    own = sum(local_shard(p).nbytes for p in parameters)
    counts: Counts = {
        ("memory", section, kind): size
        for section, kinds in trace.peaks.items()
        for kind, size in kinds.items()
    }
    for section in trace.peaks:
        # Two moments of AdamW, which fused kernels update in place, like the EMA.
        counts["memory", section, OPTIMIZER] = 2 * own
        counts["memory", section, EMA] = own if config.callbacks.ema_decay is not None else 0
    counts["parameters", "unsharded"] = sum(p.numel() for p in parameters)
    counts["parameters", "own"] = sum(local_shard(p).numel() for p in parameters)
    counts["parameters", "frozen"] = sum(p.numel() for p in tokenizer.parameters())
    for dtype in (torch.bfloat16, torch.float32):
        operations = trace.operations[dtype] * config.trainer.accumulate // micro_batches
        counts["operations", str(dtype)] = operations
    counts["kernels", "all"] = trace.kernels * config.trainer.accumulate // micro_batches
    for collective, size in _received(config, dict(trace.received), own).items():
        counts["received", collective] = size
    return counts


def _name_sections(generator: ScaleTransformer, trace: StepTrace) -> None:
    """Starts a section of the trace at each block, forward and backward, and after the last one."""
    depth = len(generator.blocks)

    def begin(where: str) -> None:
        trace.section = (*trace.section[:2], where)

    def watch(block: torch.nn.Module, where: str) -> None:
        def after(_: Any, __: Any, x: torch.Tensor) -> None:
            begin("after a block")
            if x.requires_grad:
                x.register_hook(lambda gradient: begin(where))

        block.register_forward_pre_hook(lambda *_: begin(where), prepend=True)
        block.register_forward_hook(after)

    for i, block in enumerate(generator.blocks):
        from_end = depth - i
        watch(block, f"block {i}" if i < ENDS else f"block -{from_end}" if from_end <= ENDS else MIDDLE)


def _sum_up(counts: Counts) -> StepProfile:
    """Memory is that of the section in which it peaks."""
    sections: dict[Section, dict[str, int]] = {}
    for key, size in counts.items():
        if key[0] == "memory" and size:
            sections.setdefault(key[1], {})[key[2]] = size
    return StepProfile(
        memory=max(sections.values(), key=lambda kinds: sum(kinds.values())),
        unsharded=counts["parameters", "unsharded"],
        parameters=counts["parameters", "own"],
        frozen=counts["parameters", "frozen"],
        bfloat16=counts["operations", str(torch.bfloat16)],
        float32=counts["operations", str(torch.float32)],
        received={key[1]: size for key, size in counts.items() if key[0] == "received"},
        kernels=counts["kernels", "all"],
    )


def _gradients_stay(config: RunConfig) -> bool:
    """Whether a backward pass finds gradients in memory: of other micro-batches, or in DDP's buckets."""
    ddp = config.trainer.strategy != "fsdp" and config.trainer.world_size > 1
    return ddp or config.trainer.accumulate > 1


def _received(config: RunConfig, traced: dict[str, int], gradients: int) -> dict[str, int]:
    """Bytes per step. DDP, which is not simulated, reduces each gradient once."""
    ranks = config.trainer.world_size
    if config.trainer.strategy != "fsdp" and ranks > 1:
        return {"all-reduce": 2 * gradients * (ranks - 1) // ranks}
    return traced


def run_step(
    config: RunConfig,
    generator: ScaleTransformer,
    tokenizer: RQVAE,
    device: torch.device,
    micro_batches: int,
    trace: StepTrace | None = None,
) -> None:
    """Forward and backward passes on blank images; the gradients stay in the parameters."""
    # Images are encoded as in the first epoch.
    trainer = replace(config.trainer, cache_latents=False)
    module = GeneratorModule(
        config.model, tokenizer, config.optimizer, config.loss, trainer, seed=0, ema=False
    )
    mixed = _mixed(config)
    for i in range(micro_batches):
        set_accumulating(generator, i + 1 < micro_batches)
        _begin(trace, i, ACTIVATIONS)
        with torch.autocast(device.type, torch.bfloat16) if mixed else nullcontext():
            losses, _ = module.compute_losses(_blank_batch(config, device), generator, 0.0, correct=False)
            loss = losses.mean / micro_batches
        del losses, _
        _begin(trace, i, WORKING)
        loss.backward()
        del loss
    end_step(generator)


def _begin(trace: StepTrace | None, micro_batch: int, phase: str) -> None:
    if trace is not None:
        trace.phase, trace.section = phase, (str(micro_batch), phase)


def _blank_batch(config: RunConfig, device: torch.device) -> dict[str, Any]:
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
    """Measurements of one device of this machine: peak bytes, operations as torch's own counter counts them."""

    peak: int
    operations: int


def measure(config: RunConfig) -> Measured:
    """Two real steps on blank images, with optimizer and EMA, on this process's device.

    With trainer.strategy=fsdp every rank must take part.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def build() -> tuple[ScaleTransformer, RQVAE]:
        generator = ScaleTransformer(config.model).to(device)
        generator.checkpointing = config.trainer.checkpointing
        if config.trainer.strategy == "fsdp":
            shard(generator, generator.blocks, _mesh(config, device), _mixed(config))
        return generator, RQVAE(config.tokenizer).to(device).eval().requires_grad_(False)

    def train() -> None:
        generator, tokenizer = build()
        averaged = config.callbacks.ema_decay is not None
        ema = [local_shard(p).detach().clone() for p in generator.parameters() if averaged]
        optimizer, _ = build_optimizer(generator, config.optimizer, config.trainer.max_steps)
        for _ in range(2):
            run_step(config, generator, tokenizer, device, config.trainer.accumulate)
            optimizer.step()
            optimizer.zero_grad()
        del ema

    return_freed_memory()
    # Once without measuring: kernels are loaded and keep their workspaces.
    train()
    peak = peak_bytes(train)
    with FlopCounterMode(display=False, custom_mapping=FUSED_ON_CPU) as counter:
        run_step(config, *build(), device, config.trainer.accumulate)
    return Measured(peak, counter.get_total_flops())
