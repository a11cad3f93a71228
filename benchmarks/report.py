"""Benchmark results by dotted name, and their table."""

from dataclasses import dataclass, field

from switti.tables import aligned


@dataclass
class Results:
    """ratios: how many times faster (or a share); raw: seconds, bytes, operations per second, by dotted names."""

    ratios: dict[str, float] = field(default_factory=dict)
    raw: dict[str, float | list[float]] = field(default_factory=dict)

    def table(self) -> str:
        """Both parts as aligned text, ratios first."""
        rows = [(name, f"{value:.3f}") for name, value in self.ratios.items()]
        rows += [(name, self._format(value)) for name, value in self.raw.items()]
        return "\n".join(aligned(rows, left=2))

    @staticmethod
    def _format(value: float | list[float]) -> str:
        if isinstance(value, list):
            return " ".join(f"{entry:.4g}" for entry in value)
        return f"{value:.4g}"
