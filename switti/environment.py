"""What settings took from environment variables: such values may be secrets, so that the variable is shown instead.

Commands tell errors, and runs keep records, through `masked`. Settings are saved with their `${oc.env:NAME}` as it was
given (see configs.loading), so that a run folder can be passed on.
"""

import os

_SHORTEST = 4  # characters: what is shorter is no secret, and would be found in every other word
_taken: dict[str, str] = {}


def take(name: str) -> str:
    """The variable's value, remembered for `masked`. Raises KeyError if it is not set."""
    value = os.environ[name]
    if len(value) >= _SHORTEST and not os.path.exists(value):
        _taken[value] = f"${{oc.env:{name}}}"
    return value


def masked(text: str) -> str:
    """`text` with the variable in the place of every value that has been taken from one; names of files stay."""
    for value in sorted(_taken, key=len, reverse=True):
        text = text.replace(value, _taken[value])
    return text
