from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import nibabel as nib
import numpy as np
import pytest
from made_up_mask import make_mask, opened, study_in
from matplotlib.image import imread
from numpy.typing import NDArray
from typer.testing import CliRunner

from medmap import report
from medmap.cli import app
from medmap.core.labels import SCHEMES, LabelScheme
from medmap.data.nifti import read_labels, read_volume, write_volume
from medmap.errors import InputError
from medmap.figures.style import REGION_HUES
from medmap.report.case import case_report
from medmap.report.slices import painted, slices_of
from medmap.report.viewer import inlined, show
from medmap.segment import record_path

PATIENT = "PHANTOM-00000-000"
SEQUENCES = ("t2f", "t1c", "t2w", "t1n")
VENDOR = Path(report.__file__).parent / "vendor"
BASE64 = re.compile(r"[A-Za-z0-9+/=]{200,}")
LPS = np.array([[-2.0, 0, 0, 90], [0, -2, 0, 120], [0, 0, 2, -70], [0, 0, 0, 1]])
SPL = np.array([[0, 0, -1.5, 40], [0, -2, 0, 33], [1, 0, 0, -20], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def patient(tiny_phantoms: Path) -> Path:
    return tiny_phantoms / PATIENT


@pytest.fixture(scope="module")
def truth(patient: Path) -> NDArray[np.uint8]:
    return SCHEMES["brats2023"].encode(read_labels(patient / f"{PATIENT}-seg.nii.gz")[0])


@pytest.fixture
def mask(patient: Path, truth: NDArray[np.uint8], tmp_path: Path) -> Path:
    """A mask with its JSON, and copies of the images it was made from, all of which a test may spoil."""
    images = {name: Path(shutil.copy(patient / f"{PATIENT}-{name}.nii.gz", tmp_path)) for name in SEQUENCES}
    return make_mask(tmp_path / "out" / "seg.nii.gz", images, truth, notes=("found at /home/ann/x.nii.gz",))


@pytest.fixture(scope="module")
def page_file(patient: Path, truth: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = {name: patient / f"{PATIENT}-{name}.nii.gz" for name in SEQUENCES}
    return case_report(make_mask(tmp_path_factory.mktemp("case") / "seg.nii.gz", images, truth))


@pytest.fixture(scope="module")
def page(page_file: Path) -> str:
    return page_file.read_text(encoding="utf-8")


def words(page: str) -> str:
    """What stands in a page, without scripts, styles and pictures."""
    bare = re.sub(r"<(script|style).*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", bare))


def test_a_mask_made_from_relative_names_is_shown_from_anywhere(
    patient: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(patient)
    out = tmp_path / "seg.nii.gz"
    words = ["predict", "--model", str(tiny_run), "--t2f", f"{PATIENT}-t2f.nii.gz", "-o", str(out), "--device", "cpu"]
    assert CliRunner().invoke(app, words).exit_code == 0
    monkeypatch.chdir(tmp_path / "..")
    record = json.loads(record_path(out).read_text())
    assert record["inputs"]["t2f"]["file"] == str(patient / f"{PATIENT}-t2f.nii.gz")
    case_report(out)


# ---- one file ----------------------------------------------------------------------------------------------------


def test_page_names_no_place_outside_it(page: str) -> None:
    before, scripts = page.split("niivue-0.69.0.js is dist/niivue.umd.js")  # where the viewer's own text begins
    assert "http:" not in before
    assert "https:" not in before
    assert "<link" not in before
    assert "@import" not in page
    assert all(src.startswith("data:image/png;base64,") for src in re.findall(r'\ssrc="([^"]*)"', before))
    assert "default-src 'none'" in before
    assert scripts.count("</script>") == 2  # nothing in the viewer ends its element early


def test_the_vendored_viewer_is_what_its_notice_says(page: str) -> None:
    (script,) = VENDOR.glob("*.js")
    content = script.read_bytes()
    assert len(content) < 3_000_000
    assert hashlib.sha256(content).hexdigest() in (VENDOR / "NOTICE").read_text(encoding="utf-8")
    assert content.decode() in page
    for licence in ("LICENSE", "NOTICE"):
        assert (VENDOR / licence).read_text(encoding="utf-8") in page  # whoever has a page has the licences


def test_the_same_mask_gives_the_same_page(page_file: Path, page: str, tmp_path: Path) -> None:
    again = case_report(page_file.with_name("seg.nii.gz"), tmp_path / "again.html")
    assert again.read_text(encoding="utf-8") == page


# ---- numbers and words -------------------------------------------------------------------------------------------


def test_volumes_are_those_of_the_mask(page: str, truth: NDArray[np.uint8]) -> None:
    said = words(page)
    for region, classes, codes in (("WT", (1, 2, 3), "1 + 2 + 3"), ("TC", (1, 3), "1 + 3"), ("ET", (3,), "3")):
        ml = np.isin(truth, classes).sum() * 4.0**3 / 1000
        assert re.search(rf"\b{region} [a-z ]+ {ml:.1f} ml {re.escape(codes)} ", said), region


def test_what_to_expect_is_what_the_record_says(page_file: Path, page: str) -> None:
    expected = json.loads(record_path(page_file.with_name("seg.nii.gz")).read_text())["expected"]
    said = words(page)
    assert expected["measured_on"] in said
    for region, row in expected["dice"].items():
        assert f"{region} {row['mean']:.2f} {row['low']:.2f}–{row['high']:.2f} {row['n']}" in said.replace("   ", " ")


def test_lights_say_what_the_record_says_of_this_mask(mask: Path) -> None:
    facts = json.loads(record_path(mask).read_text())
    told = {"dice": 0.81, "low": 0.72, "high": 0.93, "light": "green", "why": None, "failed": {}}
    core = {
        "dice": 0.6962,
        "low": 0.0,
        "high": 0.75,
        "light": "red",
        "why": None,
        "failed": {"9 patients of there": 0.5},
    }
    core["failed"] = {"9 patients of there": 0.5}
    nothing = {"dice": None, "low": None, "high": None, "light": None, "why": "the mask is empty", "failed": {}}
    regions = {"WT": told, "TC": core, "ET": nothing}
    facts["confidence"] = {"measured_on": "made-up cases", "patients": 12, "level": 0.8, "regions": regions}
    record_path(mask).write_text(json.dumps(facts))
    page = case_report(mask).read_text(encoding="utf-8")
    said = words(page)
    assert "fitted to 12 held-out patients (made-up cases)" in said
    assert "WT green 0.81 0.72–0.93" in said
    assert "TC red 0.696 0.00–0.75" in said
    assert "ET nothing can be said: the mask is empty" in said
    assert "8 of 10 masks" in said
    assert "Known to fail: of the TC masks of 9 patients of there, 50 % lay between the ends, not 80 %." in said
    assert 'class="light green"' in page
    assert "margin-left:72%;width:21%" in page


def test_without_lights_the_page_says_so(page: str) -> None:
    assert "Unknown: this model has no measure of single masks" in words(page)


def test_origin_names_files_without_folders(mask: Path) -> None:
    said = words(case_report(mask).read_text(encoding="utf-8"))
    record = json.loads(record_path(mask).read_text())
    for entry in record["inputs"].values():
        assert f"{Path(entry['file']).name} {entry['sha256']}" in said
        assert entry["file"] not in said
    assert record["made"] in said
    assert record["model"]["weights_sha256"]["."] in said
    assert "Not a medical device" in said
    assert "found at x.nii.gz" in said  # a warning, without its folder


def test_anonymous_page_has_no_name(mask: Path) -> None:
    record = record_path(mask)
    facts = json.loads(record.read_text())
    facts["warnings"] = [f"{PATIENT}: {facts['inputs']['t2f']['file']} looks odd"]
    record.write_text(json.dumps(facts))
    named, nameless = (case_report(mask, anonymous=hidden).read_text(encoding="utf-8") for hidden in (False, True))
    assert PATIENT in named
    assert f"{PATIENT}: {PATIENT}-t2f.nii.gz looks odd" in words(named)
    assert PATIENT not in nameless
    assert "seg.nii.gz" not in nameless
    assert "this patient: the FLAIR image looks odd" in words(nameless)


def test_missing_sequences_and_unknown_expectation_are_said(
    patient: Path, truth: NDArray[np.uint8], tmp_path: Path
) -> None:
    images = {"t2w": patient / f"{PATIENT}-t2w.nii.gz"}
    mask = make_mask(tmp_path / "seg.nii.gz", images, truth)
    facts = json.loads(record_path(mask).read_text())
    record_path(mask).write_text(json.dumps(facts | {"expected": None}))
    said = words(case_report(mask).read_text(encoding="utf-8"))
    assert "from T2w; not given: T1n, T1c, FLAIR." in said
    assert "Unknown: nobody has evaluated this model" in said


def test_an_empty_mask_has_a_page(patient: Path, truth: NDArray[np.uint8], tmp_path: Path) -> None:
    images = {"t2w": patient / f"{PATIENT}-t2w.nii.gz"}
    page = case_report(make_mask(tmp_path / "seg.nii.gz", images, np.zeros_like(truth))).read_text(encoding="utf-8")
    assert "The network found no tumour." in words(page)
    shape = study_in(page)["shape"]
    assert study_in(page)["focus"] == [n // 2 for n in shape]


# ---- volumes in the page -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [np.diag([2.0, 2, 2, 1]), LPS, SPL], ids=["RAS", "LPS", "SPL"])
def test_every_voxel_keeps_its_place_and_its_value(affine: NDArray[np.float64]) -> None:
    rng = np.random.default_rng(3)
    image, mask = np.zeros((12, 14, 16), np.float32), np.zeros((12, 14, 16), np.uint8)
    image[3:9, 4:11, 2:10] = rng.normal(100, 30, (6, 7, 8))
    mask[5:8, 5:8, 4:12] = rng.integers(0, 4, (3, 3, 8))  # beyond the brain: nothing of a mask may be cut off
    study = inlined(show({"t1c": image}, mask, affine, SCHEMES["brats2023"]))
    codes, grey = opened(study["mask"]), opened(study["images"][0]["nifti"])
    assert "".join(nib.aff2axcodes(codes.affine)) == "RAS"
    assert np.allclose(codes.affine, grey.affine)
    assert codes.header.get_qform(coded=True)[1] == codes.header.get_sform(coded=True)[1] == 1
    assert np.count_nonzero(codes.dataobj) == np.count_nonzero(mask)
    assert np.count_nonzero(grey.dataobj) == np.count_nonzero(image)
    low, high = np.percentile(image[image != 0], (0.5, 99.5))
    there = np.linalg.inv(affine) @ codes.affine
    for index in np.ndindex(codes.shape):
        at = tuple(np.rint(there @ (*index, 1))[:3].astype(int))
        assert codes.dataobj[index] == mask[at]
        value = 0 if image[at] == 0 else round(1 + 254 * min(max((image[at] - low) / (high - low), 0), 1))
        assert abs(int(grey.dataobj[index]) - value) <= 1  # float32 against float64: at a half, one grey level
    assert tuple(study["shape"]) == codes.shape == grey.shape


def test_the_page_holds_the_patients_own_voxels(page: str, patient: Path, truth: NDArray[np.uint8]) -> None:
    study = study_in(page)
    assert [entry["name"] for entry in study["images"]] == list(SEQUENCES)
    codes = opened(study["mask"])
    original, affine = read_volume(patient / f"{PATIENT}-t1c.nii.gz")
    inside = np.argwhere(np.asarray(codes.dataobj) > 0)
    at = np.rint(nib.affines.apply_affine(np.linalg.inv(affine) @ codes.affine, inside)).astype(int)
    assert len(inside) == np.count_nonzero(truth)
    assert (np.asarray(codes.dataobj)[tuple(inside.T)] == truth[tuple(at.T)]).all()
    grey = np.asarray(opened(study["images"][1]["nifti"]).dataobj)[tuple(inside.T)]
    order = np.argsort(original[tuple(at.T)])
    assert (np.diff(grey[order].astype(int)) >= 0).all()
    assert codes.dataobj[tuple(study["focus"])] > 0


def test_a_resampled_image_is_shown_on_the_masks_grid(patient: Path, truth: NDArray[np.uint8], tmp_path: Path) -> None:
    volume, affine = read_volume(patient / f"{PATIENT}-t2w.nii.gz")
    write_volume(
        tmp_path / "x-t2w.nii.gz",
        volume[::-1, 2:],
        affine @ nib.affines.from_matvec(np.diag([-1, 1, 1]), [len(volume) - 1, 2, 0]),
    )
    images = {"t2f": patient / f"{PATIENT}-t2f.nii.gz", "t2w": tmp_path / "x-t2w.nii.gz"}
    page = case_report(make_mask(tmp_path / "seg.nii.gz", images, truth, resample=True)).read_text(encoding="utf-8")
    assert "resampled onto the mask's grid" in words(page)
    straight = inlined(show({"t2w": volume}, truth, affine, SCHEMES["brats2023"]))["images"][0]["nifti"]
    moved = study_in(page)["images"][1]["nifti"]
    one, two = (np.asarray(opened(nifti).dataobj).astype(int) for nifti in (straight, moved))
    assert (
        np.abs(one[1:-1, 3:-1, 1:-1] - two[-one.shape[0] :, -one.shape[1] :, -one.shape[2] :][1:-1, 3:-1, 1:-1]).max()
        <= 2
    )


# ---- pictures ----------------------------------------------------------------------------------------------------


def pixels(uri: str) -> NDArray[np.float64]:
    return np.asarray(imread(BytesIO(base64.b64decode(uri.partition(",")[2]))))[..., :3]


def test_pictures_are_the_way_radiologists_look() -> None:
    image = np.full((10, 12, 14), 100, np.float32)
    image[8, 6, 7] = image[5, 10, 7] = image[5, 6, 12] = 200  # on the patient's right, in front, above the middle
    mask = np.zeros(image.shape, np.uint8)
    mask[5, 6, 7] = 2
    study = show({"t2f": image}, mask, np.diag([1.0, 1, 1, 1]), SCHEMES["brats2023"])
    axial, coronal, sagittal = (pixels(slice.plain)[..., 0] for slice in slices_of(study, "t2f"))
    assert (axial.shape, coronal.shape, sagittal.shape) == ((12, 10), (14, 10), (14, 12))
    assert set(map(tuple, np.argwhere(axial > 0.5).tolist())) == {(11 - 6, 9 - 8), (11 - 10, 9 - 5)}
    assert set(map(tuple, np.argwhere(coronal > 0.5).tolist())) == {(13 - 7, 9 - 8), (13 - 12, 9 - 5)}
    assert set(map(tuple, np.argwhere(sagittal > 0.5).tolist())) == {(13 - 7, 11 - 10), (13 - 12, 11 - 6)}
    assert [slice.sides for slice in slices_of(study, "t2f")] == [("R", "L", "A"), ("R", "L", "S"), ("A", "P", "S")]
    assert [slice.place for slice in slices_of(study, "t2f")] == ["S 7 mm", "A 6 mm", "R 5 mm"]


def test_pictures_have_the_shape_of_the_patient() -> None:
    image = np.ones((10, 12, 14), np.float32)
    study = show({"t2f": image}, np.zeros(image.shape, np.uint8), np.diag([1.0, 1, 5, 1]), SCHEMES["brats2023"])
    assert [(s.width, s.height) for s in slices_of(study, "t2f")] == [(10, 12), (10, 70), (12, 70)]


@pytest.mark.parametrize("scheme", list(SCHEMES.values()), ids=list(SCHEMES))
def test_colours_are_those_of_the_legend_and_safe(scheme: LabelScheme) -> None:
    codes = np.zeros((6, 6, 6), np.uint8)
    for row, code in enumerate(scheme.codes.values()):
        codes[row, 1, 1] = code
    study = show({"t2f": np.ones(codes.shape, np.float32)}, codes, np.eye(4), scheme)
    picture = painted(study.images["t2f"][..., 1], study.mask[..., 1], study)
    assert len({paint.colour for paint in study.paints}) == len(study.paints) == len(scheme.codes)
    for row, paint in enumerate(study.paints):
        assert picture[row, 1].tolist() == pytest.approx(mpl.colors.to_rgb(paint.colour))  # one voxel is all rim
        assert paint.colour in REGION_HUES  # of the palette of Okabe and Ito
    assert [{"code": p.code, "name": p.name, "colour": p.colour} for p in study.paints] == inlined(study)["paints"]


# ---- what goes wrong ---------------------------------------------------------------------------------------------


def test_images_are_found_beside_the_mask(mask: Path) -> None:
    for image in mask.parent.parent.glob("*-t*.nii.gz"):
        image.rename(mask.parent / image.name)
    assert case_report(mask).is_file()


def test_an_image_that_is_gone_is_named(mask: Path) -> None:
    gone = mask.parent.parent / f"{PATIENT}-t1c.nii.gz"
    gone.unlink()
    with pytest.raises(
        InputError, match=rf"{re.escape(str(gone))}: the T1c image that seg.nii.gz was made from is gone"
    ):
        case_report(mask)


def test_an_image_that_has_changed_is_refused(mask: Path) -> None:
    image = mask.parent.parent / f"{PATIENT}-t1c.nii.gz"
    volume, affine = read_volume(image)
    write_volume(image, volume + 1, affine)
    with pytest.raises(InputError, match=r"-t1c.nii.gz: is not the T1c image that seg.nii.gz was made from \(SHA-256 "):
        case_report(mask)
    assert not mask.with_name("seg.html").exists()


def test_a_mask_that_was_edited_is_refused(mask: Path) -> None:
    image = nib.load(mask)
    codes = np.asarray(image.dataobj).copy()
    codes[codes == 3] = 0
    nib.save(nib.Nifti1Image(codes, image.affine, image.header), mask)
    with pytest.raises(InputError, match=r"seg.nii.gz: is not the mask that seg.medmap.json describes \(WT .* ml, the"):
        case_report(mask)


@pytest.mark.parametrize("content", ["{", "[]", '{"case": "x"}', "3"])
def test_a_damaged_record_is_refused(mask: Path, content: str) -> None:
    record_path(mask).write_text(content)
    with pytest.raises(
        InputError, match=r"seg.medmap.json: cannot be used \(.*\); expected what `medmap predict` wrote"
    ):
        case_report(mask)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sequences": None}, r"sequences: found null, expected an object"),
        ({"warnings": "none"}, r'warnings: found "none", expected a list'),
        ({"labels": {"scheme": "brats2023", "codes": [1]}}, r"labels.codes: found \[1\], expected an object"),
        ({"inputs": {"t2f": "a.nii.gz"}}, r"inputs: expected each image with its SHA-256"),
        ({"volumes_ml": {"WT": "12"}}, r"volumes_ml: expected a number a region"),
    ],
)
def test_a_record_with_something_else_in_its_place_is_refused(mask: Path, change: dict[str, Any], said: str) -> None:
    record_path(mask).write_text(json.dumps(json.loads(record_path(mask).read_text()) | change))
    with pytest.raises(InputError, match=rf"cannot be used \({said}\); expected what"):
        case_report(mask)


def test_a_mask_of_others_is_refused(patient: Path) -> None:
    with pytest.raises(InputError, match=rf"there is no {PATIENT}-seg.medmap.json beside it; a report needs the JSON"):
        case_report(patient / f"{PATIENT}-seg.nii.gz")


# ---- the command -------------------------------------------------------------------------------------------------


def test_command_makes_a_page(mask: Path) -> None:
    answer = CliRunner().invoke(app, ["report", str(mask), "--anonymous", "-o", str(mask.with_name("a.html"))])
    assert (answer.exit_code, answer.stdout) == (0, f"{mask.with_name('a.html')}\n")
    assert PATIENT not in mask.with_name("a.html").read_text(encoding="utf-8")
    answer = CliRunner().invoke(app, ["report", str(mask), "--json"])
    assert json.loads(answer.stdout) == {"report": str(mask.with_name("seg.html"))}


def test_command_never_writes_a_page_over_a_mask_or_an_image(mask: Path) -> None:
    for name in (mask.name, f"../{PATIENT}-t2f.nii.gz"):
        place = mask.parent / name
        before = place.read_bytes()
        answer = CliRunner().invoke(app, ["report", str(mask), "-o", str(place)])
        assert answer.exit_code == 1
        assert "pages are written as .html (or .htm); give it such a name" in answer.output
        with pytest.raises(InputError, match=r"pages are written as \.html"):
            case_report(mask, place)
        assert place.read_bytes() == before


def test_command_knows_what_anonymous_is_for(tiny_run: Path) -> None:
    answer = CliRunner().invoke(app, ["report", str(tiny_run), "--anonymous"])
    assert answer.exit_code == 2
    assert "is for the page of a mask" in answer.output


# ---- a real patient ----------------------------------------------------------------------------------------------


def test_a_patient_at_1_mm_fits_into_an_email(real_data: Path, tmp_path: Path) -> None:
    folder = real_data / "original" / "BraTS2021_00006"
    names = {"t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair"}
    images = {name: folder / f"BraTS2021_00006_{end}.nii.gz" for name, end in names.items()}
    labels, _ = read_labels(folder / "BraTS2021_00006_seg.nii.gz")
    classes = SCHEMES["brats2021"].encode(labels)
    page = case_report(make_mask(tmp_path / "seg.nii.gz", images, classes, scheme=SCHEMES["brats2021"]))
    assert page.stat().st_size <= 15_000_000
    study = study_in(page.read_text(encoding="utf-8"))
    codes = np.asarray(opened(study["mask"]).dataobj)
    assert np.bincount(codes.ravel(), minlength=5).tolist()[1:] == np.bincount(labels.ravel(), minlength=5).tolist()[1:]
