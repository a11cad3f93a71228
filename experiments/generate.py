"""python -m experiments.generate SYSTEM --prompts SET|FILE|SHARDS --out DIR [key=value …] [--workers N] [--dry-run]

Generates the images of a prompt set as numbered WebDataset shards (PNG, prompt, JSON with index, ordinal, seed and
settings), for experiments.evaluate and for benchmarks of other programs.

SYSTEM is a run, a checkpoint, an exported folder or a hub id, with settings of the sampler as key=value;
diffusers:ID|PATH, with num_inference_steps, guidance_scale, height, width; folder:PATH of images made elsewhere, named
by their number; or package.module:Name, a class of your own.
SET is coco, mjhq, parti or geneval (a file of data/prompts) or emoji (captions of data/emoji64's validation split);
FILE is .csv, .tsv, .jsonl, .json or .txt; SHARDS a folder of shards, whose captions are taken.

An image depends on its prompt and its seed, a hash of set, index and ordinal: the same for all systems. Any number of
workers may work on one folder, here (--workers), under torchrun, or as a SLURM array; they may be killed and started
again in another number, and the bytes are the same.

    python -m experiments.generate runs/demo/visibility=causal,seed=0 --prompts emoji --out images/causal
    python -m experiments.generate diffusers:stabilityai/sdxl-turbo --prompts coco --out images/turbo --workers 1
    python -m experiments.generate EXPORTED --prompts geneval --out images/geneval --launcher slurm --workers 16
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evaluation.numbered_work import Progress, Work, Worker, do_units
from evaluation.prompt_sets import load_prompt_set
from experiments.cli import argument_parser, run
from switti import arguments
from switti.errors import UserError
from switti.files import check_output_folder, kind_of


def parser() -> argparse.ArgumentParser:
    form = argument_parser(__doc__)
    add = form.add_argument
    add("words", nargs="+", metavar="SYSTEM|key=value", help="what makes the images, and its settings")
    add("--prompts", required=True, help="prompt set, file or folder of shards")
    add("--prompt-column", metavar="NAME", help="column of the file that holds the prompt")
    add("--images-per-prompt", metavar="N", help="(geneval: 4, others: 1)")
    add("--limit", metavar="N", help="only the first N prompts")
    add("--out", type=Path, required=True, help="folder of the shards")
    add("--batch", default="8", help="images that a worker makes at once (%(default)s)")
    add("--workers", default="1", help="processes (%(default)s)")
    add("--dtype", choices=("float16", "bfloat16", "float32"), help="of diffusers' models on a GPU (float16)")
    add("--dry-run", action="store_true", help="say what is missing; make nothing")
    add(
        "--launcher",
        choices=("local", "slurm"),
        default="local",
        help="where workers are started (%(default)s)",
    )
    slurm = form.add_argument_group("with --launcher slurm")
    slurm.add_argument("--partition", help="sbatch's")
    slurm.add_argument("--time", default="4:00:00", help="[days-]hours:minutes:seconds (%(default)s)")
    slurm.add_argument("--cpus", type=int, metavar="N", help="cores a worker")
    slurm.add_argument("--memory", metavar="GB", type=int, help="GiB a worker")
    slurm.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs a worker (%(default)s)")
    slurm.add_argument("--sbatch", action="append", default=[], metavar="key=value",
                       help="any other option of sbatch, such as account=me; repeatable")  # fmt: skip
    return form


def main(argv: list[str]) -> int:
    options = parser().parse_intermixed_args(argv)
    source, settings = _split(options.words)
    batch = arguments.integer("--batch", options.batch, 1)
    workers = arguments.integer("--workers", options.workers, 1)
    images, limit = (
        None if value is None else arguments.integer(name, value, 1)
        for name, value in (("--images-per-prompt", options.images_per_prompt), ("--limit", options.limit))
    )
    prompts = load_prompt_set(options.prompts, images, limit, options.prompt_column)
    check_output_folder(options.out)
    if options.dry_run:
        return _dry_run(options.out, len(prompts))
    if "RANK" not in os.environ:
        if options.launcher == "slurm":
            return _submit(argv, options, workers)
        if workers > 1:
            return _start_workers(argv, workers)

    from evaluation.generation import UNIT, maker, manifest_of, publish_manifest, work_of
    from evaluation.systems import check_source, open_system

    check_source(source)
    worker = Worker.from_environment()
    _choose_device()
    with _one_line():
        system = open_system(source, settings, prompts, options.dtype)
    manifest = manifest_of(system, prompts, min(batch, UNIT))
    publish_manifest(options.out, manifest, prompts)
    work = work_of(options.out, manifest)
    progress = Progress(work, shown=worker.number == 0)
    try:
        do_units(work, maker(system, prompts, work, min(batch, UNIT)), worker, progress)
    finally:
        progress.close()
    if worker.number == 0:
        print(f"{options.out}: {len(prompts)} images of {len(prompts.texts)} prompts ({prompts.name})")
    return 0


def _split(words: list[str]) -> tuple[str, list[str]]:
    settings = [word for word in words if "=" in word and not os.path.exists(word)]
    systems = [word for word in words if word not in settings]
    if len(systems) != 1:
        raise UserError(f"give one SYSTEM, not {len(systems)} ({' '.join(systems) or 'only settings'})")
    return systems[0], settings


def _dry_run(folder: Path, images: int) -> int:
    from evaluation.generation import read_manifest, work_of

    manifest = read_manifest(folder) if kind_of(folder) == "folder" else None
    if manifest is None:
        print(f"{folder}: nothing there; {images} images to make")
        return 0
    work = work_of(folder, manifest)
    print(_state(work, manifest["name"]))
    return 0


def _state(work: Work, name: str) -> str:
    missing = work.missing()
    left, total = sum(work.sizes[unit] for unit in missing), sum(work.sizes)
    which = ", ".join(work.path(unit).name for unit in missing[:3]) + (" …" if len(missing) > 3 else "")
    return f"{work.folder}: {total - left} of {total} images of {name}" + (
        f"; {left} to make ({which})" if missing else "; complete"
    )


def _choose_device() -> None:
    """Each worker of a machine on a GPU of its own."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@contextmanager
def _one_line() -> Iterator[None]:
    """A system's library may fail in its own ways; the last line says what happened."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        raise UserError(f"the system cannot be opened: {' '.join(str(error).split())[:300]}") from error


def _environment(number: int, workers: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // workers)
    given = {"RANK": str(number), "WORLD_SIZE": str(workers), "LOCAL_RANK": str(number)}
    return {"OMP_NUM_THREADS": str(threads)} | dict(os.environ) | given


def _start_workers(argv: list[str], workers: int) -> int:
    """Processes of this command. The first shows the common progress; an error of another is shown at the end."""
    import tempfile

    command = [sys.executable, "-m", "experiments.generate", *argv]
    with tempfile.TemporaryFile() as others:
        children = [
            subprocess.Popen(command, env=_environment(number, workers), stderr=others if number else None)
            for number in range(workers)
        ]
        try:
            codes = [child.wait() for child in children]
        except KeyboardInterrupt:
            # The terminal has interrupted them as well.
            for child in children:
                child.wait()
            raise
        finally:
            for child in children:
                child.kill()
        if any(codes) and not codes[0]:
            others.seek(0)
            print(others.read().decode(errors="replace").strip().splitlines()[-1:], file=sys.stderr)
    return next((code for code in codes if code), 0)


def _submit(argv: list[str], options: argparse.Namespace, workers: int) -> int:
    from sweeps.launchers.slurm import resources, submit_array

    environments = [{"RANK": str(number), "WORLD_SIZE": str(workers)} for number in range(workers)]
    command = [sys.executable, "-m", "experiments.generate", *argv]
    jobs = submit_array(options.out, resources(options), command, environments, options.gpus)
    print(f"{options.out}: {workers} workers submitted ({', '.join(jobs[:3])}{' …' if workers > 3 else ''})")
    print("The same command with --dry-run says how far they are.")
    return 0


if __name__ == "__main__":
    run(main)
