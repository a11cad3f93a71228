"""Construction of a run from its settings: data module, Lightning module, callbacks, loggers, trainer."""

from dataclasses import replace
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler

from callbacks.activation_norms import ActivationNorms
from callbacks.bad_samples import BadSamples
from callbacks.checkpointing import build_checkpoint_callback
from callbacks.config_file import ConfigFile
from callbacks.data_position import DataPosition
from callbacks.ema import ExponentialMovingAverage
from callbacks.heartbeat import Heartbeat
from callbacks.objective_dynamics import (
    FixedBatchLoss,
    ImageScore,
    Objective,
    ObjectiveDynamics,
    build_rule,
)
from callbacks.online_metrics import OnlineMetrics
from callbacks.preemption import Preemption
from callbacks.progress import StepProgress
from callbacks.prompt_set import PromptSet
from callbacks.pruning import Pruning
from callbacks.rng_state import RngState
from callbacks.run_record import RunRecord
from callbacks.sample_grids import SampleGrids
from callbacks.skipped_steps import SkippedSteps
from callbacks.throughput import Throughput
from configs.load_run import load_frozen_tokenizer, load_initial_state
from configs.loading import to_dict, to_yaml
from configs.schema import RunConfig
from datamodules.datamodule import ShardDataModule
from lightning_modules.decoder_tuning import DecoderTuningModule
from lightning_modules.generator import GeneratorModule
from lightning_modules.strategies.parallel import build_strategy, cluster_environment
from lightning_modules.tokenizer import TokenizerModule
from switti.errors import UserError
from switti.import_path import build_object
from switti.metrics.catalogue import to_record
from switti.metrics.collection import build_metrics, extra_infos
from switti.metrics.retrieval import MAX_CANDIDATES
from switti.scales import Pyramid
from switti.text.base import TextEmbedding, TextEncoder
from switti.text.build import build_text_encoder

# The validation split of held-out (concept, style) pairs.
PAIRS = "pairs"


def build_encoder(config: RunConfig) -> TextEncoder | None:
    """The run's text encoder; None for tasks without captions."""
    return build_text_encoder(config.text) if config.task == "generator" else None


def build_datamodule(config: RunConfig, encoder: TextEncoder | None) -> ShardDataModule:
    """Batches for the run; embeddings must be of `encoder`, which encodes the captions that have none."""
    return ShardDataModule(
        config.data,
        seed=config.seed,
        resolution=config.tokenizer.resolution,
        accumulate=config.trainer.accumulate,
        encoder=encoder,
    )


def build_module(config: RunConfig, fresh: bool = True) -> LightningModule:
    """The module of the run's task, with its frozen parts loaded. UserError if a frozen part is missing.

    fresh: the run starts, so that `init_from` counts; a resumed run has its weights in its checkpoint.
    """
    common: dict[str, Any] = {"seed": config.seed, "ema": config.callbacks.ema_decay is not None}
    if config.init_from and config.task != "generator":
        raise UserError(
            f"init_from={config.init_from} is for generators; a {config.task} run starts from scratch"
        )
    if config.task == "tokenizer":
        return TokenizerModule(
            config.tokenizer, config.optimizer, config.tokenizer_loss, config.trainer, **common
        )
    if config.task == "decoder":
        rqvae = load_frozen_tokenizer(config, other_scales=True)
        return DecoderTuningModule(rqvae, config.optimizer, config.decoder, config.trainer, **common)
    tokenizer = load_frozen_tokenizer(config)
    if config.init_from and fresh:
        common["initial_state"] = load_initial_state(config.init_from, config, tokenizer)
    return GeneratorModule(config.model, tokenizer, config.optimizer, config.loss, config.trainer, **common)


def build_prompt_set(
    config: RunConfig, prompts: list[str], encoder: TextEncoder, text: TextEmbedding | None = None
) -> PromptSet:
    """Prompts with seeds 0, 1, … and the run's sampling settings; `text` where their embeddings are at hand."""
    text = encoder.encode(prompts) if text is None else text
    return PromptSet(prompts, text, encoder.encode([""]), list(range(len(prompts))), config.sampling)


def build_sample_grids(config: RunConfig, datamodule: ShardDataModule, encoder: TextEncoder) -> SampleGrids:
    """Grids over callbacks.sample_prompts, or over captions of the data."""
    settings = config.callbacks
    prompts = list(settings.sample_prompts) or grid_captions(datamodule, settings.sample_count)
    return SampleGrids(config.run_dir, settings.samples_every, build_prompt_set(config, prompts, encoder))


def grid_captions(datamodule: ShardDataModule, count: int) -> list[str]:
    """Captions spread over the validation split; where pairs are held out, half of training and half held-out ones."""
    if PAIRS not in datamodule.validation_splits or datamodule.streamed or count < 2:
        return list(datamodule.examples("validation", count)["caption"])
    seen = datamodule.examples("train", count - count // 2)["caption"]
    return [*seen, *datamodule.examples(f"validation/{PAIRS}", count // 2)["caption"]]


def build_online_metrics(
    config: RunConfig, datamodule: ShardDataModule, encoder: TextEncoder
) -> OnlineMetrics:
    """metrics.* over captions spread evenly over the split that metrics.captions names."""
    batch = datamodule.examples(config.metrics.captions, config.metrics.prompts)
    text = TextEmbedding(batch["text"], batch["text_mask"], batch["pooled"]) if "text" in batch else None
    return OnlineMetrics(
        config.callbacks.metrics_every,
        build_prompt_set(config, batch["caption"], encoder, text),
        real_images=(batch["image"] + 1) / 2,
        metrics=partial(build_metrics, config.metrics),
        candidates=candidate_captions(datamodule, config.metrics.captions, batch["caption"]),
        batch=config.metrics.batch,
    )


def candidate_captions(datamodule: ShardDataModule, split: str, prompts: list[str]) -> list[str]:
    """The captions of a split among which metrics look for the own one; of a dataset of one's own the prompts alone."""
    return datamodule.captions(split, MAX_CANDIDATES) or prompts


def build_objective_dynamics(
    config: RunConfig, datamodule: ShardDataModule, encoder: TextEncoder | None, record: RunRecord
) -> ObjectiveDynamics:
    """callbacks.objective_dynamics on a fixed batch of the training data, or on images sampled for its captions."""
    settings = config.callbacks.objective_dynamics
    batch = datamodule.fixed_batch(settings.batch)
    objective: Objective = FixedBatchLoss(batch)
    if settings.criterion == "clip_s":
        # Checked by the settings: this is a generator's run.
        assert encoder is not None
        text = TextEmbedding(batch["text"], batch["text_mask"], batch["pooled"])
        prompts = build_prompt_set(config, batch["caption"], encoder, text)
        metrics = replace(config.metrics, names=[settings.score], extra=[])
        objective = ImageScore(settings.score, prompts, partial(build_metrics, metrics))
    return ObjectiveDynamics(
        build_rule(settings), objective, settings.every, settings.min_steps, record.note_early_stop
    )


def build_callbacks(
    config: RunConfig, datamodule: ShardDataModule, encoder: TextEncoder | None
) -> list[Callback]:
    """All callbacks of a run, in the order in which they are called; Lightning puts the checkpoint last."""
    settings, pyramid = config.callbacks, Pyramid(tuple(config.tokenizer.scales))
    record = RunRecord(
        config.run_dir,
        name=config.name,
        study=config.study,
        task=config.task,
        seed=config.seed,
        tokens_per_image=pyramid.length,
        metrics=to_record(extra_infos(config.metrics)),
    )
    callbacks: list[Callback] = [
        ConfigFile(config.run_dir, to_yaml(config)),
        RngState(config.seed, to_dict(config)),
        Heartbeat(config.run_dir, settings.heartbeat_seconds, settings.watchdog_seconds),
        record,
        Throughput(config.trainer.log_every, config.data.batch_size),
        DataPosition(),
        BadSamples(config.run_dir),
        SkippedSteps(settings.max_skipped_steps, settings.max_skipped_in_a_row),
    ]
    if settings.ema_decay is not None:
        callbacks.append(ExponentialMovingAverage(settings.ema_decay))
    if encoder is not None and settings.activation_norms_every:
        callbacks.append(ActivationNorms(settings.activation_norms_every))
    if settings.objective_dynamics.enabled:
        callbacks.append(build_objective_dynamics(config, datamodule, encoder, record))
    if encoder is not None:
        if settings.samples_every:
            callbacks.append(build_sample_grids(config, datamodule, encoder))
        if settings.metrics_every:
            callbacks.append(build_online_metrics(config, datamodule, encoder))
    if settings.prunable:
        callbacks.append(Pruning(config.run_dir))
    callbacks += [build_object("callbacks.extra", path, Callback, config) for path in settings.extra]
    bar = StepProgress(config.trainer.log_every)
    preemption = Preemption(config.run_dir, settings.grace_seconds, settings.requeue)
    return [*callbacks, bar, preemption, build_checkpoint_callback(settings, config.run_dir)]


def build_profiler(config: RunConfig) -> Profiler | None:
    """trainer.profiler, with its output in the run folder's profile/."""
    folder, name = config.run_dir / "profile", config.trainer.profiler
    if name == "simple":
        return SimpleProfiler(dirpath=folder, filename=name)
    if name == "advanced":
        return AdvancedProfiler(dirpath=folder, filename=name)
    return None if name is None else PyTorchProfiler(dirpath=folder, filename=name)


def build_trainer(config: RunConfig, callbacks: list[Callback], loggers: list[Logger]) -> Trainer:
    """Lightning's trainer by trainer.*."""
    settings, folder = config.trainer, config.run_dir
    # Two optimizers: the module accumulates and clips by itself.
    manual = config.task != "generator"
    return Trainer(
        max_steps=settings.max_steps,
        max_epochs=-1,
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=build_strategy(settings),
        precision=settings.precision,
        accumulate_grad_batches=1 if manual else settings.accumulate,
        gradient_clip_val=None if manual else settings.gradient_clip or None,
        val_check_interval=settings.validate_every * settings.accumulate,
        check_val_every_n_epoch=None,
        limit_train_batches=settings.limit_train_batches,
        limit_val_batches=settings.validate_batches,
        fast_dev_run=settings.fast_dev_run,
        profiler=build_profiler(config),
        num_sanity_val_steps=0,
        log_every_n_steps=settings.log_every,
        deterministic="warn" if settings.deterministic else False,
        use_distributed_sampler=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
        logger=loggers,
        callbacks=callbacks,
        plugins=[*cluster_environment()],
    )
