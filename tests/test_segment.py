from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import yaml
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from numpy.typing import NDArray

from medmap.card import choose_scheme, expectation, read_model
from medmap.core.case import Case, Prediction
from medmap.core.labels import SCHEMES, LabelScheme
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.data.layouts import recognise
from medmap.errors import CheckpointError, InputError
from medmap.inputs import read_inputs
from medmap.predict import Predictor
from medmap.segment import record_path, segment_case

PATIENT = "PHANTOM-00000-000"
MASK = "seg.nii.gz"


@pytest.fixture(scope="session")
def predictor(tiny_run: Path) -> Predictor:
    return Predictor.load(tiny_run, device="cpu", precision="fp32")


@pytest.fixture
def images(tiny_phantoms: Path) -> dict[str, Path]:
    return {name: tiny_phantoms / PATIENT / f"{PATIENT}-{name}.nii.gz" for name in GLIOMA_MRI}


class Mirror:
    """Stands in for a network: keeps the case it was given, and answers with one class everywhere."""

    def __init__(self, known: ModalitySet = GLIOMA_MRI) -> None:
        self.card = SimpleNamespace(modalities=known, scheme=SCHEMES["brats2023"])
        self.networks, self.device, self.precision = (None,), "cpu", "fp32"
        self.mirror, self.et_min_ml = (), 0.5
        self.case: Case | None = None

    def usable(self, names: Any) -> ModalitySet:
        return self.card.modalities.pick(names)

    def begin(self, case: Case) -> Case:
        self.case = case
        return case

    def answer(self, case: Case) -> SimpleNamespace:
        return SimpleNamespace(agreement=None)

    def finish(self, case: Case, answer: Any, **how: Any) -> Prediction:
        return Prediction(case.id, case.grid, np.ones(case.grid.shape, np.uint8), tuple(case.images))


def write(path: Path, volume: NDArray[Any], affine: NDArray[np.float64]) -> Path:
    image = nib.Nifti1Image(volume, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    nib.save(image, path)
    return path


def voxels(path: Path) -> NDArray[Any]:
    return np.asanyarray(nib.load(path).dataobj)


def altered(path: Path, source: Path, change: Any) -> Path:
    image = nib.load(source)
    return write(path, change(np.asarray(image.dataobj, np.float32).copy()), image.affine)


# ---- the mask ----------------------------------------------------------------------------------------------------


def test_a_mask_and_a_json_that_tells_where_it_came_from(
    predictor: Predictor, tiny_run: Path, images: dict[str, Path], tmp_path: Path
) -> None:
    named = {"flair": images["t2f"], "t1ce": images["t1c"], "adc": images["t2w"]}
    inputs = read_inputs(named, known=GLIOMA_MRI)
    out = segment_case(predictor, inputs, tmp_path / MASK, model=read_model(tiny_run))
    mask, record = nib.load(out), json.loads(record_path(out).read_text())
    assert (mask.get_data_dtype(), mask.shape) == (np.dtype(np.uint8), nib.load(images["t2f"]).shape)
    assert record["case"] == PATIENT
    assert record["sequences"] == {"used": ["t1c", "t2f"], "missing": ["t1n", "t2w"], "ignored": ["adc"]}
    assert {name: entry["sha256"] for name, entry in record["inputs"].items()} == {
        name: hashlib.sha256(images[name].read_bytes()).hexdigest() for name in ("t2f", "t1c")
    }
    weights = tiny_run / "checkpoints" / "best" / "model.safetensors"
    assert record["model"]["weights_sha256"] == {".": hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert record["labels"] == {"scheme": "brats2023", "codes": {"ncr": 1, "ed": 2, "et": 3}, "undivided": {}}
    assert (record["abstain"], record["left_out"]) == (None, {})
    codes = voxels(out)
    members = {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}
    assert record["volumes_ml"] == pytest.approx(
        {region: np.isin(codes, codes_of).sum() * 4.0**3 / 1000 for region, codes_of in members.items()}, abs=1e-3
    )
    assert record["warnings"] == []
    assert record["expected"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seg.medmap.json", MASK]


@pytest.mark.parametrize("name", ["brats2021", "brats2023", "msd"])
def test_codes_of_every_scheme_mean_the_same_classes(
    name: str, predictor: Predictor, images: dict[str, Path], tmp_path: Path
) -> None:
    inputs = read_inputs({"t2w": images["t2w"], "t2f": images["t2f"]})
    plain = voxels(segment_case(predictor, inputs, tmp_path / "plain.nii.gz"))
    scheme = choose_scheme(predictor.card.scheme, name)
    asked = voxels(segment_case(predictor, inputs, tmp_path / "asked.nii.gz", scheme=scheme))
    assert len(np.unique(plain)) > 1
    np.testing.assert_array_equal(scheme.encode(asked), SCHEMES["brats2023"].encode(plain))
    np.testing.assert_array_equal(scheme.decode(scheme.encode(asked)), asked)


@pytest.mark.parametrize("axes", ["LPS", "LAS", "RAS", "SPL"])
def test_the_mask_lies_on_the_grid_of_the_input(
    axes: str, predictor: Predictor, images: dict[str, Path], tmp_path: Path
) -> None:
    turned = {}
    for name in ("t1c", "t2f"):
        image = nib.load(images[name])
        turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(axes))
        affine = image.affine @ inv_ornt_aff(turn, image.shape)
        turned[name] = write(tmp_path / f"{name}.nii.gz", apply_orientation(np.asanyarray(image.dataobj), turn), affine)
    upright = voxels(segment_case(predictor, read_inputs({n: images[n] for n in turned}), tmp_path / "upright.nii.gz"))
    mask = nib.load(segment_case(predictor, read_inputs(turned), tmp_path / MASK))
    like = nib.load(turned["t1c"])
    assert mask.shape == like.shape
    assert "".join(nib.aff2axcodes(mask.affine)) == axes
    for ours, theirs in (
        (mask.get_qform(coded=True), like.get_qform(coded=True)),
        (mask.get_sform(True), like.get_sform(True)),
    ):
        np.testing.assert_array_equal(ours[0], theirs[0])
        assert ours[1] == theirs[1] == 1
    turn = ornt_transform(io_orientation(nib.load(images["t1c"]).affine), axcodes2ornt(axes))
    np.testing.assert_array_equal(np.asanyarray(mask.dataobj), apply_orientation(upright, turn))


def test_taking_a_file_away_is_not_naming_it(
    predictor: Predictor, tiny_phantoms: Path, images: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(tiny_phantoms / PATIENT, tmp_path / "data" / PATIENT)
    for name in ("t1n", "t1c"):
        (tmp_path / "data" / PATIENT / f"{PATIENT}-{name}.nii.gz").unlink()
    (case,) = recognise(tmp_path / "data").cases
    removed = segment_case(predictor, case, tmp_path / "removed.nii.gz")
    unnamed = segment_case(predictor, read_inputs({n: images[n] for n in ("t2f", "t2w")}), tmp_path / "unnamed.nii.gz")
    other = segment_case(predictor, read_inputs({"t1n": images["t1n"]}), tmp_path / "other.nii.gz")
    assert removed.read_bytes() == unnamed.read_bytes() != other.read_bytes()


def test_regions_and_probabilities_beside_the_mask(
    predictor: Predictor, images: dict[str, Path], tmp_path: Path
) -> None:
    inputs = read_inputs({"t2f": images["t2f"], "t2w": images["t2w"]})
    out = segment_case(predictor, inputs, tmp_path / MASK, regions=True, probabilities=True, clean=False)
    codes = voxels(out)
    for region, members in {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}.items():
        np.testing.assert_array_equal(voxels(tmp_path / f"seg-{region}.nii.gz"), np.isin(codes, members))
    with np.load(tmp_path / "seg-probabilities.npz") as file:
        whole, core = file["WT"], file["TC"]
        np.testing.assert_array_equal(file["affine"], nib.load(images["t2f"]).affine)
    assert (whole.dtype, whole.shape) == (np.dtype(np.float16), codes.shape)
    # the likeliest of four classes is tumour wherever tumour as a whole is likelier than three quarters
    assert (codes[whole > 0.76] > 0).all()
    assert (whole >= core - 1e-3).all()
    assert 0 <= whole.min() < whole.max() <= 1


def test_what_to_expect_is_the_row_of_the_sequences_that_were_used(
    predictor: Predictor, tiny_run: Path, images: dict[str, Path], tmp_path: Path
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    rows = [
        {
            "subset": subset,
            "region": region,
            "metric": metric,
            "mean": mean,
            "low": 0.1,
            "high": 0.9,
            "p10": 0.2,
            "p90": 0.85,
            "n": 7,
            "undefined": 0,
        }
        for subset, metric, means in (
            ("t2w+t2f", "dice", (0.8, 0.6, 0.3, 0.4)),
            ("t2w+t2f", "nsd", (0.1, 0.1, 0.1, 0.1)),
            ("t2w", "dice", (0.0, 0.0, 0.0, 0.0)),
        )
        for region, mean in zip(("WT", "TC", "ET", "ET-pp"), means, strict=True)
    ]
    (run / "summary.json").write_text(json.dumps({"evaluated": "held-out patients", "rows": rows}))
    inputs = read_inputs({"t2f": images["t2f"], "t2w": images["t2w"]})
    found = {}
    for clean in (True, False):
        out = segment_case(predictor, inputs, tmp_path / MASK, model=read_model(run), clean=clean)
        found[clean] = json.loads(record_path(out).read_text())["expected"]
    assert found[True]["measured_on"] == "held-out patients"
    assert found[True]["dice"]["WT"] == {"mean": 0.8, "low": 0.1, "high": 0.9, "n": 7, "p10": 0.2, "p90": 0.85}
    assert [found[clean]["dice"]["ET"]["mean"] for clean in (True, False)] == [0.4, 0.3]
    assert read_model(run, "last").expected("t2w+t2f", True) is None


def test_numbers_of_other_weights_are_not_told(measured_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(measured_run, tmp_path / "copy")
    model = read_model(run)
    (run / "card.json").write_text(json.dumps({"model": {"weights_sha256": model.weights_sha256}}))
    assert read_model(run).expected("t2w+t2f", True) is not None
    (run / "card.json").write_text(json.dumps({"model": {"weights_sha256": {".": "of the last checkpoint"}}}))
    assert read_model(run).expected("t2w+t2f", True) is None


def test_regions_of_an_earlier_answer_do_not_lie_beside_another(
    images: dict[str, Path], predictor: Predictor, tmp_path: Path
) -> None:
    inputs, out = read_inputs({"t2f": images["t2f"]}), tmp_path / MASK
    segment_case(predictor, inputs, out, regions=True, probabilities=True)
    assert len(list(tmp_path.iterdir())) == 6
    segment_case(predictor, inputs, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seg.medmap.json", MASK]


@pytest.mark.parametrize("stop", ["medmap.segment.np.savez_compressed", "medmap.data.nifti.nib.save"])
@pytest.mark.parametrize("error", [OSError(27, "File too large"), KeyboardInterrupt()])
def test_a_set_that_fails_leaves_nothing_and_keeps_the_earlier_one(
    images: dict[str, Path],
    predictor: Predictor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: str,
    error: Any,
) -> None:
    inputs, out = read_inputs({"t2f": images["t2f"]}), tmp_path / "masks" / MASK

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    for earlier in (False, True):
        if earlier:
            segment_case(predictor, inputs, out)
        before = {path.name: path.read_bytes() for path in out.parent.glob("*")}
        assert len(before) == 2 * earlier
        with monkeypatch.context() as patch:
            patch.setattr(stop, fail)
            with pytest.raises((InputError, KeyboardInterrupt)):
                segment_case(predictor, inputs, out, regions=True, probabilities=True)
        assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == before


def test_a_json_never_outlives_its_mask(images: dict[str, Path], tmp_path: Path) -> None:
    out = segment_case(Mirror(), read_inputs({"t2f": images["t2f"]}), tmp_path / MASK)  # type: ignore[arg-type]
    out.unlink()
    out.mkdir()
    with pytest.raises(InputError, match=r"seg\.nii\.gz: cannot be written .*directory"):
        segment_case(Mirror(), read_inputs({"t2f": images["t2f"]}), out)  # type: ignore[arg-type]
    assert not record_path(out).exists()


def test_a_place_that_cannot_be_written(images: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written \(.*\); choose a place with -o"):
        segment_case(Mirror(), read_inputs({"t2f": images["t2f"]}), tmp_path / "file" / MASK)  # type: ignore[arg-type]


# ---- other grids -------------------------------------------------------------------------------------------------


def place_mm(shape: tuple[int, int, int], affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """[X Y Z 3]: where each voxel's centre lies."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return index @ affine[:3, :3].T + affine[:3, 3]


def ramp(shape: tuple[int, int, int], affine: NDArray[np.float64]) -> NDArray[np.float32]:
    """100 + x + 2 y − z/2 in mm within a ball, 0 outside: linear interpolation keeps a ramp exactly."""
    mm = place_mm(shape, affine)
    inside = (mm**2).sum(axis=-1) < 30.0**2
    return np.where(inside, 100 + mm @ [1.0, 2.0, -0.5], 0).astype(np.float32)


def oblique(spacing_mm: float, degrees: float) -> NDArray[np.float64]:
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) * spacing_mm
    affine[:3, 3] = -affine[:3, :3] @ [20.0, 20.0, 20.0]
    return affine


def test_other_grids_are_refused_or_resampled_where_they_are_in_space(tmp_path: Path) -> None:
    first, second = oblique(2.0, 0), oblique(1.9, 25)
    shape = (41, 41, 41)
    named = {
        "t2w": write(tmp_path / "b.nii.gz", ramp(shape, second), second),
        "t2f": write(tmp_path / "a.nii.gz", ramp(shape, first), first),
    }
    with pytest.raises(InputError, match=r"affines of b\.nii\.gz and a\.nii\.gz differ by up to .*--resample"):
        read_inputs(named)
    for order in (("t2f", "t2w"), ("t2w", "t2f")):
        mirror = Mirror()
        inputs = read_inputs({name: named[name] for name in order}, resample=True)
        out = segment_case(mirror, inputs, tmp_path / MASK)  # type: ignore[arg-type]
        assert mirror.case is not None
        target = first if order[0] == "t2f" else second
        np.testing.assert_allclose(nib.load(out).affine, target, atol=1e-5)
        moved = mirror.case.images[order[1]]
        mm = place_mm(shape, target)
        deep = np.linalg.norm(mm, axis=-1) < 26
        np.testing.assert_allclose(moved[deep], (100 + mm @ [1.0, 2.0, -0.5])[deep], atol=0.02)
        # the rim is not darkened by the background
        assert moved[moved != 0].min() > 0.95 * ramp(shape, target)[ramp(shape, target) != 0].min()
        np.testing.assert_array_equal(mirror.case.images[order[0]], ramp(shape, target))
        record = json.loads(record_path(out).read_text())
        assert {name: entry["resampled"] for name, entry in record["inputs"].items()} == {
            order[0]: False,
            order[1]: True,
        }
        assert record["warnings"] == [
            f"{order[1]} was resampled onto the grid of {named[order[0]].name}: right only where the two are registered"
        ]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda v: v, None),
        (lambda v: v[::-1], r"case .*t2w is mirrored against t1n, t1c, t2f: left and right are exchanged; export it"),
        (lambda v: np.roll(v, 8, axis=1), r"t2w lies 32 mm away from t1n, t1c, t2f on the same grid; register"),
    ],
)
def test_images_that_were_resampled_are_looked_at_as_those_of_one_grid(
    images: dict[str, Path], tmp_path: Path, change: Any, told: str | None
) -> None:
    image = nib.load(images["t2w"])
    wide = np.pad(change(np.asarray(image.dataobj, np.float32)), [(2, 2), (0, 0), (0, 0)])
    affine = image.affine.copy()
    affine[:3, 3] -= 2 * affine[:3, 0]
    named = images | {"t2w": write(tmp_path / "t2w.nii.gz", wide, affine)}
    inputs = read_inputs(named, resample=True)
    if told and told.startswith("case"):
        with pytest.raises(InputError, match=told):
            segment_case(Mirror(), inputs, tmp_path / MASK)  # type: ignore[arg-type]
        return
    out = segment_case(Mirror(), inputs, tmp_path / MASK)  # type: ignore[arg-type]
    resampled, *others = json.loads(record_path(out).read_text())["warnings"]
    assert resampled.startswith("t2w was resampled onto the grid of")
    assert len(others) == (told is not None)
    assert told is None or re.search(told, others[0])


# ---- bad input ---------------------------------------------------------------------------------------------------

LONELY = {"t2f": "t2f.nii.gz"}
BAD_HEADERS: dict[str, tuple[dict[str, str], str]] = {
    "no image": ({}, r"no image at all; name at least one"),
    "unknown sequence": ({"adc": "t2f.nii.gz"}, r"no sequence in common: the input has adc, the model knows t1n, t1c"),
    "named twice": (
        {"t1": "t1n.nii.gz", "t1n": "t2f.nii.gz"},
        r"t1n is named twice: .*t1n\.nii\.gz and .*t2f\.nii\.gz",
    ),
    "one file twice": ({"t1n": "t2f.nii.gz", "t2f": "t2f.nii.gz"}, r"t2f\.nii\.gz is named as t1n and as t2f"),
    "absent": ({"t2f": "nowhere.nii.gz"}, r"nowhere\.nii\.gz: no such file"),
    "4-D": ({"t2f": "four.nii.gz"}, r"four\.nii\.gz: a 4-D file \(6×6×6×2\).*fslsplit"),
    "not NIfTI": ({"t2f": "text.nii.gz"}, r"text\.nii\.gz: named \.gz but its bytes are not gzip"),
    "a folder": ({"t2f": "."}, r"is a folder; a NIfTI file is expected"),
    "another shape": (
        {**LONELY, "t1c": "small.nii.gz"},
        r"small\.nii\.gz is 5×6×6 voxels, t2f\.nii\.gz is .*--resample",
    ),
    "another place": (
        {**LONELY, "t1c": "moved.nii.gz"},
        r"affines of t2f\.nii\.gz and moved\.nii\.gz differ by up to 0\.5 mm",
    ),
    "another unit": (
        {**LONELY, "t1c": "metres.nii.gz"},
        r"metres\.nii\.gz: voxels of 0\.001×0\.001×0\.001 mm, 0\.2 to 10 mm are expected.*; give the header",
    ),
}


@pytest.mark.parametrize("what", BAD_HEADERS)
def test_headers_that_cannot_work(what: str, images: dict[str, Path], tmp_path: Path) -> None:
    named, message = BAD_HEADERS[what]
    for name, path in images.items():
        shutil.copy(path, tmp_path / f"{name}.nii.gz")
    image = nib.load(images["t2f"])
    write(tmp_path / "four.nii.gz", np.ones((6, 6, 6, 2), np.float32), np.eye(4))
    write(tmp_path / "small.nii.gz", np.ones((5, 6, 6), np.float32), np.eye(4))
    shifted = image.affine.copy()
    shifted[0, 3] += 0.5
    write(tmp_path / "moved.nii.gz", np.asanyarray(image.dataobj), shifted)
    write(tmp_path / "metres.nii.gz", np.ones((6, 6, 6), np.float32), np.diag([0.001, 0.001, 0.001, 1]))
    (tmp_path / "text.nii.gz").write_text("not an image")
    with pytest.raises(InputError, match=message):
        read_inputs({name: tmp_path / file for name, file in named.items()}, known=GLIOMA_MRI)


BAD_VOXELS: dict[str, tuple[Any, str]] = {
    "NaN": (
        lambda v: np.where(np.arange(v.size).reshape(v.shape) < 5, np.nan, v),
        r"5 voxels are NaN or infinite; find out",
    ),
    "empty": (np.zeros_like, r"empty, every voxel is 0; remove the file"),
    "constant": (lambda v: np.full_like(v, 7), r"constant, every voxel is 7; remove the file"),
    "a mask": (
        lambda v: np.float32(7) * (v != 0),
        r"constant inside the brain, .* 0 or 7: .*; name its own file",
    ),
}


@pytest.mark.parametrize("what", BAD_VOXELS)
def test_voxels_that_would_mislead(what: str, images: dict[str, Path], tmp_path: Path) -> None:
    change, message = BAD_VOXELS[what]
    bad = altered(tmp_path / "bad.nii.gz", images["t2f"], change)
    inputs = read_inputs({"t2w": images["t2w"], "t2f": bad})
    with pytest.raises(InputError, match=rf"case .*bad\.nii\.gz: {message}"):
        segment_case(Mirror(), inputs, tmp_path / MASK)  # type: ignore[arg-type]
    assert not (tmp_path / MASK).exists()


def test_a_copy_under_another_name_is_found_by_its_voxels(images: dict[str, Path], tmp_path: Path) -> None:
    copy = altered(tmp_path / "copy.nii.gz", images["t2f"], lambda v: v)
    with pytest.raises(InputError, match=r"t2f and t1n are one image under two names; find out which name is right"):
        segment_case(Mirror(), read_inputs({"t2f": images["t2f"], "t1n": copy}), tmp_path / MASK)  # type: ignore[arg-type]


def test_a_sequence_the_model_does_not_know_is_never_opened(images: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "adc.nii.gz").write_text("not an image")
    mirror = Mirror(ModalitySet(("t2f",)))
    inputs = read_inputs({"adc": tmp_path / "adc.nii.gz", "t2f": images["t2f"]}, known=("t2f",))
    segment_case(mirror, inputs, tmp_path / MASK)  # type: ignore[arg-type]
    assert mirror.case is not None
    assert list(mirror.case.images) == ["t2f"]


def test_a_head_with_its_skull_is_warned_about(images: dict[str, Path], tmp_path: Path) -> None:
    def skull(volume: NDArray[np.float32]) -> NDArray[np.float32]:
        noise = np.random.default_rng(0).integers(1, 20, volume.shape)
        return np.where(volume == 0, noise, volume).astype(np.float32)

    raw = altered(tmp_path / "raw.nii.gz", images["t2f"], skull)
    out = segment_case(Mirror(), read_inputs({"t2f": raw}), tmp_path / MASK)  # type: ignore[arg-type]
    (warning,) = json.loads(record_path(out).read_text())["warnings"]
    assert re.search(r"not skull-stripped: t2f looks like a raw head; .*hd-bet.*mri_synthstrip", warning)


# ---- what a model says about itself ------------------------------------------------------------------------------


def test_the_codes_of_a_mask() -> None:
    glioma, vessels = SCHEMES["brats2021"], LabelScheme("vessels", ("background", "wall"), {"wall": 9})
    assert choose_scheme(glioma) is SCHEMES["brats2023"]
    assert choose_scheme(glioma, "msd") is SCHEMES["msd"]
    assert choose_scheme(vessels) is choose_scheme(vessels, "vessels") is vessels
    assert choose_scheme(SCHEMES["brats2024"]).name == "brats2024"
    with pytest.raises(
        InputError, match=r"labels brats2024: its classes are .*rc; the model knows ncr, ed, et\. Choose"
    ):
        choose_scheme(glioma, "brats2024")
    with pytest.raises(InputError, match=r"'brats1999' is not known; expected one of brats2021"):
        choose_scheme(glioma, "brats1999")


@pytest.mark.parametrize("asked", [None, "brats2021"])
def test_a_mask_has_the_regions_of_its_model(asked: str | None) -> None:
    parts = LabelScheme(
        "dataset.json", ("background", "ncr", "ed", "et"), {"ncr": 3, "ed": 1, "et": 2}, {"ncr": ["ncr"]}
    )
    scheme = choose_scheme(parts, asked)
    assert (scheme.name, scheme.codes) == (asked or "brats2023", SCHEMES[asked or "brats2023"].codes)
    assert scheme.without({"ncr"})[0].tolist() == [0, 0, 0, 0]


def test_a_model_is_known_by_its_card(tiny_run: Path, tmp_path: Path) -> None:
    model = read_model(tiny_run)
    assert (model.modalities, model.scheme.name, model.spacing_mm) == (GLIOMA_MRI, "brats2023", 4.0)
    assert [folder.name for folder in read_model(tiny_run, "last").checkpoints] == ["last"]
    for fold in ("fold0", "fold1"):
        shutil.copytree(tiny_run, tmp_path / "folds" / fold)
    assert list(read_model(tmp_path / "folds").weights_sha256) == ["fold0", "fold1"]


def test_a_folder_that_is_no_model(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere does not exist; expected a run"):
        read_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no run in it \(config\.yaml and model\.yaml\)"):
        read_model(tmp_path)
    run = shutil.copytree(tiny_run, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"no checkpoint 'first', there is best, last; it is written"):
        read_model(run, "first")
    card = yaml.safe_load((run / "model.yaml").read_text())
    del card["labels"]
    (run / "model.yaml").write_text(yaml.safe_dump(card))
    with pytest.raises(CheckpointError, match=r"model\.yaml: damaged \('labels'\); copy the run again"):
        read_model(run)


# ---- real patients -----------------------------------------------------------------------------------------------


def test_a_real_patient_stored_lps(predictor: Predictor, real_data: Path, tmp_path: Path) -> None:
    (case,) = recognise(real_data / "brats2021-2mm" / "BraTS2021_00002").cases
    inputs = read_inputs({name: case.images[name] for name in ("t2f", "t1c")}, id=case.id)
    mask = nib.load(segment_case(predictor, inputs, tmp_path / MASK, scheme=SCHEMES["brats2021"]))
    like = nib.load(case.images["t2f"].path)
    assert "".join(nib.aff2axcodes(like.affine)) == "LPS"
    assert (mask.shape, set(np.unique(mask.dataobj)) <= {0, 1, 2, 4}) == (like.shape, True)
    np.testing.assert_array_equal(mask.affine, like.affine)


def test_a_real_patient_on_four_grids(real_data: Path, tmp_path: Path) -> None:
    (case,) = recognise(real_data / "odd" / "TCGA-DU-7294-native").cases
    named = {name: case.images[name] for name in ("t2f", "t1n")}
    with pytest.raises(
        InputError, match=r"t1n\.nii\.gz is 512×512×34 voxels, .*t2f\.nii\.gz is 256×256×68.*--resample"
    ):
        read_inputs(named)
    mirror = Mirror()
    out = segment_case(mirror, read_inputs(named, resample=True), tmp_path / MASK)  # type: ignore[arg-type]
    assert mirror.case is not None
    assert nib.load(out).shape == (256, 256, 68)
    brains = [mirror.case.images[name] != 0 for name in named]
    assert 2 * (brains[0] & brains[1]).sum() / sum(brain.sum() for brain in brains) > 0.9


def test_real_raw_heads_on_three_grids_hear_of_both(real_data: Path) -> None:
    (case,) = recognise(real_data / "odd" / "LJUBLJANA-MS-raw-patient01-study1").cases
    both = r"antsRegistrationSyN\.sh .*\. Also not skull-stripped: t1n, t2w, t2f look like raw heads; then .*hd-bet"
    with pytest.raises(InputError, match=both):
        read_inputs(case.images)


def test_a_real_raw_head(real_data: Path, tmp_path: Path) -> None:
    (case,) = recognise(real_data / "odd" / "LJUBLJANA-MS-raw-patient01-study1").cases
    out = segment_case(Mirror(), read_inputs({"t2f": case.images["t2f"]}), tmp_path / MASK)  # type: ignore[arg-type]
    (warning,) = json.loads(record_path(out).read_text())["warnings"]
    assert re.search(r"not skull-stripped: t2f looks like a raw head; .*hd-bet.*mri_synthstrip", warning)


# ---- what is left out --------------------------------------------------------------------------------------------


@pytest.fixture
def measured_run(tiny_run: Path, tmp_path: Path) -> Path:
    """A run whose card says WT 0.8, TC 0.6, ET 0.3 (cleaned 0.4) from t2w and t2f, and nothing of other subsets."""
    run = shutil.copytree(tiny_run, tmp_path / "run")
    usual = {"subset": "t2w+t2f", "metric": "dice", "low": 0.1, "high": 0.9, "n": 7}
    means = {"WT": 0.8, "TC": 0.6, "ET": 0.3, "ET-pp": 0.4}
    rows = [{**usual, "region": region, "mean": mean} for region, mean in means.items()]
    (run / "summary.json").write_text(json.dumps({"evaluated": "held-out patients", "rows": rows}))
    return run


@pytest.mark.parametrize(
    ("least", "left", "codes", "undivided"),
    [
        (0.2, set(), {0: 0, 1: 1, 2: 2, 3: 3}, {}),
        (0.5, {"ET"}, {0: 0, 1: 1, 2: 2, 3: 1}, {"ncr": "TC"}),
        (0.7, {"ET", "TC"}, {0: 0, 1: 2, 2: 2, 3: 2}, {"ed": "WT"}),
    ],
)
def test_regions_that_are_expected_to_be_bad_are_not_told(
    predictor: Predictor,
    measured_run: Path,
    images: dict[str, Path],
    tmp_path: Path,
    least: float,
    left: set[str],
    codes: dict[int, int],
    undivided: dict[str, str],
) -> None:
    inputs, model = read_inputs({"t2f": images["t2f"], "t2w": images["t2w"]}), read_model(measured_run)
    whole = segment_case(predictor, inputs, tmp_path / "whole.nii.gz", model=model)
    told = segment_case(
        predictor, inputs, tmp_path / MASK, model=model, abstain=least, regions=True, probabilities=True
    )
    record = json.loads(record_path(told).read_text())
    assert record["abstain"] == least
    assert set(record["left_out"]) == left
    assert record["labels"]["undivided"] == undivided
    np.testing.assert_array_equal(voxels(told), np.vectorize(codes.get)(voxels(whole)))
    kept = {"WT", "TC", "ET"} - left
    assert set(record["volumes_ml"]) == kept
    assert record["volumes_ml"]["WT"] == json.loads(record_path(whole).read_text())["volumes_ml"]["WT"]
    assert {path.name for path in tmp_path.glob("seg-*.nii.gz")} == {f"seg-{region}.nii.gz" for region in kept}
    with np.load(tmp_path / "seg-probabilities.npz") as file:
        assert set(file.files) == kept | {"affine"}


@pytest.mark.parametrize(
    ("names", "least", "message"),
    [
        (("t2f", "t2w"), 0.9, "a mean Dice of 80 % for WT .* 90 % was asked for; .*; give more sequences"),
        (("t2f",), 0.5, "nobody has measured what to expect from t2f, so no region can be left out"),
    ],
)
def test_nothing_is_written_where_no_region_is_left_or_nobody_knows(
    predictor: Predictor,
    measured_run: Path,
    images: dict[str, Path],
    tmp_path: Path,
    names: tuple[str, ...],
    least: float,
    message: str,
) -> None:
    inputs, out = read_inputs({name: images[name] for name in names}), tmp_path / MASK
    with pytest.raises(InputError, match=message):
        segment_case(predictor, inputs, out, model=read_model(measured_run), abstain=least)
    assert not out.exists()
    with pytest.raises(InputError, match="name the model folder whose card"):
        segment_case(predictor, inputs, out, abstain=least)


def test_what_to_expect_in_words(measured_run: Path) -> None:
    expected = read_model(measured_run).expected("t2w+t2f", True)
    assert expected is not None
    assert list(expectation(expected)) == [
        "expect, from t2w+t2f, Dice in % as on 7 held-out cases (held-out patients):",
        "  WT  80 [10, 90]",
        "  TC  60 [10, 90]: do not use TC for volumetry",
        "  ET  40 [10, 90]: do not use ET for volumetry",
    ]
    expected["dice"]["WT"] |= {"p10": 0.62, "p90": 0.91}
    assert list(expectation(expected))[1] == "  WT  80 [10, 90], 8 of 10 cases between 62 and 91"
    expected["dice"]["WT"] |= {"mean": 0.6962, "p10": None}
    assert list(expectation(expected))[1] == "  WT  69.6 [10, 90]: do not use WT for volumetry"


def test_a_sequence_that_the_model_could_not_use_is_recorded_as_ignored(
    images: dict[str, Path], predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PMKL's students are, of whom none answers from a pair."""
    begin = Predictor.begin

    def of_one(self: Predictor, case: Case) -> Any:
        return begin(self, Case(case.id, {"t2w": case.images["t2w"]}, case.affine))

    monkeypatch.setattr(Predictor, "begin", of_one)
    given = read_inputs({name: images[name] for name in ("t2w", "t2f")}, known=GLIOMA_MRI)
    mask = segment_case(predictor, given, tmp_path / MASK)
    told = json.loads(record_path(mask).read_text(encoding="utf-8"))["sequences"]
    assert (told["used"], told["ignored"]) == (["t2w"], ["t2f"])
