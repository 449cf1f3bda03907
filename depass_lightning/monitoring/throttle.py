"""How often the probes may run: a limit on the share of wall time that they take.

1. A run that would lift the share above the limit, at what the last one cost, is skipped.
2. Each run that is refused doubles the number of occasions (validations, steps, checkpoints) from one run to
   the next, so that runs are spread evenly rather than bunched where there happens to be room.
3. A run after which less than half of the limit is spent halves that number again.
"""

import logging
import time
from collections.abc import Callable

log = logging.getLogger(__name__)


class Throttle:
    """Measures the share of wall time that the callback takes, and says whether there is room for a run.

    Args:
        limit: the largest share; None for no limit.
        clock: returns the time in seconds.
    """

    def __init__(self, limit: float | None = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self.limit = limit
        self.clock = clock
        self.every = 1
        self.start()

    def start(self) -> None:
        """Begin to measure: a training begins."""
        self._began = self.clock()
        self._spent = self._last = 0.0
        self._waited = 0

    def spend(self, seconds: float) -> None:
        """Count what a run took, whether there was a choice or not."""
        self._spent += seconds
        self._last = seconds
        self._waited = 0

    @property
    def share(self) -> float:
        """The share of the wall time since the start that was spent."""
        return self._after(0.0)

    def has_room(self) -> bool:
        """Count an occasion, and say whether to use it; how often that is may change, which is then told."""
        if self.limit is None:
            return True
        self._waited += 1
        if self._waited < self.every:
            return False
        share = self._after(self._last)
        if share > self.limit:
            self._change(self.every * 2, share)
            return False
        if self.every > 1 and share < self.limit / 2:
            self._change(self.every // 2, share)
        return True

    def _after(self, seconds: float) -> float:
        """The share after another run of so many seconds."""
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
