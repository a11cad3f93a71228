"""python -m experiments.plan CONFIG [setting=value …] [--gpu h100-80gb] [--utilisation 0.4] [--json FILE] [--measure]

What a generator run will need, before paying for it: parameters, tokens, operations a step, memory of each GPU by kind,
bytes exchanged, time and GPU hours. The run is set up for its nodes (trainer.num_nodes) and the GPUs of each
(trainer.devices) on this machine, as in training, but with tensors without data; a model of 2.5 B parameters takes
half a minute. --gpu list shows the GPUs that are known and what their makers state.

Memory and operations come from following a step; unsharded gradients, before ranks have exchanged them, are working
memory. Time is an estimate: operations at --utilisation of what the GPU's maker states, or the exchange at the stated
bandwidths, whichever is longer. --measure trains two steps here, if the run is for one device, and prints what they
needed beside the plan for this machine. Not included: torch.compile, sampling, metrics and validation during training,
and the buffers of driver and communication library.
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

if TYPE_CHECKING:
    from benchmarks.cost_model.simulated_step import Followed, Measured

HOUR = 3600
MOST_IMAGES = 16_384  # on a GPU at a time, or following them would take minutes


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
        "--utilisation", type=float, default=0.4, help="share of the stated operations a second (%(default)s)"
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
    config = load(options.config, options.settings)
    check(config, options.measure)
    plan = Plan(config, gpu, options.utilisation)
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
            f"trainer.accumulate={trainer.accumulate} puts {images} images on a GPU at a time; a plan follows at most "
            f"{MOST_IMAGES}: raise trainer.accumulate"
        )
    if measure and (devices > 1 or config.trainer.strategy == "fsdp"):
        raise UserError(
            f"--measure runs one device of this machine, but trainer.devices × num_nodes={devices} with "
            f"trainer.strategy={config.trainer.strategy}; add trainer.devices=1 trainer.num_nodes=1 "
            "trainer.strategy=auto trainer.sharding_size=null and a smaller data.batch_size"
        )


class Plan:
    """What was found out about a run, and its presentation."""

    def __init__(self, config: RunConfig, gpu: str, utilisation: float) -> None:
        from tqdm import tqdm

        from benchmarks.cost_model.simulated_step import follow

        self.config, self.gpu, self.utilisation = config, gpu, utilisation
        trainer = config.trainer
        self.followed: dict[bool, Followed] = {}
        self.layouts: dict[str, tuple[Layout, Followed]] = {}
        with tqdm(total=2, desc="following a step", unit="pass", leave=False) as bar:
            for checkpointing in (True, False):
                self.followed[checkpointing] = follow(config, checkpointing, fused=True)
                bar.update()
            ranks = trainer.world_size
            chosen = (trainer.sharding_size or ranks) if trainer.strategy == "fsdp" else 1
            self.layouts[str(chosen)] = self.layout(chosen), self.chosen
            others = {ranks, trainer.devices} - {chosen, 1} if trainer.strategy == "fsdp" else set()
            bar.total += len(others)
            for shards in sorted(others):
                other = replace(config, trainer=replace(trainer, sharding_size=shards))
                # What is exchanged does not depend on checkpointing, nor what is computed on the sharding.
                found = follow(other, checkpointing=False, fused=True)
                found.half, found.single = self.chosen.half, self.chosen.single
                self.layouts[str(shards)] = self.layout(shards), found
                bar.update()

    @property
    def chosen(self) -> "Followed":
        return self.followed[self.config.trainer.checkpointing]

    def layout(self, shards: int) -> Layout:
        return Layout(self.config.trainer.num_nodes, self.config.trainer.devices, shards)

    def time(self, layout: Layout, followed: "Followed") -> StepTime:
        return step_time(
            followed.half,
            followed.single,
            followed.received,
            layout,
            ACCELERATORS[self.gpu],
            self.utilisation,
        )

    # ---- presentation ---------------------------------------------------------------------------------------------

    def text(self) -> str:
        return "\n".join([*self._lines_of_run(), "", *self._lines_of_memory(), "", *self._lines_of_time()])

    def _lines_of_run(self) -> list[str]:
        from benchmarks.cost_model.simulated_step import micro_batch
        from switti.scales import Pyramid

        config, trainer, chosen = self.config, self.config.trainer, self.chosen
        tokens, images = Pyramid(tuple(config.model.scales)).length, config.data.batch_size
        ranks = trainer.world_size
        first = chosen.half + chosen.single
        nodes, gpus = _count(trainer.num_nodes, "node"), _count(trainer.devices, "GPU")
        per_rank = f"{micro_batch(config)} images × {_count(trainer.accumulate, 'micro-batch', 'es')} a GPU"
        lines = [
            f"{config.name}: {nodes} × {gpus} = {ranks} {self.gpu} "
            f"(trainer.num_nodes={trainer.num_nodes}, trainer.devices={trainer.devices}), "
            f"strategy {trainer.strategy}, {trainer.precision}"
        ]
        if note := ACCELERATORS[self.gpu].note:
            lines.append(f"{self.gpu} {note}")
        return [
            *lines,
            f"parameters  {_spaced(chosen.whole)} trained, {_spaced(chosen.parameters)} of them on each GPU; "
            f"{_spaced(chosen.frozen)} frozen on each",
            f"tokens      {tokens} an image, {_spaced(tokens * images)} a step ({_spaced(images)} images: {per_rank})",
            f"operations  {_tera(first * ranks)} TFLOP a step, {_tera(first)} on each GPU, "
            f"{_tera(chosen.single)} of that in float32",
        ]

    def _lines_of_memory(self) -> list[str]:
        """Bytes of a GPU by kind, with and without checkpointing; which of both is configured is marked."""
        columns = [self.followed[True].memory, self.followed[False].memory]
        kinds = sorted({kind for column in columns for kind in column}, key=lambda k: -columns[1].get(k, 0))
        marks = ["*" if self.config.trainer.checkpointing == value else " " for value in (True, False)]
        lines = [f"{'memory of a GPU, GB':22}{'checkpointing' + marks[0]:>16}{'all kept' + marks[1]:>12}"]
        for kind in kinds:
            lines.append(
                f"  {kind:20}{_giga(columns[0].get(kind, 0)):>15} {_giga(columns[1].get(kind, 0)):>11}"
            )
        sums = [sum(column.values()) for column in columns]
        lines.append(
            f"  {'at most at a time':20}{_giga(sums[0]):>15} {_giga(sums[1]):>11}    * as configured"
        )
        room, needed = ACCELERATORS[self.gpu].memory, self.chosen.peak
        size, rest = f"{room / GIGA:.0f} GB", f"{_giga(abs(room - needed))} GB"
        lines.append(
            f"  of {size} this leaves {rest}"
            if needed <= room
            else f"  exceeds {size} by {rest}: does not fit"
        )
        return lines

    def _lines_of_time(self) -> list[str]:
        trainer = self.config.trainer
        lines = []
        for layout, followed in self.layouts.values():
            time = self.time(layout, followed)
            moved = ", ".join(f"{_giga(size)} GB {name}" for name, size in sorted(followed.received.items()))
            lines.append(
                f"{layout.kind}: each GPU receives "
                f"{moved or 'nothing'} a step; weights, optimizer and average {_giga(_state(followed.memory))} GB"
            )
            lines.append(
                f"  a step: {time.computing:.3g} s computing at {self.utilisation:.0%} of the peak, "
                f"{time.exchanging:.3g} s exchanging; {time.seconds:.3g} s if both overlap"
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
        layout, followed = next(iter(self.layouts.values()))
        return self.time(layout, followed).seconds * self.config.trainer.max_steps * layout.ranks / HOUR

    def as_json(self) -> dict[str, Any]:
        layouts = {
            shards: {"received": followed.received, **asdict(self.time(layout, followed))}
            for shards, (layout, followed) in self.layouts.items()
        }
        followed = {"checkpointing": self.followed[True], "all_kept": self.followed[False]}
        return {
            "config": self.config.name,
            "gpu": self.gpu,
            "utilisation": self.utilisation,
            "passes": {name: asdict(one) for name, one in followed.items()},
            "layouts_by_shards": layouts,
            "gpu_hours": self.gpu_hours,
        }


def print_measured(config: RunConfig) -> dict[str, Any]:
    """Two real steps on this machine, and what `follow` says of them."""
    import torch

    from benchmarks.cost_model.simulated_step import follow, measure

    planned = follow(config, config.trainer.checkpointing, fused=torch.cuda.is_available())
    measured: Measured = measure(config)
    operations = planned.half + planned.single
    print(
        f"\ntwo steps on this machine: {_giga(measured.peak)} GB at most, planned {_giga(planned.peak)} "
        f"({measured.peak / planned.peak - 1:+.1%}); {measured.operations / TERA:.4g} TFLOP a step, planned "
        f"{operations / TERA:.4g} ({measured.operations / operations - 1:+.1%})"
    )
    return {**asdict(measured), "planned_peak": planned.peak, "planned_operations": operations}


def _state(memory: dict[str, int]) -> int:
    return sum(memory.get(kind, 0) for kind in ("weights", "optimizer", "average"))


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
