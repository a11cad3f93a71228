"""Values that settings took from environment variables; they may be secrets, so that the variable is shown instead.

Error messages of commands and records of runs pass through `masked`. Settings are saved with their `${oc.env:NAME}` as
it was given (see configs.loading), so that a run folder can be passed on.
"""

import os

# Characters: shorter values are not secrets, and occur in ordinary words.
_SHORTEST = 4
_taken: dict[str, str] = {}


def take(name: str) -> str:
    """The variable's value, remembered for `masked`. Raises KeyError if it is not set."""
    value = os.environ[name]
    if len(value) >= _SHORTEST and not os.path.exists(value):
        _taken[value] = f"${{oc.env:{name}}}"
    return value


def masked(text: str) -> str:
    """`text` with every value that was taken from a variable replaced by the variable; file names stay."""
    for value in sorted(_taken, key=len, reverse=True):
        text = text.replace(value, _taken[value])
    return text
