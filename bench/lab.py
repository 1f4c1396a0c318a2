"""Simulated runs side by side on several cores, of which none outlives who asked for them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from types import TracebackType
from typing import Any, TypeVar

from bench.report import Progress
from bench.scenario import Scenario
from bench.simulator import capacity, simulate

T = TypeVar("T")
Figures = dict[str, float]


def _begin_work() -> None:
    """First in a worker: an interrupt is for the parent to handle, and when the parent has ended, nobody works on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


class Lab:
    """Runs scenarios on several cores; results come in the order of the questions and do not depend on the cores.

    An exception in its `with`, an interrupt among them, ends what runs.
    """

    def __init__(self, num_jobs: int) -> None:
        self._pool: Executor | None = ProcessPoolExecutor(num_jobs, initializer=_begin_work) if num_jobs > 1 else None

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._pool is None:
            return
        if kind is not None:
            for worker in multiprocessing.active_children():
                worker.terminate()
        self._pool.shutdown(cancel_futures=True)

    def map(
        self, label: str, ask: Callable[[Any], T], questions: Sequence[Any], note: Callable[[T], str] = lambda _: ""
    ) -> list[T]:
        """The answers to all questions, with progress under `label` and what `note` says of the newest answer."""
        answers: Iterable[T] = self._pool.map(ask, questions) if self._pool else map(ask, questions)
        result = []
        with Progress(len(questions), label) as progress:
            for answer in answers:
                result.append(answer)
                progress.step(note=note(answer))
        return result

    def as_they_come(self, ask: Callable[[Any], T], questions: Sequence[Any]) -> Iterator[T]:
        """The answers in the order in which they are ready; the questions are begun in theirs."""
        if self._pool is None:
            yield from map(ask, questions)
            return
        for answered in as_completed([self._pool.submit(ask, question) for question in questions]):
            yield answered.result()

    def means(self, label: str, scenarios: Sequence[Scenario], num_seeds: int) -> list[Figures]:
        """Figures of each scenario, each the mean over the same seeds."""
        seeded = [scenario.with_seed(scenario.seed + i) for scenario in scenarios for i in range(num_seeds)]
        runs = self.map(label, figures_of, seeded)
        return [mean_figures(runs[i : i + num_seeds]) for i in range(0, len(runs), num_seeds)]

    def capacity(self, label: str, scenario: Scenario, num_seeds: int) -> int:
        """Capacity of a scenario; the attainment is the mean over the seeds, which run side by side."""
        return capacity(scenario, measure=lambda one: self.means(label, [one], num_seeds)[0]["attainment"])


def figures_of(scenario: Scenario) -> Figures:
    """Figures of one run."""
    return simulate(scenario).figures()


def mean_figures(runs: Sequence[Figures]) -> Figures:
    """Mean of each figure."""
    return {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}
