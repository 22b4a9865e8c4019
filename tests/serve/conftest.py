"""Pages that the tests of the server share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from medmap.core.modality import GLIOMA_MRI

if TYPE_CHECKING:
    from made_up_page import Page


@pytest.fixture(scope="module")
def files(tiny_phantoms: Path) -> dict[str, Path]:
    """The images of one patient. Read only."""
    patient = "PHANTOM-00000-000"
    return {name: tiny_phantoms / patient / f"{patient}-{name}.nii.gz" for name in GLIOMA_MRI}


@pytest.fixture
def page(tiny_run: Path, tmp_path: Path) -> Iterator[Page]:
    from made_up_page import Page

    made = Page(tiny_run, tmp_path / "page")
    yield made
    made.close()


@pytest.fixture(scope="module")
def ready(
    tiny_run: Path, files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Page, str]]:
    """A page with a checked patient."""
    from made_up_page import Page

    page = Page(tiny_run, tmp_path_factory.mktemp("serve") / "page")
    patient = page.begin(*files.values())
    assert page.job(patient, "check")["result"]["refused"] == ""
    yield page, patient
    page.close()
