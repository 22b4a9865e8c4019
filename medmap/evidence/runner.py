"""All trials of a study, as many at a time as there are cores, each result written down as soon as it is there."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from medmap.core.children import end_with
from medmap.core.memory import keep_freed_memory
from medmap.data.store import Store
from medmap.errors import InputError, MedmapError
from medmap.evidence.plan import Patients, Study, Trial
from medmap.evidence.results import RUNS, Result, read_result, write_result
from medmap.evidence.trial import Stores, carry_out, patients_store, prepare
from medmap.scale import spread

ROOM_GB = 2.0
"""What a study's prepared data and the checkpoints of one run may take on the disk, for every run at a time."""

Told = Callable[[int, int, str], None]


def places_of(folder: Path | None) -> dict[str, Path]:
    """{name: folder} of the collections of scans in a folder, MEDMAP_DATA where none is given."""
    named = folder or (Path(os.environ["MEDMAP_DATA"]) if os.environ.get("MEDMAP_DATA") else None)
    return {} if named is None or not named.is_dir() else {p.name: p for p in sorted(named.iterdir()) if p.is_dir()}


def open_trials(study: Study, out: Path) -> list[Trial]:
    """The trials of a study that have no result yet."""
    return [trial for trial in study.all_trials() if read_result(out / RUNS, trial) is None]


def refuse_other_data(trials: Sequence[Trial], out: Path, work: Path, places: Mapping[str, Path]) -> None:
    """Raises InputError where results that are there are of other scans than those that lie in the places now."""
    found = [result for trial in trials if (result := read_result(out / RUNS, trial)) and result.rows]
    asked = (data for trial in trials for data in (trial.data, *trial.data.others))
    for data in dict.fromkeys(data for data in asked if isinstance(data, Patients)):
        then = {digest: result for result in found if (digest := _digest_of(data, result))}
        if not then or data.name not in places:
            continue
        now = Store(patients_store(data, work, places)).sha256
        other = next((result for digest, result in then.items() if digest != now), None)
        if other is not None:
            raise InputError(
                f"{places[data.name]}: holds other data (hash {now[:12]}) than {other.trial.key} was run on "
                f"({str(_digest_of(data, other))[:12]}); name the same data, or another folder of results with -o"
            )


def _digest_of(data: Patients, result: Result) -> str | None:
    """The hash of these patients' store in a run that learned from them, or was tested on them as well."""
    if result.trial.data == data:
        return str(result.facts["store_sha256"])
    tests = result.facts.get("tests_sha256", {})
    return tests.get(data.name) if data in result.trial.data.others else None


def estimate_minutes(study: Study, out: Path, trials: Sequence[Trial]) -> float:
    """Minutes of one core: what runs of the same network on the same data took, else what the study says of itself."""
    known: dict[str, list[float]] = {}
    for trial in study.all_trials():
        found = read_result(out / RUNS, trial)
        if found is not None and "seconds" in found.facts:
            seconds = found.facts["seconds"]
            known.setdefault(_kind(trial), []).append((seconds["train"] + seconds["test"]) / 60)
    usual = {kind: sum(minutes) / len(minutes) for kind, minutes in known.items()}
    return sum(usual.get(_kind(trial), study.minutes) for trial in trials)


def _kind(trial: Trial) -> str:
    return f"{trial.data.name} {trial.config.model.name} {trial.config.model.size} {trial.config.train.steps}"


def run_trials(
    trials: Sequence[Trial],
    out: Path,
    work: Path,
    places: Mapping[str, Path],
    *,
    jobs: int,
    device: str = "auto",
    ray: str | None = None,
    keep: bool = False,
    tell: Told = lambda done, total, text: None,
) -> list[str]:
    """Carry out trials and write their results; returns what could not be done, a line a trial.

    out:    the folder of results; work: of prepared data and of runs on their way
    places: where the scans of patients are, by name of the collection
    jobs:   processes at a time, which share the cores; ray: a cluster in their place (`medmap.scale`)
    keep:   do not delete the networks

    A run that was interrupted goes on from its last checkpoint. Raises InputError where data or room are lacking.
    """
    if not trials:
        return []
    _check_room(work, jobs)
    failed: list[str] = []
    with _alone(work):
        stores = {data: prepare(data, work, places) for data in dict.fromkeys(trial.data for trial in trials)}
        tasks = [(trial, stores[trial.data]) for trial in trials]
        make = partial(_Hand, work.resolve(), device, keep)
        results = spread(make, tasks, address=ray, device=device, called=_called) if ray else _local(make, tasks, jobs)
        for done, (index, result) in enumerate(results, start=1):
            key = trials[index].key
            if isinstance(result, MedmapError):
                failed.append(f"{key}: {result}")
                tell(done, len(tasks), f"{key} failed")
                continue
            write_result(out / RUNS, result)
            tell(done, len(tasks), f"{key} {result.status}")
    return failed


def _called(task: tuple[Trial, Stores]) -> str:
    return task[0].key


class _Hand:
    """Carries out one trial after the other."""

    def __init__(self, work: Path, device: str, keep: bool) -> None:
        self.work, self.device, self.keep = work, device, keep

    def __call__(self, task: tuple[Trial, Stores]) -> Result:
        return carry_out(task[0], task[1], self.work, self.device, self.keep)


def _local(
    make: Callable[[], Callable[[tuple[Trial, Stores]], Result]], tasks: Sequence[tuple[Trial, Stores]], jobs: int
) -> Iterator[tuple[int, Result | MedmapError]]:
    """In this process, or in several that share its cores."""
    if jobs == 1:
        yield from spread(make, tasks, address=None)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with (
        _threads(threads),
        # A process a run, so that the memory which one takes is its own.
        ProcessPoolExecutor(
            min(jobs, len(tasks)), get_context("spawn"), _begin, (os.getpid(),), max_tasks_per_child=1
        ) as pool,
    ):
        waiting = {pool.submit(make(), task): index for index, task in enumerate(tasks)}
        try:
            for future in as_completed(waiting):
                try:
                    yield waiting[future], future.result()
                except MedmapError as error:
                    yield waiting[future], error
                except Exception as error:  # others are at work for an hour, and what they find must not be lost
                    yield waiting[future], MedmapError(f"{type(error).__name__}: {error}")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _begin(parent: int) -> None:
    """A process that trains for an hour must not outlive a killed parent, which cannot take its result any more."""
    keep_freed_memory()
    end_with(parent)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Processes that are started meanwhile take so many threads: libraries read it before they count cores."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Two at once in one folder would resume and remove each other's runs. Raises InputError for the second."""
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"{work}: another study is at work there; wait until it ends, or name another folder with --work"
            ) from error
        yield


def _check_room(work: Path, jobs: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(work).free / 1e9
    if free < ROOM_GB * jobs:
        raise InputError(
            f"{work}: prepared data and runs on their way take about {ROOM_GB * jobs:.0f} GB, {free:.1f} GB are free; "
            "make room, or name another disk with --work"
        )
