from __future__ import annotations

from pathlib import Path

import pytest
from made_up_calls import works

from medmap.core.labels import SCHEMES
from medmap.data.colours import REGION_COLOURS, VIEWERS, class_colour, write_colours
from medmap.errors import InputError
from medmap.figures.style import REGION_HUES


def test_masks_and_figures_have_one_palette() -> None:
    assert REGION_COLOURS == REGION_HUES


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
def test_every_code_has_a_colour_of_its_own_in_every_table(scheme: object, tmp_path: Path) -> None:
    assert isinstance(scheme, type(SCHEMES["msd"]))
    colours = [class_colour(scheme, name) for name in scheme.codes]
    assert len(set(colours)) == len(colours)
    files = write_colours(tmp_path / "c", scheme)
    assert [path.name for path in files] == [f"{scheme.name}{ending}" for ending in VIEWERS]
    for path in files:
        rows = [line.split() for line in path.read_text().splitlines() if not line.startswith("#")]
        assert sorted(int(row[0]) for row in rows if row[0] != "0") == sorted(scheme.codes.values())


def test_the_tables_are_read_as_their_viewers_read_them(tmp_path: Path) -> None:
    scheme = SCHEMES["brats2021"]
    snap, slicer, surfer, eyes = (path.read_text().splitlines() for path in write_colours(tmp_path, scheme))
    assert snap[-1] == '4 240 228 66 1 1 1 "enhancing tumour"'
    assert slicer[-1] == "4 enhancing_tumour 240 228 66 255"
    assert surfer[-1] == "4 enhancing_tumour 240 228 66 0"
    assert [round(float(part) * 255) for part in eyes[-1].split()[1:4]] == [240, 228, 66]


def test_predict_writes_them(tiny_phantoms: Path, tmp_path: Path) -> None:
    image = tiny_phantoms / "PHANTOM-00000-000" / "PHANTOM-00000-000-t2f.nii.gz"
    words = ("predict", "--t2f", image, "-o", tmp_path / "seg.nii.gz", "--labels", "brats2021", "--device", "cpu")
    works(*words, "--colours", tmp_path / "colours")
    assert (tmp_path / "colours" / "brats2021-itksnap.label").read_text().splitlines()[-1].startswith("4 ")


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="the colours cannot be written"):
        write_colours(tmp_path / "file", SCHEMES["msd"])
