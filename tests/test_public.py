"""The public surface: flat, complete, and cheap to import."""

from __future__ import annotations

import subprocess
import sys

import pytest

import medmap


@pytest.mark.parametrize("name", medmap.__all__)
def test_every_public_name_is_there_and_explained(name: str) -> None:
    thing = getattr(medmap, name)
    assert thing is not None
    assert not callable(thing) or (thing.__doc__ or "").strip()


def test_another_name_is_refused_with_what_there_is() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'segmentation'; it offers ModalitySet, GLIOMA_MRI"):
        medmap.segmentation  # noqa: B018


def test_importing_medmap_imports_nothing_heavy() -> None:
    code = "import sys, medmap; print(*(m for m in ('torch', 'monai', 'nibabel', 'numpy', 'yaml') if m in sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
