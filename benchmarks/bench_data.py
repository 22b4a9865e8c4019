"""Data in: a patient prepared, a training patch from the store against the same from NIfTI, a phantom on the fly."""

from __future__ import annotations

import made
import pytest

from medmap.config import load_config
from medmap.core.box import Box
from medmap.data.layouts import read_case, recognise
from medmap.data.preprocess import prepare_case
from medmap.data.store import Store, write_store
from medmap.phantom import Settings, write_phantoms
from medmap.stream import PhantomStream

EDGE = 64
PATCH = Box((60, 60, 40), (60 + EDGE, 60 + EDGE, 40 + EDGE))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One simulated patient at 1 mm on the grid of BraTS, as NIfTI."""
    place = tmp_path_factory.mktemp("patient")
    write_phantoms(place, 1, 5, Settings(spacing_mm=1.0, shape=made.BRATS))
    return recognise(place)


def bench_prepare(benchmark, files) -> None:
    benchmark.group = "data, a patient at 1 mm"
    benchmark.pedantic(lambda: prepare_case(read_case(files.cases[0]), made.SCHEME), rounds=5, warmup_rounds=1)


def bench_patch_from_nifti(benchmark, files) -> None:
    def patch():
        patient = prepare_case(read_case(files.cases[0]), made.SCHEME)
        return [image.window(PATCH) for image in patient.images.values()]

    benchmark.group = "data, a training patch of 64³"
    benchmark.pedantic(patch, rounds=5, warmup_rounds=1)


def bench_patch_from_store(benchmark, files, tmp_path) -> None:
    write_store(files, tmp_path / "store")
    store = Store(tmp_path / "store")

    def patch():
        patient = store.load(store.ids[0])
        return [image.window(PATCH) for image in patient.images.values()]

    benchmark.group = "data, a training patch of 64³"
    benchmark.pedantic(patch, rounds=20, warmup_rounds=2)


def bench_phantom_on_the_fly(benchmark) -> None:
    """One patient at 2 mm in this process; a stream has a process a core (benchmarks/simulate.py)."""
    chosen = {"data.source": "phantom", "phantom.val": 1, "phantom.workers": 0, "train.batch_size": 1}
    stream = PhantomStream(load_config(None, [f"{key}={value}" for key, value in chosen.items()]))
    ids = iter(stream.ids)
    benchmark.group = "data, a phantom at 2 mm"
    benchmark.pedantic(lambda: stream.load(next(ids)), rounds=5, warmup_rounds=1)
