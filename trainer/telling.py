"""What a run tells while it works: lines, progress bars, and the seconds of its phases."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tqdm import tqdm

from trainer.model.generate import Progress

Say = Callable[[str], None]


@dataclass
class Telling:
    """Where a run's lines go, whether it draws bars, and the wall time of each phase of this call."""

    say: Say
    quiet: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, phase: str, seconds: float) -> None:
        """Count seconds for a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Count what is done inside for a phase."""
        began = time.perf_counter()
        yield
        self.add(phase, time.perf_counter() - began)

    @contextmanager
    def bar(self, title: str, total: int | None) -> Iterator[Progress]:
        """A progress bar; what it gives is called with the count done."""
        with tqdm(total=total, desc=title, disable=self.quiet) as bar:

            def advance(count: int) -> None:
                bar.update(count)

            yield advance
