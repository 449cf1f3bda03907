"""Publishes a run: its files, which are always written, and whatever each sink can show of it."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from depass_lightning.monitoring.maps import write_maps
from depass_lightning.monitoring.results import Result
from depass_lightning.monitoring.sinks import Sink

log = logging.getLogger(__name__)


def publish(
    results: Sequence[Result],
    scalars: Mapping[str, float],
    sinks: Sequence[Sink],
    folder: Path,
    step: int,
    strict: bool = False,
) -> None:
    """Write the results' files to `folder`, then pass scalars and maps to every sink.

    A failure is logged, and the rest is done.

    Args:
        results: the results of a run.
        scalars: the run's scalars by their full names.
        sinks: where they are logged.
        folder: the run's folder.
        step: the sinks' step.
        strict: raise the first error instead.
    """
    maps = []
    for result in results:
        with _naming(f"the maps of {result.name!r} at step {result.step} were not written", strict):
            if (files := write_maps(result, folder)) is not None:
                maps.append(files)
    for sink in sinks:
        with _naming(f"the maps of step {step} are in {folder}, but {sink.service} failed", strict):
            sink.log(scalars, maps, step)


@contextmanager
def _naming(failure: str, strict: bool) -> Iterator[None]:
    """Log what failed and why, or raise the error where `strict`."""
    try:
        yield
    except Exception as error:
        if strict:
            raise
        log.warning("%s: %s", failure, error)
        log.debug(failure, exc_info=True)
