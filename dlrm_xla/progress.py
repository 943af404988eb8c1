"""Progress of long work: a bar in a terminal, a line now and then in a log file."""

from __future__ import annotations

import math
import sys
import threading
import time
from types import TracebackType

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Steps done, samples per second and time left; figures such as the loss behind them."""

    def __init__(self, num_steps: int, samples_per_step: int, shown: bool = True) -> None:
        self.num_steps = num_steps
        self.samples_per_step = samples_per_step
        self.done = self.before = self.told = 0
        self.figures = ""
        self.shown_at = 0
        self.began = self.last_line = time.monotonic()
        self.after_first = math.nan
        self.shown = shown
        self._waited_for = threading.Event()
        terminal = shown and sys.stderr.isatty()
        self.bar = (
            tqdm(total=num_steps * samples_per_step, unit="sample", unit_scale=True, dynamic_ncols=True)
            if terminal
            else None
        )

    def __enter__(self) -> Progress:
        if self.shown:
            threading.Thread(target=self._tell_of_the_first, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._waited_for.set()
        if self.bar is not None:
            self.bar.close()
        elif self.done > self.told and self.shown:
            self._line()

    def skip(self, steps: int) -> None:
        """Counts steps of a run before this one."""
        self.before = steps
        if self.bar is not None:
            self.bar.update(steps * self.samples_per_step)
            self.bar.unpause()

    def advance(self) -> None:
        """Counts one step."""
        self.done += 1
        if self.done == 1:  # which holds what is compiled, and so is no measure of the others
            self.after_first = time.monotonic()
            self._waited_for.set()
            if self.bar is not None:
                self.bar.set_postfix_str(self.figures, refresh=False)
                self.bar.unpause()
        if self.bar is not None:
            self.bar.update(self.samples_per_step)
        elif self.shown and time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self._line()

    def paused(self, seconds: float) -> None:
        """Leaves out of the speed what was no step: a validation, a checkpoint."""
        self.after_first += seconds

    def show(self, **figures: float) -> None:
        """Figures to show behind the bar until the next call."""
        self.figures = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())
        self.shown_at = self.before + self.done
        if self.bar is not None:
            self.bar.set_postfix_str(self.figures, refresh=False)

    def _tell_of_the_first(self) -> None:
        while not self._waited_for.wait(SECONDS_BETWEEN_LINES):
            waited = f"the first step, in which xla compiles, has taken {time.monotonic() - self.began:.0f} s"
            if self.bar is not None:
                self.bar.set_postfix_str(waited)
            else:
                print(waited, file=sys.stderr, flush=True)

    def _line(self) -> None:
        self.last_line, self.told = time.monotonic(), self.done
        place = self.before + self.done
        parts = [f"step {place:,}/{self.num_steps:,}"]
        if self.done == 1:
            parts.append(f"the first took {self.after_first - self.began:.0f} s")
        else:
            seconds = max(self.last_line - self.after_first, 1e-9) / (self.done - 1)
            left = tqdm.format_interval((self.num_steps - place) * seconds)
            parts += [f"{self.samples_per_step / seconds:,.0f} samples/s", f"{left} left"]
        if self.figures:
            older = f" at step {self.shown_at:,}" if self.shown_at != place else ""
            parts.append(self.figures + older)
        print(", ".join(parts), file=sys.stderr, flush=True)
