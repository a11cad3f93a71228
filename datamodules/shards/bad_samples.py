"""Reports of bad samples: missing or corrupt data. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "undecodable_picture",
    "undecodable_caption",
    "missing_picture",
    "missing_caption",
    "missing_embedding",
    "duplicate_member",
    "truncated_shard",
    "missing_shard",
    "unreadable_shard",
    "stream_retry",
    "failed_stream",
]


@dataclass(frozen=True)
class BadSample:
    """A sample or shard that cannot be read. samples: how many are lost by it, as far as is known."""

    shard: str
    key: str
    reason: str
    kind: Kind = "undecodable_picture"
    samples: int = 1


class Fatal(BadSample):
    """An error that ends the run, with its reason as the message: every other sample would fail as well."""
