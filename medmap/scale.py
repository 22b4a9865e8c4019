"""The same work on many machines: tasks handed out to the workers of a Ray cluster, each with one warm model.

`spread` is an iterator over results, here in this process or over a cluster. A worker is made once, gets one task at a
time and the next when it is done, so that slow tasks and slow machines hold nobody up. When a worker dies, or the
machine it runs on, its task goes to another one.

Every machine needs this version of medmap, and sees the same files under the same names.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import tempfile
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import medmap
from medmap.core.memory import keep_freed_memory
from medmap.errors import ClusterError, InputError, MedmapError

Task = TypeVar("Task")
Result = TypeVar("Result")
Work = Callable[[Task], Result]

LOCAL = "local"
"""In place of an address: a Ray of our own on this machine, that ends with the work."""

ATTEMPTS = 4
"""So many workers may die at a task before it is given up."""

REACH_S = 10.0
"""A cluster answers within this many seconds."""

LONGEST_ROOM = 40
"""Characters of a folder under which Ray's sockets still have names that the system takes (107)."""


class Staged(ABC, Generic[Task, Result]):
    """Work in three steps, of which the middle one uses all cores: ``write(compute(read(task)))``.

    In one process the first step of the next task and the last one of the task before run beside it, each in a thread.
    """

    @abstractmethod
    def read(self, task: Task) -> Any: ...

    @abstractmethod
    def compute(self, read: Any) -> Any: ...

    @abstractmethod
    def write(self, computed: Any) -> Result: ...

    def __call__(self, task: Task) -> Result:
        return self.write(self.compute(self.read(task)))


def spread(
    make: Callable[[], Work[Task, Result]],
    tasks: Sequence[Task],
    *,
    address: str | None,
    device: str = "auto",
    memory_gb: float = 1.0,
    called: Callable[[Task], str] = str,
) -> Iterator[tuple[int, Result | MedmapError]]:
    """(index of a task, its result) as the tasks are done; a MedmapError that a task raised is its result.

    make:      makes a worker, which is called with one task after the other; it travels by pickle, as tasks and results
    address:   None: in this process, in order; ``local``: a Ray of our own on this machine; else a cluster's (``auto``,
               HOST:PORT, ray://HOST:PORT)
    device:    auto (a GPU each where the cluster has any, else cores), cpu or cuda
    memory_gb: what a worker may take; there are as many as cores, and fewer of more cores where memory or tasks are few
    called:    what a task is called in errors

    Tasks are tried again when their worker dies, so what they write must appear whole or not at all. A task at which
    `ATTEMPTS` workers died has a ClusterError for its result, and the others go on.

    Raises what ``make`` raises, what a task raises besides MedmapError, and ClusterError: no such cluster, no room in
    it, or workers that die before they are ready.

    >>> from functools import partial
    >>> list(spread(partial(partial, pow, 2), [3, 5], address=None))
    [(0, 8), (1, 32)]
    """
    if address is None:
        work = make()
        results = _overlapped(work, tasks) if isinstance(work, Staged) else (_tried(work, task) for task in tasks)
        yield from enumerate(results)
        return
    with _joined(address) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        crew = _Crew(ray, make, tasks, share(nodes, len(tasks), device, memory_gb), called)
        try:
            yield from crew.results()
        finally:
            crew.dismiss()


def _overlapped(work: Staged[Task, Result], tasks: Sequence[Task]) -> Iterator[Result | MedmapError]:
    """The results in order; at most one task is read ahead, and one is being written."""
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        coming = deque(reader.submit(_tried, work.read, task) for task in tasks[:1])
        leaving: deque[Future[Any]] = deque()
        for following in range(1, len(tasks) + 1):
            read = coming.popleft().result()
            coming.extend(reader.submit(_tried, work.read, task) for task in tasks[following : following + 1])
            computed = read if isinstance(read, MedmapError) else _tried(work.compute, read)
            if leaving:
                yield leaving.popleft().result()
            failed = isinstance(computed, MedmapError)
            leaving.append(writer.submit(_same if failed else partial(_tried, work.write), computed))
        yield from (result.result() for result in leaving)


def _same(error: MedmapError) -> MedmapError:
    return error


@dataclass(frozen=True)
class Share:
    """How many workers there are, and the cores and GPUs of each."""

    workers: int
    cores: int
    gpus: int = 0


def share(nodes: Sequence[Mapping[str, float]], tasks: int, device: str, memory_gb: float) -> Share:
    """Cut machines into workers so that every core, or every GPU, is used once and memory suffices.

    nodes: {CPU, GPU, memory in bytes} of each

    Raises ClusterError where there is nothing to cut, InputError for a device that cannot be asked for.

    >>> node = {"CPU": 16.0, "memory": 64e9}
    >>> share([node, node], 1000, "auto", 4), share([node, node], 1000, "cpu", 20), share([node, node], 3, "cpu", 4)
    (Share(workers=32, cores=1, gpus=0), Share(workers=6, cores=5, gpus=0), Share(workers=4, cores=8, gpus=0))
    >>> share([node, {**node, "GPU": 4.0}], 1000, "auto", 4)
    Share(workers=4, cores=4, gpus=1)
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device {device!r}: on a cluster Ray says which GPU; expected auto, cpu or cuda")
    with_gpus = [node for node in nodes if node.get("GPU", 0) >= 1]
    if with_gpus and device != "cpu":
        cores = min(int(node.get("CPU", 0) // node["GPU"]) for node in with_gpus)
        return Share(sum(int(node["GPU"]) for node in with_gpus), cores, 1)
    with_cores = [node for node in nodes if node.get("CPU", 0) >= 1]
    if device == "cuda" or not with_cores:
        lacking = "GPU" if device == "cuda" else "core"
        raise ClusterError(f"the cluster has no {lacking} to work with; add machines that have one")
    counts = [int(node["CPU"]) for node in with_cores]
    rooms = [max(1, int(node.get("memory", 1e18) // (memory_gb * 1e9))) for node in with_cores]
    least = max(count // (room + 1) + 1 for count, room in zip(counts, rooms, strict=True))
    most = next((n for n in range(max(counts), 0, -1) if sum(count // n for count in counts) >= tasks), 1)
    cores = max(least, most)
    cores = min(count // (count // cores) for count in counts if count >= cores)  # none is left over
    return Share(sum(count // cores for count in counts), cores)


# ---- workers ---------------------------------------------------------------------------------------------------------


class _Worker:
    """An actor: a process of its own with one warm model."""

    def start(self, make: Callable[[], Work[Task, Result]], version: str, folder: Path) -> None:
        """Raises ClusterError on a machine where the work would not be the same."""
        if medmap.__version__ != version:
            here = f"{socket.gethostname()} has medmap {medmap.__version__}"
            raise ClusterError(f"{here}, this machine {version}; install the same version on both")
        try:
            os.chdir(folder)  # names of files are relative to where the command was given
        except OSError as error:
            raise ClusterError(
                f"{folder} is not to be found on {socket.gethostname()}; start from a folder that all machines share"
            ) from error
        keep_freed_memory()
        self.work = make()

    def do(self, task: Any) -> Any:
        """The result, or the MedmapError of a task that cannot be done."""
        return _tried(self.work, task)


def _tried(work: Work[Task, Result], task: Task) -> Result | MedmapError:
    try:
        return work(task)
    except MedmapError as error:
        return error


@dataclass
class _Crew(Generic[Task, Result]):
    """Workers, and who does what.

    busy:    {what Ray will answer: (worker, index of its task; None: it is starting)}
    deaths:  {index of a task: workers that died at it; None: those that died before they were ready, in a row}
    """

    ray: Any
    make: Callable[[], Work[Task, Result]]
    tasks: Sequence[Task]
    share: Share
    called: Callable[[Task], str]
    busy: dict[Any, tuple[Any, int | None]] = field(default_factory=dict)
    idle: list[Any] = field(default_factory=list)
    deaths: Counter[int | None] = field(default_factory=Counter)

    def results(self) -> Iterator[tuple[int, Result | MedmapError]]:
        waiting = deque(range(len(self.tasks)))
        open_tasks = len(waiting)
        for _ in range(min(self.share.workers, open_tasks)):
            self._hire()
        while open_tasks:
            done, _ = self.ray.wait(list(self.busy), num_returns=1)
            if not done:  # seen after a signal that this process was told to ignore: it would wait no more, for ever
                raise ClusterError("Ray waits for its workers no longer; was it stopped? Give the command again")
            (answer,) = done
            worker, index = self.busy.pop(answer)
            try:
                result = self.ray.get(answer)
            except self.ray.exceptions.RayTaskError as error:  # raised by the work itself, not by its machine
                raise _cause(error, starting=index is None) from error
            except self.ray.exceptions.RayError as error:
                result = self._died(worker, index, error)
                if result is None and index is not None:
                    waiting.appendleft(index)
            else:
                self.idle.append(worker)
                if index is None:
                    self.deaths[None] = 0  # the cluster makes workers: over a long job single starts may fail
            if index is not None and result is not None:
                open_tasks -= 1
                yield index, result
            while waiting and self.idle:
                self._hand_out(self.idle.pop(), waiting.popleft())

    def dismiss(self) -> None:
        """A Ray that was there before goes on without these workers."""
        for worker in [*self.idle, *(worker for worker, _ in self.busy.values())]:
            self.ray.kill(worker)

    def _hire(self) -> None:
        actor = self.ray.remote(_Worker).options(num_cpus=self.share.cores, num_gpus=self.share.gpus)
        worker = actor.remote()
        self.busy[worker.start.remote(self.make, medmap.__version__, Path.cwd())] = worker, None

    def _hand_out(self, worker: Any, index: int) -> None:
        self.busy[worker.do.remote(self.tasks[index])] = worker, index

    def _died(self, worker: Any, index: int | None, error: Exception) -> ClusterError | None:
        """What becomes of a task whose worker died: None where another one shall try it."""
        with suppress(self.ray.exceptions.RayError):
            self.ray.kill(worker)  # it may be alive and only out of reach
        self.deaths[index] += 1
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if index is None and self.deaths[None] >= ATTEMPTS * self.share.workers:
            raise ClusterError(f"{self.deaths[None]} workers died before they were ready ({reason}); {CURE}") from error
        if not self.idle:
            self._hire()  # waits where no machine has room, and the others go on
        if index is None or self.deaths[index] < ATTEMPTS:
            return None
        name = self.called(self.tasks[index])
        return ClusterError(f"{name}: {ATTEMPTS} workers died at it, one after the other ({reason}); {CURE}")


def _cause(error: Any, starting: bool) -> Exception:
    """What the work raised; what keeps a worker from being made is mostly something that its machine lacks."""
    cause: Exception = error.cause
    if not starting or isinstance(cause, MedmapError):
        return cause
    found = f"{type(cause).__name__}: {str(cause).splitlines()[0]}"
    return ClusterError(
        f"a machine of the cluster could make no worker ({found}); install medmap on all as it is here, or try it "
        "without --ray"
    )


CURE = "their machines may lack memory, or something crashes them: try it without --ray"


# ---- the cluster -----------------------------------------------------------------------------------------------------


@contextmanager
def _joined(address: str) -> Iterator[Any]:
    """Ray, quiet and with a cluster; one that is connected already is used and left as it is."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # deaths of workers are told by us, not on stdout
    import ray

    if ray.is_initialized():
        yield ray
        return
    with _own_ray() if address == LOCAL else nullcontext({}) as own:
        try:
            _reach(address)
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **own)
        except (OSError, RuntimeError, ValueError, ImportError) as error:
            found = " ".join(str(error).split())
            raise ClusterError(
                f"no Ray cluster at {address} ({found}); start one with `ray start --head`, and name it as auto, "
                "HOST:PORT or ray://HOST:PORT"
            ) from error
        try:
            yield ray
        finally:
            ray.shutdown()


def _reach(address: str) -> None:
    """Raises OSError where nobody listens: Ray would try for minutes."""
    host, sign, port = address.removeprefix("ray://").rpartition(":")
    if sign:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()


@contextmanager
def _own_ray() -> Iterator[dict[str, Any]]:
    """How to start a Ray that leaves nothing behind.

    Ray would keep the password of its own cluster in the home directory; here it is in no file.
    """
    there = tempfile.gettempdir()
    room = tempfile.mkdtemp(prefix="ray-", dir=there if len(there) <= LONGEST_ROOM else os.sep + "tmp")
    before = set(os.environ)
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    cores = allowed if allowed != os.cpu_count() else None  # None: Ray looks, and sees what a container may use
    try:
        yield {"include_dashboard": False, "num_cpus": cores, "object_store_memory": 2**27, "_temp_dir": room}
    finally:
        for name in os.environ.keys() - before:
            del os.environ[name]
        shutil.rmtree(room, ignore_errors=True)
