"""python -m experiments.train CONFIG [key=value …] [--show] [--explain SETTING]

Train one run. CONFIG is a YAML file, a name below configs/ such as generator/demo, or a run folder. The run folder is
runs/<study or "single">/<name>/. The same command again resumes an interrupted run exactly where it stopped, and does
nothing for a finished one.

    python -m experiments.train generator/demo                                      # a laptop, no GPU
    python -m experiments.train generator/demo model.visibility=causal trainer.compile=true
    torchrun --nproc-per-node=8 -m experiments.train CONFIG trainer.devices=8 trainer.strategy=fsdp

For several nodes see experiments/launch_scripts.
"""

import copy
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

from configs.extensions import check_extensions
from configs.loading import load
from configs.reference import annotated_yaml, explain, group_list
from configs.resume_rules import check_resumable
from configs.schema import RunConfig
from datamodules.workers import explained_worker_failures
from experiments.cli import argument_parser, run
from lightning_modules.strategies.launch_environment import check_launch, is_first_rank
from sweeps.run_lock import training_lock
from switti.environment import masked
from switti.files import writing
from switti.run_folder import CONFIG, clear_leftovers, read_record


def main(argv: list[str]) -> int:
    parser = argument_parser(__doc__, epilog=group_list())
    parser.add_argument("config", help="YAML file, name below configs/, or run folder")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings over those of the config")
    parser.add_argument(
        "--show", action="store_true", help="print all settings as annotated YAML, and counts"
    )
    parser.add_argument(
        "--explain", metavar="SETTING", help="print the meaning of a setting, or of a group of them"
    )
    options = parser.parse_intermixed_args(argv)
    config = load(options.config, options.settings)
    if options.explain is not None:
        print(explain(config, options.explain))
        return 0
    if options.show:
        return show(config)
    if config.trainer.fast_dev_run:
        train(in_scratch_folder(config))
        return 0
    record = read_record(config.run_dir) or {}
    if is_complete(record, config.trainer.max_steps):
        early = f" ({record['early_stop']['reason']})" if "early_stop" in record else ""
        print(
            f"{config.run_dir} is finished at step {record['step']}{early}; nothing to do "
            "(raise trainer.max_steps to continue it, choose another name=… for a new run)"
        )
        return 0
    train(config)
    return 0


def is_complete(record: dict[str, Any], max_steps: int) -> bool:
    """Whether a run has made all its steps, or was stopped early and max_steps has not been raised since."""
    if record.get("status") != "finished":
        return False
    stopped = "early_stop" in record and record.get("max_steps", 0) >= max_steps
    return stopped or record.get("step", 0) >= max_steps


def show(config: RunConfig) -> int:
    """Print the settings, then the counts of parameters, tokens and samples that follow from them."""
    print(annotated_yaml(config), flush=True)
    import torch

    from switti.scales import Pyramid
    from switti.tokenizer.rqvae import RQVAE
    from switti.weights.fill import count_parameters

    with torch.device("meta"):
        tokenizer = sum(p.numel() for p in RQVAE(config.tokenizer).parameters())
    pyramid = Pyramid(tuple(config.tokenizer.scales))
    print(f"# tokenizer: {tokenizer:,} parameters, {config.tokenizer.resolution} px")
    if config.task == "generator":
        print(f"# generator: {count_parameters(config.model):,} parameters")
    print(f"# tokens per image: {pyramid.length:,} in {pyramid.count} scales")
    print(
        f"# samples: {config.trainer.max_steps * config.data.batch_size:,} in {config.trainer.max_steps:,} steps"
    )
    return 0


def train(config: RunConfig) -> None:
    """Fit from the start, or from the newest intact checkpoint."""
    folder = config.run_dir
    check_launch(config.trainer)
    check_extensions(config)
    if (folder / CONFIG).is_file() and not config.trainer.fast_dev_run:
        check_resumable(config, folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not is_first_rank():
        return fit(config)
    with training_lock(folder):
        clear_leftovers(folder)
        try:
            return fit(config)
        finally:
            if config.trainer.fast_dev_run:
                shutil.rmtree(folder, ignore_errors=True)


def in_scratch_folder(config: RunConfig) -> RunConfig:
    """For trainer.fast_dev_run: the same run elsewhere, where no run is looked for and none is in the way."""
    scratch = copy.copy(config)
    scratch.runs_dir = str(Path(config.runs_dir) / ".fast_dev_run")
    return scratch


def fit(config: RunConfig) -> None:
    """Data, model, callbacks, loggers, trainer, fit. The first rank holds the run's lock."""
    folder = config.run_dir

    _print_once(f"{folder}: importing torch and lightning")
    from lightning.pytorch import seed_everything

    from callbacks.checkpointing import find_resume
    from configs.build import build_callbacks, build_datamodule, build_encoder, build_module, build_trainer
    from configs.loggers import build_loggers

    _print_once(f"{folder}: loading data and models")
    configure_logging()
    seed_everything(config.seed, verbose=False)

    encoder = build_encoder(config)
    datamodule = build_datamodule(config, encoder)
    datamodule.setup("fit")

    resumes = not config.trainer.fast_dev_run
    checkpoint = find_resume(folder, thorough=is_first_rank()) if resumes else None
    module = build_module(config, fresh=checkpoint is None)

    callbacks = build_callbacks(config, datamodule, encoder)
    loggers = build_loggers(config)
    trainer = build_trainer(config, callbacks, loggers)

    _print_once(f"{folder}: " + (f"resuming from {checkpoint.name}" if checkpoint else "starting"))
    with explained_worker_failures():
        trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=False)


def _print_once(text: str) -> None:
    """Print on the first rank only, also before the ranks are connected."""
    if is_first_rank():
        print(text, flush=True)


def configure_logging() -> None:
    """Hide warnings of libraries that a user of this command cannot act on, and secrets in all log lines."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for handler in logging.getLogger().handlers:
        handler.addFilter(_mask)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for pattern in (
        ".*does not have many workers.*",
        # The EMA is always in evaluation mode.
        ".*in eval mode at the start of training.*",
        ".*LeafSpec.*",
        # Nothing changes the logits in place.
        ".*FSDP2-wrapped module .* returned a view tensor.*",
        ".*litlogger.*",
        ".*weights_only.*",
        # Lightning's own call.
        ".*nn.functional.all_gather is deprecated.*",
        # Validation sums are already reduced over the ranks.
        ".*sync_dist=True.*",
        ".*broadcast_buffers.*",
        # check_launch has checked it.
        ".*srun. command is available.*",
    ):
        warnings.filterwarnings("ignore", pattern)


def _mask(record: logging.LogRecord) -> bool:
    record.msg, record.args = masked(record.getMessage()), ()
    return True


if __name__ == "__main__":
    run(main)
