"""Suggestions for unknown names: "did you mean …?" for typing errors and for the names that other libraries use.

A wrong suggestion is worse than none: names are compared word by word, and only words that differ by a typing error
count as the same.
"""

import re
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher

# Least similarity of two words that count as one; larger if their first letters differ.
_SAME, _SAME_BUT_FIRST = 0.7, 0.85
# The same for two names with different numbers of words: a separator is missing, and perhaps a letter.
_JOINED = 0.9
# Letters of the shortest word in which a typing error is recognized.
_SHORTEST = 3
# Words that say nothing about which setting is meant.
_FILLERS = {"n", "num", "number", "of", "use", "enable", "the", "with", "per", "default"}
# Names in one suggestion, names in a list of all, characters of a value in a message.
_MOST, _LISTED, _SHOWN = 3, 20, 60


def did_you_mean(name: str, known: Iterable[str], foreign: Mapping[str, str] | None = None) -> str:
    """The end of a message about an unknown name: "; did you mean 'x'?", "; <what to do instead>", or "".

    known: names that exist, dotted or with slashes if they stand in groups. foreign: what users of other
    libraries type (the last part of a name, or the first one followed by a dot) → a name in `known`, or a sentence on
    what to do instead.
    """
    names = list(known)
    for part in (name, _last(name), name.partition(".")[0] + "."):
        if meant := (foreign or {}).get(_plain(part)):
            return f"; did you mean {meant!r}?" if meant in names else f"; {meant}"
    if close := nearest(name, names):
        return f"; did you mean {' or '.join(map(repr, close))}?"
    return ""


def not_found(kind: str, name: object, place: str, known: Iterable[str]) -> str:
    """The message about a file or folder that does not exist.

    kind: "study", "config". place: where else than at the path itself it was looked for, such as "below runs/".
    """
    names = list(known)
    listed = ", ".join(names[:_LISTED]) + (
        f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    )
    hint = did_you_mean(str(name), names) or f"; there are: {listed or 'none'}"
    return f"no {kind} {shortened(name)!r}, neither as a path nor {place}{hint}"


def nearest(name: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that are most likely meant, at most three; [] if none is near or too many are."""
    scores = {candidate: _likeness(name, candidate) for candidate in names}
    best = max(scores.values(), default=0.0)
    close = [candidate for candidate, score in scores.items() if score == best]
    return close if best > 0 and len(close) <= _MOST else []


def shortened(value: object) -> str:
    """A value for a message; of a long one only the beginning."""
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}… ({len(text)} characters)"


def printable(value: object) -> str:
    """A value from a file for a message: `shortened`, in ASCII, so that nothing in it acts on a terminal."""
    return shortened(ascii(str(value))[1:-1])


def _likeness(given: str, candidate: str) -> float:
    """0: something else. The last parts decide; that the groups are alike, too, decides between equal ones."""
    if _plain(given).replace(".", "_") == _plain(candidate).replace(".", "_"):
        return 3.0
    mine, theirs = _words(_last(given)), _words(_last(candidate))
    if mine == theirs or "".join(mine) == "".join(theirs):
        last = 1.0
    elif len(mine) == len(theirs):
        last = min((_same(a, b) for a, b in zip(mine, theirs, strict=True)), default=0.0)
    else:  # the beginning of a longer name, such as `warmup` of warmup_steps
        begins = theirs[: len(mine)] == mine and len("".join(mine)) >= _SHORTEST
        joined = _same("".join(mine), "".join(theirs))
        last = _SAME if begins else joined if joined >= _JOINED else 0.0
    if not last:
        return 0.0
    groups = SequenceMatcher(None, _group(given), _group(candidate)).ratio() if _group(given) else 0.0
    return last + 0.5 * groups


def _same(word: str, other: str) -> float:
    """Their similarity if one is the other with a typing error, otherwise 0."""
    if word == other:
        return 1.0
    if min(len(word), len(other)) < _SHORTEST:
        return 0.0
    ratio = SequenceMatcher(None, word, other).ratio()
    return ratio if ratio >= (_SAME if word[0] == other[0] else _SAME_BUT_FIRST) else 0.0


def _words(name: str) -> list[str]:
    words = [word for word in re.split(r"[^a-z0-9]+", _plain(name)) if word]
    return [word for word in words if word not in _FILLERS] or words


def _plain(name: str) -> str:
    """Lower case, one separator: maxSteps, max-steps and MAX_STEPS are one."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().replace("-", "_")


def _last(name: str) -> str:
    return re.split(r"[./]", name)[-1]


def _group(name: str) -> str:
    return name[: len(name) - len(_last(name))].rstrip("./")
