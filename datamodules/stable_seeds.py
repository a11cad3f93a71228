"""Numbers that depend on their text alone: the same on every machine, in every process and Python version."""

import hashlib


def stable_hash(text: str) -> int:
    """A 64-bit unsigned integer of the text (BLAKE2b)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def stable_fraction(text: str) -> float:
    """A number in [0, 1) of the text."""
    return (stable_hash(text) >> 11) / 2**53


def sample_seed(seed: int, epoch: int, key: str) -> int:
    """The 63-bit seed of all randomness of one sample in one epoch.

    It does not depend on the batch, the place in it, the worker or the rank: two runs that differ in these
    still crop, drop and draw alike.
    """
    return stable_hash(f"{seed}/{epoch}/{key}") >> 1
