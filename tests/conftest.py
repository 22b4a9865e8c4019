"""What several tests need: real scans where they are at hand."""

from __future__ import annotations

import os
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
