"""How long the steps of a run take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Timings:
    """Seconds by step."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str, *, without: str = "") -> Iterator[None]:
        """Add the time of the block to step `name`, less what the block itself adds to step `without`."""
        start, other = time.perf_counter(), self.seconds.get(without, 0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - start - (self.seconds.get(without, 0.0) - other)
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
