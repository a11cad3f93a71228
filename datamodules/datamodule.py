"""ShardDataModule: shards → batches, with a position that one integer resumes exactly."""

import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from datamodules.batches import Batch, collate, pack_batch
from datamodules.caption_encoding import CaptionEncoder
from datamodules.config import SHARDS, STREAMS, DataConfig, Limits, as_list
from datamodules.dataset_source import DatasetSamples, open_dataset
from datamodules.datasets import PositionBatches, Samples, ShardSamples, TrainingSet, ValidationSet
from datamodules.fixed_samples import evenly_spread, fixed_samples
from datamodules.loader import BadSampleCount, CountingLoader
from datamodules.shards.bad_samples import BadSample
from datamodules.shards.embeddings import EmbeddingStore
from datamodules.shards.order import EpochOrder, rank_batch_size, validation_batches
from datamodules.shards.samples import Framing
from datamodules.shards.shard_discovery import ShardSet, as_before, find_shards
from datamodules.shards.shard_paths import split_of
from datamodules.shards.streams import StreamSet
from datamodules.workers import outlive_signals
from switti.errors import UserError
from switti.text.base import TextEncoder

log = logging.getLogger(__name__)
VALIDATION = "validation"


class ShardDataModule(LightningDataModule):
    """Training and validation batches from WebDataset shards.

    A batch holds image [B, 3, H, W] float32 in [-1, 1]; caption (as used: "" if dropped) and key, lists of str; size
    [B, 2] (height, width) of the original; crop [B, 4] (height, width, top, left) in pixels of data.crop_base; seed
    [B], 63 bits of (run seed, epoch, key), from which crop and dropping were drawn; dropped [B] bool; and with
    embeddings or an encoder text [B, T, C], text_mask [B, T] (True: real token), pooled [B, P]: the null caption's
    where dropped. Embeddings come from data.embeddings, or from a stream itself; captions without are encoded here.

    Validation shards named `validation-<split>-<number>.tar` make several validation splits, each with a loader of its
    own; others make one without a name.

    The training loader has no end: a run is measured in steps. It starts at `consumed`, the global number of samples
    trained on, which the training loop advances by `global_batch` after each batch, before a checkpoint is
    written, with `advance()`. The trainer must have use_distributed_sampler=False; ranks are divided here.

    Args:
        resolution: side of the images if data.resolution is not set: the tokenizer's.
        accumulate: batches of one optimizer step; data.batch_size counts the samples of the whole step.
        expected_fingerprint: of the run's text encoder; embeddings of any other are refused.
        encoder: the run's text encoder, whose fingerprint then is the expected one; None: captions stay texts.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        resolution: int,
        accumulate: int = 1,
        expected_fingerprint: str | None = None,
        encoder: TextEncoder | None = None,
    ) -> None:
        super().__init__()
        self.config, self.seed, self.accumulate = config, seed, accumulate
        self.resolution = config.resolution or resolution
        self.encode = None if encoder is None else CaptionEncoder(encoder)
        self.expected_fingerprint = expected_fingerprint if encoder is None else encoder.fingerprint
        self.consumed = 0
        self._said = False
        # A callback sets `watched` to sum over all ranks what `bad_samples` counts of this rank's training loader.
        self.watched = False
        self.bad_samples: BadSampleCount | None = None
        self._shard_sets: dict[str, ShardSet] = {}
        self._datasets: dict[str, DatasetSamples] = {}
        self._order: EpochOrder | None = None
        self.training_set: TrainingSet | None = None
        # By the name of the split, in the order of the loaders.
        self.validation_sets: dict[str, ValidationSet] = {}

    @property
    def streamed(self) -> bool:
        """Whether training reads streams, which cannot be resumed exactly."""
        return self.config.streamed

    @property
    def rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def rank_batch(self) -> int:
        """Samples that one rank reads at a time. UserError if data.batch_size cannot be divided."""
        return rank_batch_size(self.config.batch_size, self.world_size, self.accumulate)

    @property
    def global_batch(self) -> int:
        """Samples that all ranks together read at a time; `accumulate` of these make data.batch_size."""
        return self.rank_batch * self.world_size

    @property
    def epoch(self) -> int | None:
        """The epoch of the next sample; None for streams."""
        return None if self._order is None else self.consumed // self._order.samples

    @property
    def validation_splits(self) -> list[str]:
        """Names of the validation splits in the order of their loaders; empty where shards name none."""
        names = list(self.validation_sets)
        return [] if names == [""] else names

    def setup(self, stage: str | None = None) -> None:
        """Index the shards (later calls read the stored index) and check the embeddings.

        Raises:
            UserError: more is missing or corrupt than data.max_bad_fraction allows, or data.batch_size cannot be
                divided among the ranks.
        """
        rank_batch_size(self.config.batch_size, self.world_size, self.accumulate)
        if self.training_set is None and not self.streamed and stage in ("fit", None):
            self._order_training()
        if not self.validation_sets:
            self.validation_sets = {
                name: ValidationSet(self._samples("validation", random_crop=False, dropout=False, part=name))
                for name in self._validation_names()
            }

    def _order_training(self) -> None:
        samples = self._samples("train", random_crop=self.config.crop == "random", dropout=True)
        self._order = EpochOrder(samples.counts, self.config.shuffle_window_shards, self.seed)
        self.training_set = TrainingSet(samples, self._order)

    def _validation_names(self) -> list[str]:
        if self.config.source != SHARDS:
            return [""]
        return sorted({split_of(shard.path) for shard in self._shards(VALIDATION).shards})

    def _samples(self, split: str, random_crop: bool, dropout: bool, part: str | None = None) -> Samples:
        """part: one of the validation splits; None: all samples."""
        if self.config.source != SHARDS:
            return self._dataset(split, self._framing(random_crop, dropout))
        shards = self._shards(split).shards
        if part is not None:
            shards = [shard for shard in shards if split_of(shard.path) == part]
        folders, limit = as_list(self.config.embeddings), self.config.max_bad_fraction
        store = None
        if folders:
            store = EmbeddingStore(
                folders, shards, self.expected_fingerprint, limit, variants=self._draws_captions(dropout)
            )
            if self.encode is not None and store.identity != self.encode.identity:
                raise UserError(
                    f"data.embeddings={folders[0]}: {store.identity} is not the run's {self.encode.identity}; run "
                    "experiments.embed again"
                )
        return ShardSamples(shards, self._framing(random_crop, dropout), store, self.seed)

    def _dataset(self, split: str, framing: Framing) -> DatasetSamples:
        source, entries = self.config.source, as_list(getattr(self.config, split))
        if split not in self._datasets:
            dataset = open_dataset(source, f"data.{split}", entries)
            self._datasets[split] = DatasetSamples(dataset, source, split, framing, self.seed)
        return replace(self._datasets[split], framing=framing)

    def _shards(self, split: str) -> ShardSet:
        if split in self._shard_sets:
            return self._shard_sets[split]
        patterns = as_list(getattr(self.config, split))
        streams = [pattern for pattern in patterns if pattern.startswith(STREAMS)]
        if streams:
            raise UserError(
                f"data.{split}={streams[0]!r} is a stream, which is for training alone; give shards on disk"
            )
        self._shard_sets[split] = find_shards(f"data.{split}", patterns, self.config.max_bad_fraction)
        return self._shard_sets[split]

    @property
    def missing_samples(self) -> list[BadSample]:
        """Samples found missing when the training shards were indexed."""
        return self._shard_sets["train"].losses if "train" in self._shard_sets else []

    @property
    def contents(self) -> dict[str, dict[str, Any]]:
        """{"train": {"samples", "digest"}, "validation": …} of the data, see ShardSet.digest.

        They distinguish runs over the same paths whose contents were replaced in between. Streams have no entry.
        """
        shards = {
            split: {"samples": sum(map(len, shard_set.shards)), "digest": shard_set.digest}
            for split, shard_set in sorted(self._shard_sets.items())
        }
        return shards | {
            split: {"samples": sum(samples.counts), "digest": samples.digest}
            for split, samples in sorted(self._datasets.items())
        }

    def _framing(self, random_crop: bool, dropout: bool) -> Framing:
        probability = self.config.caption_dropout if dropout else 0.0
        limits = Limits(self.config.max_pixels, self.config.max_aspect_ratio)
        draws = self._draws_captions(dropout)
        return Framing(self.resolution, self.config.crop_base, random_crop, probability, limits, draws)

    def _draws_captions(self, training: bool) -> bool:
        return training and self.config.captions == "drawn"

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Seeds stay on the host, where random streams start from them: a step must not wait for the device."""
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved | {"seed": batch["seed"]} if "seed" in batch else moved

    def train_dataloader(self) -> CountingLoader:
        if self.streamed:
            return self._stream_loader()
        if self.training_set is None or self._order is None:
            self.setup("fit")
        assert self.training_set is not None and self._order is not None  # setup has made them
        batches = PositionBatches(lambda: self.consumed, self.rank_batch, self.rank, self.world_size)
        self.bad_samples = BadSampleCount(self.config.max_bad_fraction, self._order.samples, self.watched)
        return CountingLoader(
            self.training_set,
            batch_sampler=batches,
            bad_samples=self.bad_samples,
            **self._options(self.training_set.samples.store),
        )

    def _stream_loader(self) -> CountingLoader:
        patterns = as_list(self.config.train)
        if not all(pattern.startswith(STREAMS) for pattern in patterns):
            raise UserError("data.train mixes streams and shards on disk; give one kind")
        _say(f"data.train is streamed ({patterns[0]} …): resampled, not exactly resumable")
        dataset = self._stream(self._framing(self.config.crop == "random", dropout=True))
        self.bad_samples = BadSampleCount(self.config.max_bad_fraction, None, self.watched)
        return CountingLoader(
            dataset, batch_size=self.rank_batch, bad_samples=self.bad_samples, **self._options(None)
        )

    def _stream(self, framing: Framing) -> StreamSet:
        return StreamSet(
            as_list(self.config.train),
            framing,
            self.seed,
            self.consumed,
            self.rank,
            timeout=self.config.stream_timeout,
            retries=self.config.stream_retries,
            identity=None if self.encode is None else self.encode.identity,
        )

    def val_dataloader(self) -> CountingLoader | list[CountingLoader]:
        """All samples once, in equally many batches on every rank; a loader for each of several splits."""
        if not self.validation_sets:
            self.setup("validate")
        loaders = [self._validation_loader(chosen) for chosen in self.validation_sets.values()]
        return loaders if len(loaders) > 1 else loaders[0]

    def _validation_loader(self, chosen: ValidationSet) -> CountingLoader:
        batches = validation_batches(len(chosen), self.rank_batch, self.rank, self.world_size)
        bad_samples = BadSampleCount(self.config.max_bad_fraction, len(chosen))
        return CountingLoader(
            chosen, batch_sampler=batches, bad_samples=bad_samples, **self._options(chosen.samples.store)
        )

    def examples(self, split: str, count: int) -> Batch:
        """`count` samples spread evenly over "train", "validation" or "validation/<split>", center-cropped, as a batch.

        They are the same for every run over these shards. Those that cannot be read are skipped.
        """
        return next(self.example_batches(split, count, count))

    def example_batches(self, split: str, count: int, size: int) -> Iterator[Batch]:
        """The same in batches of up to `size`, one in memory at a time.

        Raises:
            UserError: none can be read, or there is no validation split of that name.
        """
        samples = self._samples_of(split)
        chosen, found = evenly_spread(samples, count), False
        for start in range(0, len(chosen), size):
            read = [samples.read(shard, row, epoch=0) for shard, row in chosen[start : start + size]]
            if batch := collate(read, samples.store):
                found = True
                yield batch
        if not found:
            raise UserError(f"data.{split}: none of {len(chosen)} images can be read")

    def _samples_of(self, split: str) -> Samples:
        """Center-cropped. UserError if there is no validation split of that name."""
        main, _, part = split.partition("/")
        if part and part not in (known := self._validation_names()):
            there = ", ".join(f"{VALIDATION}/{name}" for name in known if name) or f"{VALIDATION} alone"
            raise UserError(f"data.validation has no split {split}; there is {there}")
        return self._samples(main, random_crop=False, dropout=False, part=part or None)

    def captions(self, split: str, count: int) -> list[str]:
        """Main captions of `count` samples spread evenly over a split, without their images.

        Those that cannot be read are skipped. Of a dataset of one's own, whose captions come with its images: none.
        """
        samples = self._samples_of(split)
        found: list[str] = []
        if isinstance(samples, ShardSamples):
            for shard, row in evenly_spread(samples, count):
                with suppress(OSError, UserError, UnicodeDecodeError):
                    found.append(samples.reader.caption(shard, row))
        return found

    def fixed_batch(self, count: int) -> Batch:
        """`count` training samples as one batch that depends on the data and the run's seed alone.

        Cropped as in epoch 0, with the stored captions, none dropped; all samples if there are fewer. Of streams it is
        the first ones of the first shard.

        Raises:
            UserError: none can be read.
        """
        framing = self._framing(self.config.crop == "random", dropout=False)
        if self.streamed:
            good, store = self._stream(framing).first(count), None
        else:
            samples = self._samples("train", framing.random_crop, dropout=False)
            good, store = fixed_samples(samples, self.seed, count), samples.store
        if not good:
            raise UserError("data.train: no image of the fixed batch can be read")
        stored: dict[str, Any] = {}
        if store is not None:
            stored = {"null": store.null, "max_length": store.identity.max_length}
        length = 0 if self.encode is None else self.encode.identity.max_length
        return pack_batch([*good], **stored).unpack(self.encode, length)

    def _options(self, store: EmbeddingStore | None) -> dict[str, Any]:
        stored: dict[str, Any] = {}
        if store is not None:
            stored = {"null": store.null, "max_length": store.identity.max_length}
        elif self.encode is not None:
            if isinstance(self.trainer, Trainer):
                self.encode.to(self.trainer.strategy.root_device)
            if not self._said:
                _say(
                    "captions without embeddings are encoded while training, which takes time in each step; "
                    "`python -m experiments.embed` does it once"
                )
            self._said = True
        return {
            "num_workers": self.config.workers,
            "collate_fn": partial(pack_batch, **stored),
            "pin_memory": torch.cuda.is_available(),
            "worker_init_fn": outlive_signals if self.config.workers else None,
            "encode": self.encode,
            "max_length": 0 if self.encode is None else self.encode.identity.max_length,
        }

    def advance(self, samples: int | None = None) -> None:
        """Advance the position by one global batch, or by `samples`."""
        self.consumed += self.global_batch if samples is None else samples

    def state_dict(self) -> dict[str, Any]:
        """`consumed` is the position; `shards`, [name, samples] of each in order, is what it refers to.

        The order depends on these names and numbers alone, whatever has happened to the shards since.
        """
        shards = [] if self._order is None or self._datasets else self._shards("train").listing
        samples = self._order.samples if self._order else 0
        return {"consumed": self.consumed, "samples": samples, "shards": shards}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.consumed = int(state_dict["consumed"])
        listing = state_dict.get("shards", [])
        if (
            listing
            and self._order is not None
            and not self._datasets
            and listing != self._shards("train").listing
        ):
            self._shard_sets["train"] = as_before(self._shards("train"), listing)
            self._order_training()
        before, now = int(state_dict["samples"]), self._order.samples if self._order else 0
        if before and now and before != now:
            rank_zero_warn(
                f"data.train had {before} samples when the checkpoint was written and has {now} now: the order "
                "continues at the same position, but is a different one"
            )


@rank_zero_only
def _say(message: str) -> None:
    log.warning(message)
