"""What several tests need: real scans where they are at hand."""

from __future__ import annotations

import os

# Small networks gain nothing from several threads, and lose much where other processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
from jaxtyping import config as shapes

TESTS = Path(__file__).parent
CHECKED = ("core", "models", "test_align.py", "test_anchors.py")
"""Where the code is tested whose annotated shapes are checked at run time (pyproject.toml names its packages)."""


@pytest.fixture(autouse=True)
def _shapes_are_checked_where_they_are_tested(request: pytest.FixtureRequest) -> Iterator[None]:
    """A check takes as long as a layer of a small network: tests of other code go without, and so do the laws of
    networks, which ask the same functions thousands of times."""
    place = request.path.relative_to(TESTS).parts[0]
    shapes.update("jaxtyping_disable", place not in CHECKED or "law" in request.node.name)
    yield
    shapes.update("jaxtyping_disable", False)


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


@pytest.fixture(scope="session")
def made_up_brats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{year: phantoms named and laid out as BraTS is published, one of each part of its split}. Read only."""
    from medmap.data.splits import _read
    from medmap.phantom import Settings, write_phantoms

    root = tmp_path_factory.mktemp("brats")
    write_phantoms(root / "phantoms", 3, 0, Settings(spacing_mm=4.0), layout="brats2021")
    for year, split in BRATS_SPLITS.items():
        listing = _read(split)
        folder = root / year / ("HGG" if year == "2018" else "MICCAI_BraTS2020_TrainingData")
        for number, id in enumerate(listing[part][0] for part in ("train", "val", "test")):
            (folder / id).mkdir(parents=True)
            for file in (root / "phantoms" / f"PHANTOM-{number:05d}-000").iterdir():
                (folder / id / f"{id}_{file.name.rpartition('_')[2]}").write_bytes(file.read_bytes())
    return {year: root / year for year in BRATS_SPLITS}


BRATS_SPLITS = {"2018": "brats2018-list1", "2020": "brats2020"}

TINY_RECIPE = (
    "model.size=tiny",
    "align.anchor=pstar",
    "align.levels=[x4]",
    "data.val_fraction=0",
    "train.steps=2",
    "train.batch_size=1",
    "train.patch=[32, 32, 32]",
    "train.log_every=1",
    "train.precision=fp32",
)
"""Settings of the smallest run there is."""
