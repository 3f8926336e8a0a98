"""What Prometheus is told: of all workers together what they counted, and of the one that it asks how things stand."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryFile

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from release import Release

TOGETHER = "PROMETHEUS_MULTIPROC_DIR"  # by which prometheus_client decides when it is imported


def make_folder() -> None:
    """Of the files in which workers count together; prometheus_client does not make it. Call it before anything can count. Ends the
    process, with a line for people, when nothing can be written there."""
    folder = os.environ.get(TOGETHER)
    if folder == "":  # prometheus_client would count in the working folder
        sys.exit(f"{TOGETHER}: no folder is named; name one that can be written, or leave the variable out")
    if folder is not None:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=folder).close()
        except OSError as error:
            sys.exit(
                f"{TOGETHER}: workers cannot count together in {folder} ({error}); name a folder that can be written"
            )


def exposition(counted: CollectorRegistry, models_dir: Path, open_to_others: bool) -> bytes:
    """What this process counted, or all workers if they share a folder, and how things stand now."""
    if os.environ.get(TOGETHER):
        counted = CollectorRegistry()
        MultiProcessCollector(counted)
    now = CollectorRegistry()
    now.register(_Now(models_dir, open_to_others))
    return generate_latest(counted) + generate_latest(now)


class _Now(Collector):
    """Said by who is asked, never by files: a worker that ended would go on saying what it knew."""

    def __init__(self, models_dir: Path, open_to_others: bool) -> None:
        self._models_dir, self._open_to_others = models_dir, open_to_others

    def collect(self) -> Iterator[GaugeMetricFamily]:
        live = GaugeMetricFamily("styletower_live_release", "1 for the live release", labels=["release"])
        if name := Release.current(self._models_dir):
            live.add_metric([name], 1)
        yield live
        yield GaugeMetricFamily(
            "styletower_open_to_others", "1 when other machines reach it and no key was ever made", self._open_to_others
        )
