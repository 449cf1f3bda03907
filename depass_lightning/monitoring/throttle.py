"""How often the probes may run: a limit on the fraction of wall time that they take.

1. A run that would lift the fraction above the limit, at the cost of the last one, is skipped.
   The first seconds of all runs together are not counted, so that a short training is watched whole.
2. Each skipped run doubles the number of occasions (validations, steps, checkpoints) from one run to
   the next, so that runs are spread evenly rather than bunched.
3. A run after which less than half of the limit is spent halves that number again.
"""

import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

FREE_SECONDS = 60.0


class Throttle:
    """Measures the fraction of wall time that the probes take, and decides whether to run.

    Args:
        limit: the largest fraction; None for no limit.
        clock: returns the time in seconds.
        free: the seconds that all runs together may take before the limit is enforced on what follows.
    """

    def __init__(
        self,
        limit: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
        free: float = 0.0,
    ) -> None:
        self.limit = limit
        self.clock = clock
        self.free = free
        self.start()

    def start(self) -> None:
        """Start to measure, when training starts."""
        self.every = 1
        self._began = self.clock()
        self._spent = self._last = 0.0
        self._waited = 0

    def spend(self, seconds: float) -> None:
        """Count the time of a run.

        Args:
            seconds: the time that it took.
        """
        self._spent += seconds
        self._last = seconds
        self._waited = 0

    def extend(self, seconds: float) -> None:
        """Add time to the last run.

        Args:
            seconds: the time that writing its results took.
        """
        self._spent += seconds
        self._last += seconds

    @property
    def unused(self) -> bool:
        """Whether there was no run since the start."""
        return self._spent == 0

    @property
    def share(self) -> float:
        """The fraction of the wall time since the start that was spent."""
        return self._after(0.0)

    def has_room(self) -> bool:
        """Count an occasion, and return whether to use it; a change of the interval is logged."""
        if self.limit is None or self._spent + self._last <= self.free:
            return True
        self._waited += 1
        if self._waited < self.every:
            return False
        share = self._after(self._last - self.free)
        if share > self.limit:
            self._change(self.every * 2, share)
            return False
        if self.every > 1 and share < self.limit / 2:
            self._change(self.every // 2, share)
        return True

    def _after(self, seconds: float) -> float:
        """Return the fraction after another run of `seconds`."""
        elapsed = self.clock() - self._began + seconds
        return (self._spent + seconds) / elapsed if elapsed > 0 else 0.0

    def _change(self, every: int, share: float) -> None:
        when = "every occasion" if every == 1 else f"one occasion in {every}"
        relation = "above" if every > self.every else "well below"
        log.warning(
            "another run of the probes would bring their share of the time to %.1f%%, %s max_overhead=%g%%: "
            "they run at %s now",
            100 * share,
            relation,
            100 * (self.limit or 0),
            when,
        )
        self.every = every
