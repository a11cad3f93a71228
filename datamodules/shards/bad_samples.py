"""What could not be read, and how it is told. Imports no torch."""

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
class Damage:
    """What could not be read: its shard, key and the reason. samples: how many are lost by it, so far as is known."""

    shard: str
    key: str
    reason: str
    kind: Kind = "undecodable_picture"
    samples: int = 1


class Fatal(Damage):
    """What ends the run, with its reason as the message: no other sample could stand in for this one."""
