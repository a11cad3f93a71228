"""Training and validation splits by stable hashes: unseen concepts, and held-out (concept, style) pairs.

A held-out pair asks for composition: its concept occurs in training in another style, and its style with other
concepts. Whether an item may be held out follows from its key alone; that training has the concept and the style is
checked when the item is assigned, after all others.
"""

from dataclasses import dataclass, field
from typing import Protocol

from datamodules.stable_seeds import stable_fraction

TRAIN, VALIDATION = "train", "validation"
CONCEPTS, PAIRS = f"{VALIDATION}-concepts", f"{VALIDATION}-pairs"
_RETURNED = "held-out pairs returned to training, which had no other image of the concept or of the style"


class Assigned(Protocol):
    """The part of an item that its split depends on."""

    @property
    def key(self) -> str: ...
    @property
    def group(self) -> str: ...
    @property
    def concept(self) -> str: ...
    @property
    def kind(self) -> str: ...


@dataclass
class Splits:
    """Assigns items to splits; those that `may_hold_out` names come after all others.

    concepts: expected share of groups that training never sees. pairs: expected share of the other items; 0: there is
    one validation split.
    """

    concepts: float
    pairs: float = 0.0
    returned: int = 0
    _seen: set[tuple[str, str]] = field(default_factory=set)

    @property
    def names(self) -> list[str]:
        return [TRAIN, CONCEPTS, PAIRS] if self.pairs else [TRAIN, VALIDATION]

    @property
    def options(self) -> dict[str, str]:
        """Validation split → the option that sets its share."""
        if not self.pairs:
            return {VALIDATION: "--validation-fraction"} if self.concepts else {}
        concepts = {CONCEPTS: "--validation-fraction"} if self.concepts else {}
        return concepts | {PAIRS: "--pair-fraction"}

    @property
    def notes(self) -> dict[str, int]:
        return {_RETURNED: self.returned} if self.returned else {}

    def _is_unseen(self, item: Assigned) -> bool:
        return stable_fraction(f"split/{item.group}") < self.concepts

    def may_hold_out(self, item: Assigned) -> bool:
        """Whether the item is a held-out pair, provided that training has its concept and its style."""
        return not self._is_unseen(item) and stable_fraction(f"pair/{item.key}") < self.pairs

    def assign(self, item: Assigned) -> str:
        """The item's split."""
        if self._is_unseen(item):
            return CONCEPTS if self.pairs else VALIDATION
        seen = {("concept", item.concept), ("style", item.kind)}
        if self.may_hold_out(item):
            if seen <= self._seen:
                return PAIRS
            self.returned += 1
        self._seen |= seen
        return TRAIN
