"""Phantoms that are simulated while training asks for them, and nothing is written to disk.

`PhantomStream` answers as a `Store` does. Patient number i is a function of (the run's seed, i), so a resumed run goes
on with the patients it would have had. On a CPU, other processes simulate ahead of the training; on a GPU a phantom
takes so little that it is made there when its turn comes.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from medmap.config import Config
from medmap.core.case import Prepared
from medmap.core.labels import SCHEMES, LabelScheme
from medmap.core.modality import ModalitySet
from medmap.core.processes import processes_here
from medmap.data.preprocess import prepare_case
from medmap.errors import ClusterError
from medmap.phantom import Settings, simulate
from medmap.phantom.patient import seed_of
from medmap.phantom.simulate import alone_on_its_core

AHEAD = 12
"""Patients simulated in advance, at most."""

ATTEMPTS = 4
"""So many times in a row may the processes that simulate be killed."""


class PhantomStream:
    """Simulated patients, as many as a run asks for, or will look at; the first ones validate.

    config: the run's; ``phantom`` says how they are made, ``seed`` which they are
    device: where they are simulated when it is a GPU
    """

    def __init__(self, config: Config, device: torch.device | str = "cpu") -> None:
        wanted = config.phantom
        names = None if config.data.modalities is None else ModalitySet(config.data.modalities)
        self.settings = Settings(names, **wanted.model_dump(exclude={"val", "patients", "workers"}))
        self.seed = config.seed
        self._val = wanted.val
        self.path = Path("phantoms")
        self._again = wanted.val if wanted.patients is None else wanted.val + wanted.patients
        count = wanted.patients or config.train.steps * config.train.batch_size
        self.ids = tuple(f"PHANTOM-{i:06d}" for i in range(wanted.val + count))
        self._device = torch.device(device)
        self._wanted_workers = 0 if self._device.type == "cuda" else wanted.workers
        self._pool: ProcessPoolExecutor | None = None
        self._coming: dict[str, Future[Prepared]] = {}
        self._kept: dict[str, Prepared] = {}
        self._deaths = 0

    @property
    def scheme(self) -> LabelScheme:
        """Classes and regions of the labels."""
        return _scheme(self.settings)

    @property
    def modalities(self) -> ModalitySet:
        """The sequences that are simulated."""
        return self.settings.names

    @property
    def spacing_mm(self) -> float:
        """Edge of the voxels."""
        return self.settings.spacing_mm

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of all that the patients follow from."""
        matter = asdict(self.settings) | {"modalities": list(self.modalities), "seed": self.seed}
        return hashlib.sha256(json.dumps(matter, sort_keys=True).encode()).hexdigest()

    def roster(self) -> list[tuple[str, str, str | None]]:
        """(id, patient, group) of every case; the first ones are of group val, the others of group train."""
        return [(id, id, "val" if i < self._val else "train") for i, id in enumerate(self.ids)]

    def sequences(self, case_id: str) -> tuple[str, ...]:
        """The sequences of a case: all of them."""
        return self.modalities.names

    def has_labels(self, case_id: str) -> bool:
        """Always."""
        return True

    def expect(self, ids: Sequence[str]) -> None:
        """Begin to simulate cases that will be asked for soon, in this order."""
        workers = _workers(self._wanted_workers)
        if not workers:
            return
        if self._pool is None:
            self._pool = ProcessPoolExecutor(workers, get_context("spawn"), alone_on_its_core, (os.getpid(),))
            # Waits for the patients that are being made: at the interpreter's end a pool that is still closing trips
            # over its own pipes.
            weakref.finalize(self, self._pool.shutdown, wait=True, cancel_futures=True)
        with suppress(BrokenProcessPool):  # whoever asks for one of these patients will see it too
            for id in ids:
                if len(self._coming) >= AHEAD:
                    break
                if id not in self._coming and id not in self._kept:
                    self._coming[id] = self._pool.submit(_make, id, self._seed_of(id), self.settings)

    def load(self, case_id: str) -> Prepared:
        """One case: what was kept, or simulated ahead, or else simulated now."""
        if case_id in self._kept:
            return self._kept[case_id]
        ahead = self._coming.pop(case_id, None)
        try:
            case = self._simulated(case_id) if ahead is None else ahead.result()
            self._deaths = 0 if ahead else self._deaths
        except BrokenProcessPool as error:
            self._lost(error)
            case = self._simulated(case_id)
        if _number(case_id) < self._again:
            self._kept[case_id] = case
        return case

    def provenance(self) -> dict[str, Any]:
        """What a run folder notes; with the run's configuration, all there is."""
        return {"store": None, "store_sha256": self.sha256}

    def _lost(self, error: BrokenProcessPool) -> None:
        """A process that simulated was killed, and the others with it: new ones begin when patients are next expected.

        Raises ClusterError where none lives long enough to make one patient.
        """
        self._deaths += 1
        if self._deaths >= ATTEMPTS:
            raise ClusterError(
                f"processes that simulate patients were killed {self._deaths} times in a row ({error}); they may lack "
                "memory: lower phantom.workers in the config.yaml of the run, to 0 if need be, and go on with --resume"
            ) from error
        self._pool, self._coming = None, {}

    def _simulated(self, case_id: str) -> Prepared:
        return _make(case_id, self._seed_of(case_id), self.settings, self._device)

    def _seed_of(self, case_id: str) -> int:
        return seed_of(self.seed, _number(case_id))


def _number(case_id: str) -> int:
    return int(case_id.rpartition("-")[2])


def _make(id: str, seed: int, settings: Settings, device: torch.device | str = "cpu") -> Prepared:
    return prepare_case(simulate(seed, settings, id=id, device=device), _scheme(settings))


def _scheme(settings: Settings) -> LabelScheme:
    return SCHEMES[settings.scheme_name]


def _workers(wanted: int | None) -> int:
    return max(1, (os.cpu_count() or 1) // processes_here() - 1) if wanted is None else wanted
