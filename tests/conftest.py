"""What several tests need: real scans where they are at hand."""

from __future__ import annotations

import os

# Small networks gain nothing from several threads, and lose much where other processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest


def _data_root() -> Path:
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("MEDMAP_DATA", beside))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real patients' scans: MEDMAP_DATA, or ../shared/data. Tests that need it skip where it is absent."""
    root = _data_root()
    if not (root / "ssa-2mm").is_dir():
        pytest.skip(f"no real scans at {root}: set MEDMAP_DATA to a folder that holds ssa-2mm and brats2021-2mm")
    return root


@pytest.fixture(scope="session")
def tiny_phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of three simulated patients at 4 mm, all four sequences. Read only."""
    from medmap.phantom import Settings, write_phantoms

    root = tmp_path_factory.mktemp("tiny") / "phantoms"
    write_phantoms(root, 3, 0, Settings(spacing_mm=4.0))
    return root


@pytest.fixture(scope="session")
def tiny_store(tiny_phantoms: Path) -> Path:
    """`tiny_phantoms`, prepared. Read only."""
    from medmap.data.layouts import recognise
    from medmap.data.store import write_store

    out = tiny_phantoms.parent / "store"
    write_store(recognise(tiny_phantoms), out)
    return out


@pytest.fixture(scope="session")
def tiny_run(tiny_store: Path) -> Path:
    """A run of two steps on `tiny_store`, without validation; patients 0 of 3 folds are its test part. Read only."""
    from medmap.config import load_config
    from medmap.data.store import Store
    from medmap.train import fit

    run = tiny_store.parent / "run"
    fit(load_config(None, TINY_RECIPE), Store(tiny_store), run, device="cpu")
    return run


TINY_RECIPE = (
    "model.size=tiny",
    "align.levels=[x4]",
    "data.val_fraction=0",
    "train.steps=2",
    "train.batch_size=1",
    "train.patch=[32, 32, 32]",
    "train.log_every=1",
    "train.precision=fp32",
)
"""Settings of the smallest run there is."""
