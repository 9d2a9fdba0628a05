"""Round-robin measurement: compared runs alternate, each in a separate process, so that machine load affects all."""

import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Protocol, TypeVar

from .environment import fresh_process
from .results import Dataclass, ResultsFile


@dataclass(frozen=True)
class Timing:
    """Seconds of one timed call, and the peak memory of its process so far in MiB."""

    seconds: float
    peak_mib: float
    machine: str


class Run(Dataclass, Hashable, Protocol):
    """Settings of a run: the label of the model, the workload, the length, and the number of timed calls.

    Attributes:
        tokens: number of tokens that the seconds of a call are divided by.
    """

    @property
    def label(self) -> str: ...
    @property
    def workload(self) -> str: ...
    @property
    def length(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def repeats(self) -> int: ...


RunT = TypeVar("RunT", bound=Run)
TimingT = TypeVar("TimingT", bound=Timing)


def run_over_lengths(
    runs: Iterable[RunT],
    results: ResultsFile[RunT, TimingT],
    prepare: Callable[[RunT], Callable[[], TimingT]],
    time_limit: float,
    report: Callable[[str], None] = lambda line: None,
    *,
    interleave_lengths: bool = False,
) -> list[tuple[RunT, TimingT]]:
    """Measure the runs, and take finished ones from `results`.

    Args:
        runs: ordered by workload, then by length, shortest first, so that the peak memory of a process belongs to its
            last length.
        results: CSV of finished runs.
        prepare: returns the callable to time; it is called in the process of the run's label and workload.
        time_limit: seconds; a run is skipped when one call is expected to take longer, see `expected_seconds`.
        report: receives one line per run.
        interleave_lengths: alternate between all lengths of a workload, each in a separate process; no run is skipped.

    Returns:
        Each measured run with its timing.
    """
    finished: list[tuple[RunT, TimingT]] = []
    known = {run for run, _ in results.rows()}

    def process_key(run: RunT) -> Hashable:
        return (run.label, run.length) if interleave_lengths else run.label

    for workload, of_workload in groupby(runs, key=lambda run: run.workload):
        with ExitStack() as stack:
            processes: dict[Hashable, Callable[..., TimingT]] = {}
            for _, of_round in groupby(of_workload, key=lambda run: None if interleave_lengths else run.length):
                due = [run for run in of_round if expected_seconds(finished, run) <= time_limit]
                missing = [run for run in due if run not in known]
                for run in missing:
                    if process_key(run) not in processes:
                        processes[process_key(run)] = stack.enter_context(fresh_process())
                measured = run_round_robin({run: processes[process_key(run)] for run in missing}, prepare)
                for run in due:
                    timing = results.run(run, measured.__getitem__)
                    cost = f"{timing.seconds:.4g} s, {timing.peak_mib:,.0f} MiB"
                    report(f"{workload} at {run.length:,}, {run.label}: {cost}")
                    finished.append((run, timing))
    return finished


def run_round_robin(
    processes: Mapping[RunT, Callable[..., TimingT]], prepare: Callable[[RunT], Callable[[], TimingT]]
) -> dict[RunT, TimingT]:
    """Call each run once as a warm-up, then `repeats` times in round-robin order.

    Returns:
        The last timing of each run, its seconds replaced by the median.
    """
    timings: dict[RunT, list[TimingT]] = {run: [] for run in processes}
    for _ in range(1 + max((run.repeats for run in processes), default=0)):
        for run, call in processes.items():
            timings[run].append(call(_timed_call, prepare, run))
    return {
        run: replace(calls[-1], seconds=float(f"{statistics.median(one.seconds for one in calls[1:]):.4g}"))
        for run, calls in timings.items()
    }


_prepared: dict[Run, Callable[[], Timing]] = {}  # at most one entry: the last run of this process


def _timed_call(prepare: Callable[[RunT], Callable[[], TimingT]], run: RunT) -> Timing:
    if run not in _prepared:
        _prepared.clear()  # frees the memory of the previous run first
        _prepared[run] = prepare(run)
    return _prepared[run]()


def expected_seconds(finished: Sequence[tuple[RunT, TimingT]], run: RunT) -> float:
    """Extrapolate the seconds of one call by a power law through the last two lengths of the same label and workload.

    With one earlier length the extrapolation is linear; without any the result is 0.
    """
    before = [
        (past.length, timing.seconds)
        for past, timing in finished
        if (past.label, past.workload) == (run.label, run.workload) and past.length < run.length
    ][-2:]
    if not before:
        return 0.0
    (first, first_seconds), (last, last_seconds) = before[0], before[-1]
    slope = 1.0 if first == last else math.log(last_seconds / first_seconds) / math.log(last / first)
    return last_seconds * (run.length / last) ** slope
