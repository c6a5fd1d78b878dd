"""A study's progress as metrics of the Ray that runs it, for Prometheus to fetch. Curves and scores are in the store.

Device memory and utilisation are among Ray's own metrics (`ray_node_gram_used`, `ray_node_gpus_utilization`).
https://docs.ray.io/en/latest/ray-observability/user-guides/add-app-metrics.html
"""

from __future__ import annotations

import math
from typing import Any

from ray.util.metrics import Counter, Gauge

from hpsearch.records import Event, Point, PointReported, TrialEnded, TrialStarted

NAMES = {
    "hpsearch_trials": "Trials that ended, by state; interrupted ones count each time.",
    "hpsearch_trials_running": "Trials that are training now.",
    "hpsearch_epochs": "Epochs trained, parts of them included.",
    "hpsearch_evaluations": "Evaluations, by the verdict on the curve up to there.",
    "hpsearch_tokens": "Tokens trained; the rate of it is tokens per second.",
    "hpsearch_best_valid_loss": "Lowest validation loss of this launch, in nats per token.",
}
"""What Prometheus sees of it begins with `ray_`; counters end in `_total`."""


class StudyMetrics:
    """Hears the events of one launch. To be made when Ray is up."""

    def __init__(self, study: str) -> None:
        self._tags = {"study": study}
        self._running: set[int] = set()
        self._points: dict[int, Point] = {}
        self._taken_up: set[int] = set()
        """Trials that began in an earlier launch, which has counted what they trained until now."""
        self._best = math.inf
        self._trials = self._counter("hpsearch_trials", "state")
        self._evaluations = self._counter("hpsearch_evaluations", "verdict")
        self._epochs = self._counter("hpsearch_epochs")
        self._tokens = self._counter("hpsearch_tokens")
        self._now_running = self._gauge("hpsearch_trials_running")
        self._best_loss = self._gauge("hpsearch_best_valid_loss")

    def __call__(self, event: Event) -> None:
        match event:
            case TrialStarted():
                self._running.add(event.trial)
                if event.attempt > 1 and event.trial not in self._points:
                    self._taken_up.add(event.trial)
            case PointReported():
                self._hear_point(event.trial, event.point, event.verdict)
            case TrialEnded():
                self._running.discard(event.trial)
                self._trials.inc(1, {**self._tags, "state": event.result.state.value})
            case _:
                return
        self._now_running.set(len(self._running), self._tags)

    def _hear_point(self, trial: int, point: Point, verdict: str) -> None:
        self._evaluations.inc(1, {**self._tags, "verdict": verdict})
        # What an attempt trains again after a crash has been counted.
        if trial in self._taken_up:
            self._taken_up.discard(trial)
            self._points[trial] = point
        before = self._points.get(trial)
        if before is None or point.tokens > before.tokens:
            self._points[trial] = point
            if tokens := point.tokens - (before.tokens if before else 0):
                self._tokens.inc(tokens, self._tags)
            if epochs := point.epoch - (before.epoch if before else 0.0):
                self._epochs.inc(epochs, self._tags)
        if point.valid_loss < self._best:
            self._best = point.valid_loss
            self._best_loss.set(self._best, self._tags)

    def _counter(self, name: str, *tags: str) -> Any:
        return Counter(name, description=NAMES[name], tag_keys=("study", *tags))

    def _gauge(self, name: str) -> Any:
        return Gauge(name, description=NAMES[name], tag_keys=("study",))
