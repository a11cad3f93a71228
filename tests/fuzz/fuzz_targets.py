"""All targets by name."""

from fuzz_campaign import Target
from fuzz_data import Embeddings, Images, Indices, Prepared, Shards, Streams, Tables
from fuzz_runs import CommandLines, GoldenFolders, RunFolders, Sampling, Yaml
from fuzz_weights import Checkpoints, Exported, ShardedCheckpoints, Weights

TARGETS: dict[str, type[Target]] = {
    target.name: target
    for target in (
        Images, Shards, Streams, Tables, Prepared, Embeddings, Indices, Exported, Weights, Checkpoints,
        ShardedCheckpoints, RunFolders, Yaml, CommandLines, Sampling, GoldenFolders,
    )
}  # fmt: skip
