"""python -m experiments.plan CONFIG [setting=value …] [--gpu h100-80gb] [--utilisation 0.4] [--images 8] [--json FILE]
    [--measure]

Estimates what a generator run will cost: parameters, tokens, operations per step, memory of each GPU by kind, bytes
exchanged, time and GPU hours, and what sampling will take. The run is set up on this machine for its nodes
(trainer.num_nodes) and the GPUs of each (trainer.devices) by the training code, but with tensors without data; a model
of 2.5 B parameters takes half a minute. --gpu list shows the known GPUs and their data-sheet figures.

Memory and operations come from a simulated step; unsharded gradients, before they are reduced over ranks, are working
memory. Time is an estimate: operations at --utilisation of the data sheet's peak, or communication at its bandwidths,
whichever is longer. Sampling (settings sampling.*, --images at a time) is predicted kernel by kernel: bytes at 80 % of
the memory's bandwidth or operations at 70 % of the peak (attention: 50 %), whichever is longer, and 1.5 µs between
kernels; eager mode launches one in 6 µs. --measure trains two steps here, if the run is for one device, and prints
their memory and operations beside the plan for this machine. Not included: torch.compile, metrics and validation during
training, text encoders, and the buffers of driver and communication library.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cost_model.hardware import (
    ACCELERATORS,
    GIGA,
    TERA,
    Layout,
    StepTime,
    find_accelerator,
    step_time,
    table,
)
from configs.loading import load
from configs.schema import RunConfig
from experiments.cli import argument_parser, run
from switti.errors import UserError
from switti.files import write_json
from switti.tables import aligned

if TYPE_CHECKING:
    from benchmarks.cost_model.simulated_step import Measured, StepProfile

HOUR = 3600
# Per forward pass of a GPU; simulating more would take minutes.
MOST_IMAGES = 16_384


def main(argv: list[str]) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument(
        "config", nargs="?", help="a config file or its name, such as generator/paper/pretrain_256"
    )
    parser.add_argument("settings", nargs="*", metavar="setting=value", help="such as trainer.num_nodes=16")
    parser.add_argument(
        "--gpu", default="h100-80gb", metavar="NAME", help=f"{', '.join(ACCELERATORS)}, or list (%(default)s)"
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        default=0.4,
        help="share of the stated operations per second (%(default)s)",
    )
    parser.add_argument(
        "--images", type=int, default=8, metavar="N", help="images sampled at a time (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the same numbers for other programs")
    parser.add_argument("--measure", action="store_true", help="train two steps here and compare")
    options = parser.parse_intermixed_args(argv)
    if options.gpu == "list":
        print(table())
        return 0
    gpu = find_accelerator(options.gpu)
    if options.config is None:
        parser.error("the following arguments are required: config")
    if not 0 < options.utilisation <= 1:
        raise UserError(f"--utilisation {options.utilisation} must lie in (0, 1]")
    if not 0 < options.images <= MOST_IMAGES:
        raise UserError(f"--images {options.images} must lie in [1, {MOST_IMAGES}]")
    config = load(options.config, options.settings)
    check(config, options.measure)
    plan = Plan(config, gpu, options.utilisation, options.images)
    print(plan.text())
    content = plan.as_json()
    if options.measure:
        content["measured"] = print_measured(config)
    if options.json:
        write_json(options.json, content)
        print(options.json)
    return 0


def check(config: RunConfig, measure: bool) -> None:
    if config.task != "generator":
        raise UserError(f"task={config.task}: a plan is made for generators")
    devices, trainer = config.trainer.world_size, config.trainer
    images = config.data.batch_size // (devices * trainer.accumulate)
    if images > MOST_IMAGES:
        raise UserError(
            f"data.batch_size={config.data.batch_size} with trainer.devices × num_nodes={devices} and "
            f"trainer.accumulate={trainer.accumulate} puts {images} images on a GPU at a time; a plan simulates at "
            f"most {MOST_IMAGES}: raise trainer.accumulate"
        )
    if measure and (devices > 1 or config.trainer.strategy == "fsdp"):
        raise UserError(
            f"--measure runs one device of this machine, but trainer.devices × num_nodes={devices} with "
            f"trainer.strategy={config.trainer.strategy}; add trainer.devices=1 trainer.num_nodes=1 "
            "trainer.strategy=auto trainer.sharding_size=null and a smaller data.batch_size"
        )


class Plan:
    """The estimates for a run, and their presentation."""

    def __init__(self, config: RunConfig, gpu: str, utilisation: float, images: int = 8) -> None:
        from tqdm import tqdm

        from benchmarks.cost_model.sampling_section import plan_sampling
        from benchmarks.cost_model.simulated_step import simulate_step

        self.config, self.gpu, self.utilisation = config, gpu, utilisation
        trainer = config.trainer
        self.profiles: dict[bool, StepProfile] = {}
        self.layouts: dict[str, tuple[Layout, StepProfile]] = {}
        self.sampling = plan_sampling(config, gpu, images)
        with tqdm(total=2, desc="simulating a step", unit="step", leave=False) as bar:
            for checkpointing in (True, False):
                self.profiles[checkpointing] = simulate_step(config, checkpointing, "fused")
                bar.update()
            ranks = trainer.world_size
            chosen = (trainer.sharding_size or ranks) if trainer.strategy == "fsdp" else 1
            self.layouts[str(chosen)] = self.layout(chosen), self.chosen
            others = {ranks, trainer.devices} - {chosen, 1} if trainer.strategy == "fsdp" else set()
            bar.total += len(others)
            for shards in sorted(others):
                other = replace(config, trainer=replace(trainer, sharding_size=shards))
                # What is exchanged does not depend on checkpointing, nor what is computed on the sharding.
                profile = simulate_step(other, checkpointing=False, backend="fused")
                profile = replace(profile, bfloat16=self.chosen.bfloat16, float32=self.chosen.float32)
                self.layouts[str(shards)] = self.layout(shards), profile
                bar.update()

    @property
    def chosen(self) -> "StepProfile":
        return self.profiles[self.config.trainer.checkpointing]

    def layout(self, shards: int) -> Layout:
        return Layout(self.config.trainer.num_nodes, self.config.trainer.devices, shards)

    def time(self, layout: Layout, profile: "StepProfile") -> StepTime:
        return step_time(
            profile.bfloat16,
            profile.float32,
            profile.received,
            layout,
            ACCELERATORS[self.gpu],
            self.utilisation,
        )

    # ---- presentation ---------------------------------------------------------------------------------------------

    def text(self) -> str:
        from benchmarks.cost_model.sampling_section import lines_of_sampling

        parts = [self._lines_of_run(), self._lines_of_memory(), self._lines_of_time()]
        parts.append(lines_of_sampling(self.config, self.sampling))
        return "\n\n".join("\n".join(part) for part in parts)

    def _lines_of_run(self) -> list[str]:
        from benchmarks.cost_model.simulated_step import micro_batch
        from switti.scales import Pyramid

        config, trainer, chosen = self.config, self.config.trainer, self.chosen
        tokens, images = Pyramid(tuple(config.model.scales)).length, config.data.batch_size
        ranks = trainer.world_size
        first = chosen.bfloat16 + chosen.float32
        nodes, gpus = _count(trainer.num_nodes, "node"), _count(trainer.devices, "GPU")
        per_rank = f"{micro_batch(config)} images × {_count(trainer.accumulate, 'micro-batch', 'es')} per GPU"
        lines = [
            f"{config.name}: {nodes} × {gpus} = {ranks} {self.gpu} "
            f"(trainer.num_nodes={trainer.num_nodes}, trainer.devices={trainer.devices}), "
            f"strategy {trainer.strategy}, {trainer.precision}"
        ]
        if note := ACCELERATORS[self.gpu].note:
            lines.append(f"{self.gpu} {note}")
        return [
            *lines,
            f"parameters  {_spaced(chosen.unsharded)} trained, {_spaced(chosen.parameters)} of them on each GPU; "
            f"{_spaced(chosen.frozen)} frozen on each",
            f"tokens      {tokens} per image, {_spaced(tokens * images)} per step "
            f"({_spaced(images)} images: {per_rank})",
            f"operations  {_tera(first * ranks)} TFLOP per step, {_tera(first)} on each GPU, "
            f"{_tera(chosen.float32)} of that in float32",
        ]

    def _lines_of_memory(self) -> list[str]:
        """Bytes of a GPU by kind, with and without checkpointing, and whether the configured one fits."""
        columns = [self.profiles[value].memory for value in (True, False)]
        kinds = sorted({kind for column in columns for kind in column}, key=lambda k: -columns[1].get(k, 0))
        marks = ["*" if self.config.trainer.checkpointing == value else "" for value in (True, False)]
        rows: list[tuple[str, ...]] = [
            ("memory of a GPU, GB", f"checkpointing{marks[0]}", f"all kept{marks[1]}")
        ]
        rows += [(f"  {kind}", *(_giga(column.get(kind, 0)) for column in columns)) for kind in kinds]
        rows.append(("  peak", *(_giga(sum(column.values())) for column in columns)))
        available, needed = ACCELERATORS[self.gpu].memory, self.chosen.peak
        size, difference = f"{available / GIGA:.0f} GB", f"{_giga(abs(available - needed))} GB"
        verdict = (
            f"fits in {size} with {difference} to spare"
            if needed <= available
            else f"exceeds {size} by {difference}"
        )
        return [*aligned(rows), f"  {verdict} (* as configured)"]

    def _lines_of_time(self) -> list[str]:
        from benchmarks.cost_model.sampling_latency import Assumptions

        trainer = self.config.trainer
        lines = []
        for layout, profile in self.layouts.values():
            time = self.time(layout, profile)
            moved = ", ".join(f"{_giga(size)} GB {name}" for name, size in sorted(profile.received.items()))
            lines.append(
                f"{layout.kind}: each GPU receives "
                f"{moved or 'nothing'} per step; weights, optimizer and EMA {_giga(_state(profile.memory))} GB"
            )
            lines.append(
                f"  a step: {time.computing:.3g} s computing at {self.utilisation:.0%} of the peak, "
                f"{time.exchanging:.3g} s communicating; {time.seconds:.3g} s if both overlap"
            )
        launching, kernels = self.chosen.kernels * Assumptions.host, _spaced(self.chosen.kernels)
        first = next(iter(self.layouts.values()))
        verdict = (
            "longer than the GPU computes: a larger micro-batch or trainer.compile=true would help"
            if launching > self.time(*first).computing
            else "while the GPU computes"
        )
        lines.append(
            f"a step launches at most {kernels} kernels, {launching:.3g} s of the host in eager mode, {verdict}"
        )
        ranks = trainer.world_size
        lines.append(
            f"{_spaced(trainer.max_steps)} steps as configured: {_hours(self.gpu_hours / ranks)} h, "
            f"{_hours(self.gpu_hours)} GPU hours"
        )
        return lines

    @property
    def gpu_hours(self) -> float:
        """Of the whole run as configured."""
        layout, profile = next(iter(self.layouts.values()))
        return self.time(layout, profile).seconds * self.config.trainer.max_steps * layout.ranks / HOUR

    def as_json(self) -> dict[str, Any]:
        from benchmarks.cost_model.sampling_section import as_json as sampling_json

        layouts = {
            shards: {"received": profile.received, **asdict(self.time(layout, profile))}
            for shards, (layout, profile) in self.layouts.items()
        }
        profiles = {"checkpointing": self.profiles[True], "all_kept": self.profiles[False]}
        return {
            "config": self.config.name,
            "gpu": self.gpu,
            "utilisation": self.utilisation,
            "passes": {name: asdict(one) for name, one in profiles.items()},
            "layouts_by_shards": layouts,
            "gpu_hours": self.gpu_hours,
            "sampling": sampling_json(self.sampling),
        }


def print_measured(config: RunConfig) -> dict[str, Any]:
    """Two real steps on this machine beside their simulation."""
    import torch

    from benchmarks.cost_model.simulated_step import measure, simulate_step
    from switti.models.kernels import Backend

    backend: Backend = "fused" if torch.cuda.is_available() else "auto"
    planned = simulate_step(config, config.trainer.checkpointing, backend)
    measured: Measured = measure(config)
    operations = planned.bfloat16 + planned.float32
    print(
        f"\ntwo steps on this machine: {_giga(measured.peak)} GB peak, planned {_giga(planned.peak)} "
        f"({measured.peak / planned.peak - 1:+.1%}); {measured.operations / TERA:.4g} TFLOP per step, planned "
        f"{operations / TERA:.4g} ({measured.operations / operations - 1:+.1%})"
    )
    return {**asdict(measured), "planned_peak": planned.peak, "planned_operations": operations}


def _state(memory: dict[str, int]) -> int:
    return sum(memory.get(kind, 0) for kind in ("weights", "optimizer", "EMA"))


def _giga(size: float) -> str:
    return f"{size / GIGA:.3f}" if size < GIGA else f"{size / GIGA:.1f}"


def _tera(number: float) -> str:
    tera = number / TERA
    return _spaced(round(tera)) if tera >= 1000 else f"{tera:.3g}"


def _hours(hours: float) -> str:
    return _spaced(round(hours)) if hours >= 1000 else f"{hours:.4g}"


def _count(number: int, name: str, plural: str = "s") -> str:
    return f"1 {name}" if number == 1 else f"{number} {name}{plural}"


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


if __name__ == "__main__":
    run(main)
