"""OmegaConf's `oc.env` interpolation, recording which settings read the environment. Imports no torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import OmegaConf

from switti.environment import take


class EnvironmentResolver:
    """`${oc.env:NAME}` and `${oc.env:NAME,default}`.

    Attributes:
        asked: whether the resolver was called since `begin`.
        missing: variables that were asked for since `begin` and are not set.
    """

    def __init__(self) -> None:
        self.asked, self._lenient = False, False
        self.missing: list[str] = []

    def begin(self) -> None:
        """Forget earlier calls."""
        self.asked, self.missing = False, []

    @contextmanager
    def lenient_if(self, lenient: bool) -> Iterator[None]:
        """Within it, if `lenient`, a variable that is not set resolves to `$NAME` instead of an error."""
        self._lenient = lenient
        try:
            yield
        finally:
            self._lenient = False

    def __call__(self, name: str, *default: Any) -> Any:
        self.asked = True
        try:
            return take(name)
        except KeyError:
            if default:
                return None if default[0] is None else str(default[0])
            self.missing.append(name)
            if self._lenient:
                return f"${name}"
            raise


environment = EnvironmentResolver()
OmegaConf.register_resolver("oc.env", environment, replace=True, annotation_validation="off")
