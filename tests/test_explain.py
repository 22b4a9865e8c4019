from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_calls import answer, fails, works
from made_up_network import bright_voxels
from made_up_run import write_evaluation
from numpy.typing import NDArray

from medmap.card import SHIPPED, read_model
from medmap.cli import console
from medmap.core.case import Case
from medmap.core.labels import SCHEMES
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.data.cases import read_case
from medmap.data.layouts import recognise
from medmap.data.nifti import read_volume
from medmap.errors import InputError
from medmap.explain import Explanation, explain, explain_case, population, sentences, shapley, to_record, views
from medmap.figures import explanation_figure
from medmap.inputs import read_inputs
from medmap.predict import Predictor
from medmap.run import ModelCard

PATIENT = "PHANTOM-00000-000"
PLAYERS = ("a", "b", "c", "d")
FILES = {"explanation.json", "explanation.png", "explanation.txt"}
FILES |= {f"agreement-{region}.nii.gz" for region in ("WT", "TC", "ET")}
Game = dict[frozenset[str], float]


@pytest.fixture(autouse=True)
def _plain_manner() -> Iterator[None]:
    yield
    console.begin()


def coalitions(players: Sequence[str]) -> list[frozenset[str]]:
    return [frozenset(some) for size in range(1, len(players) + 1) for some in combinations(players, size)]


games = st.lists(st.floats(0, 1), min_size=15, max_size=15).map(
    lambda worth: dict(zip(coalitions(PLAYERS), worth, strict=True))
)


# ---- the game ----------------------------------------------------------------------------------------------------


@given(games)
def test_the_value_is_the_mean_gain_over_all_orders_in_which_players_can_come(game: Game) -> None:
    known = {frozenset(): 0.0, **game}
    gains = {player: [] for player in PLAYERS}
    for order in permutations(PLAYERS):
        for place, player in enumerate(order):
            gains[player].append(known[frozenset(order[: place + 1])] - known[frozenset(order[:place])])
    expected = {player: float(np.mean(gained)) for player, gained in gains.items()}
    assert shapley(game, PLAYERS) == pytest.approx(expected, abs=1e-12)


@given(games)
def test_values_sum_to_the_worth_of_all(game: Game) -> None:
    assert sum(shapley(game, PLAYERS).values()) == pytest.approx(game[frozenset(PLAYERS)], abs=1e-12)


@given(games)
def test_who_changes_nothing_gets_nothing_and_equals_get_the_same(game: Game) -> None:
    without_d = {subset: game[subset - {"d"}] if subset - {"d"} else 0.0 for subset in game}
    assert shapley(without_d, PLAYERS)["d"] == pytest.approx(0, abs=1e-12)
    swapped = {"c": "d", "d": "c"}
    alike = {s: (v + game[frozenset(swapped.get(name, name) for name in s)]) / 2 for s, v in game.items()}
    values = shapley(alike, PLAYERS)
    assert values["c"] == pytest.approx(values["d"], abs=1e-12)


def test_a_coalition_without_a_worth_is_named() -> None:
    with pytest.raises(InputError, match=r"no worth is known of b; .* all 3 sets of a, b"):
        shapley({frozenset("a"): 1.0, frozenset("ab"): 1.0}, "ab")


# ---- a network without a secret ----------------------------------------------------------------------------------


def made_up_case(affine: NDArray[np.float64] | None = None, **blobs: tuple[slice, slice, slice] | None) -> Case:
    """Every sequence is dark but for its bright blob of the same size, or the same everywhere."""
    images = {}
    for name, blob in blobs.items():
        image = np.zeros((16, 16, 16), np.float32)
        image[1:15, 1:15, 1:15] = 1
        if blob is not None:
            image[blob] = 50
        images[name] = image
    return Case("made-up", images, np.eye(4) if affine is None else affine)


LEFT, RIGHT = np.s_[2:5, 4:8, 4:8], np.s_[10:13, 4:8, 4:8]
CARD = ModelCard(GLIOMA_MRI, SCHEMES["brats2023"], None)


def predictor_of(label: int = 3, modalities: ModalitySet = GLIOMA_MRI) -> Predictor:
    return Predictor([bright_voxels(modalities, label)], CARD, precision="fp32", et_min_ml=0)


def test_halves_of_a_mask_that_two_sequences_see_are_worth_half_each() -> None:
    """Each alone finds one of two blobs: v = 2/3, and together 1, so φ = ½ (2/3 + 1/3). The third sees nothing."""
    found = explain(predictor_of(), made_up_case(t1c=LEFT, t2f=RIGHT, t2w=None))
    et = found.regions["ET"]
    assert et.dice == pytest.approx(
        {"t1c": 2 / 3, "t2w": 0, "t2f": 2 / 3, "t1c+t2w": 2 / 3, "t1c+t2f": 1, "t2w+t2f": 2 / 3, "t1c+t2w+t2f": 1}
    )
    assert et.shapley == pytest.approx({"t1c": 0.5, "t2w": 0, "t2f": 0.5}, abs=1e-9)
    assert et.volumes_ml == pytest.approx(
        {**dict.fromkeys(et.dice, 0.048), "t2w": 0, "t1c+t2f": 0.096, "t1c+t2w+t2f": 0.096}
    )
    expected = np.zeros((16, 16, 16), np.float32)
    expected[LEFT] = expected[RIGHT] = 4 / 7
    np.testing.assert_array_equal(et.agreement, expected)
    np.testing.assert_array_equal(et.mask, expected > 0)
    assert found.used.names == ("t1c", "t2w", "t2f")


def test_sequences_that_see_the_same_carry_the_same() -> None:
    found = explain(predictor_of(), made_up_case(t1n=LEFT, t1c=LEFT, t2f=None)).regions["WT"]
    assert found.shapley == pytest.approx({"t1n": 0.5, "t1c": 0.5, "t2f": 0}, abs=1e-9)


def test_a_region_that_the_full_answer_lacks_has_no_shares() -> None:
    """Class 1 is necrosis: there is a core, no enhancing tumour, and the Dice of nothing with nothing is 1."""
    found = explain(predictor_of(label=1), made_up_case(t1c=LEFT, t2f=None))
    et = found.regions["ET"]
    assert (et.shapley, et.dice) == (None, None)
    assert found.regions["TC"].shapley == pytest.approx({"t1c": 1, "t2f": 0})
    record = to_record(found)
    assert record["regions"]["ET"] == {
        "in_full_answer": False,
        "shapley": None,
        "dice_with_full_answer": None,
        "mean_agreement": None,
        "volume_ml": {"full": 0, "min": 0, "median": 0, "max": 0},
        "volumes_ml": {"t1c": 0, "t2f": 0, "t1c+t2f": 0},
    }
    said = " ".join(sentences({"case": "p", **record, "sequences": {"missing": []}, "other_patients": None}))
    assert (
        "ET (enhancing tumour): not in the full answer, so there is nothing to share out; no subset draws it." in said
    )
    assert "TC (tumour core), 0.0 ml: T1c carries 100 % of the decision, FLAIR 0 %." in said


def test_each_sequence_is_encoded_once_and_the_full_answer_is_the_one_that_is_predicted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    predictor, case = predictor_of(), made_up_case(t1n=LEFT, t1c=RIGHT, t2f=LEFT)
    backbone, encoded = predictor.networks[0].backbone, []
    encode = backbone.encode
    monkeypatch.setattr(backbone, "encode", lambda images, seen: encoded.append(*images) or encode(images, seen))
    told: list[tuple[int, int, str]] = []
    found = explain(predictor, case, told=lambda *one: told.append(one))
    assert sorted(encoded) == ["t1c", "t1n", "t2f"]
    assert [done for done, *_ in told] == [1, 2, 3, 4, 5, 6, 7]
    assert told[0] == (1, 7, "t1n+t1c+t2f")
    full = predictor.predict(case).classes
    for region, one in found.regions.items():
        np.testing.assert_array_equal(one.mask, CARD.scheme.region_mask(full, region))
        for subset, ml in one.volumes_ml.items():
            alone = Case("p", {name: case.images[name] for name in subset.split("+")}, case.affine)
            mask = CARD.scheme.region_mask(predictor.predict(alone).classes, region)
            assert ml == pytest.approx(mask.sum() / 1000)


def test_small_enhancing_tumours_are_dropped_in_every_answer_or_in_none() -> None:
    predictor, case = predictor_of(), made_up_case(t1c=LEFT, t2f=RIGHT)
    predictor.et_min_ml = 0.09  # one blob is 0.048 ml, both are 0.096
    assert explain(predictor, case).regions["ET"].volumes_ml == {"t1c": 0, "t2f": 0, "t1c+t2f": pytest.approx(0.096)}
    raw = explain(predictor, case, clean=False).regions["ET"]
    assert raw.volumes_ml == pytest.approx({"t1c": 0.048, "t2f": 0.048, "t1c+t2f": 0.096})


def test_a_model_that_lacks_an_answer_is_refused_with_what_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = predictor_of()
    students = [GLIOMA_MRI.parse(text) for text in ("t1c", "t1c+t2f", "t1n+t1c+t2w+t2f")]
    monkeypatch.setattr(predictor.networks[0].backbone, "supported_subsets", lambda: students)
    with pytest.raises(InputError, match=r"each of the 3 subsets of t1c\+t2f, this model answers only t1c, t1c\+t2f;"):
        explain(predictor, made_up_case(t1c=LEFT, t2f=RIGHT))
    assert explain(predictor, made_up_case(t1c=LEFT)).regions["ET"].shapley == {"t1c": 1}


# ---- in words ----------------------------------------------------------------------------------------------------


def record_of(found: Explanation, missing: Sequence[str] = (), others: Any = None) -> dict[str, Any]:
    return {"case": "p", **to_record(found), "sequences": {"missing": list(missing)}, "other_patients": others}


def test_who_carries_a_region_and_what_the_mask_would_be_without() -> None:
    """FLAIR sees half of what T1c sees: v = 1 and 2/3, so φ = 2/3 and 1/3; that half is in 3 of 3, the other in 2."""
    found = explain(predictor_of(), made_up_case(t1c=np.s_[2:8, 2:8, 2:8], t2f=np.s_[2:8, 2:8, 2:5]))
    head, meaning, whole, *_ = sentences(record_of(found))
    assert head == "p: what decided the mask that the model makes from T1c + FLAIR."
    assert "not accuracy" in meaning
    assert "add up to 100 %" in meaning
    assert whole == (
        "WT (whole tumour), 0.2 ml: T1c carries 67 % of the decision, FLAIR 33 %. Without T1c it would be 0.1 ml, Dice "
        "0.67 with this mask. The 3 subsets give 0.1 to 0.2 ml, median 0.2 ml; on average a voxel of the mask is in "
        "83 % of theirs."
    )


def test_a_share_below_nothing_is_explained_and_one_sequence_shares_nothing() -> None:
    record = record_of(explain(predictor_of(), made_up_case(t1c=LEFT, t2f=RIGHT)))
    record["regions"]["WT"]["shapley"] = {"t1c": 1.03, "t2f": -0.03}
    assert (
        "T1c carries 103 % of the decision, FLAIR −3 %. Below 0 %: adding it moves masks away" in sentences(record)[2]
    )
    alone = sentences(record_of(explain(predictor_of(), made_up_case(t2f=LEFT))))
    assert alone[2] == "WT (whole tumour), 0.0 ml: from FLAIR alone, which therefore carries everything."
    assert "100 %" not in alone[1]


def test_the_absent_are_told_from_other_patients_alone(tmp_path: Path, tiny_run: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    used = GLIOMA_MRI.parse("t1n+t2w+t2f")
    assert population(read_model(run), used) is None
    write_evaluation(run, GLIOMA_MRI.names, [f"p{index}" for index in range(6)])
    others = population(read_model(run), used, clean=False)
    rows = {
        (row["subset"], row["region"], row["metric"]): row
        for row in json.loads((run / "summary.json").read_text())["rows"]
    }
    assert others is not None
    assert list(others["with"]) == ["t1c"]
    for region in ("WT", "TC", "ET"):
        assert others["without"][region]["mean"] == rows[str(used), region, "dice"]["mean"]
        assert others["with"]["t1c"][region]["mean"] == rows[str(GLIOMA_MRI), region, "dice"]["mean"]
    cleaned = population(read_model(run), used)
    assert cleaned is not None
    assert cleaned["without"]["ET"]["mean"] == rows[str(used), "ET-pp", "dice"]["mean"]

    found = explain(predictor_of(), made_up_case(t1n=LEFT, t2w=LEFT, t2f=LEFT))
    *_, first, second = sentences(record_of(found, ["t1c"], others))
    assert first == "Not there: T1c. What it would have changed in this patient is unknown."
    lone, whole = others["without"]["ET"]["mean"], others["with"]["t1c"]["ET"]["mean"]
    assert second.startswith("Other patients, held out (fold 0 of 3, 6 patients), from these sequences had a mean Dice")
    assert f"ET {lone:.2f}; with T1c as well WT" in second
    assert second.endswith(f"ET {whole:.2f}.")
    *_, last = sentences(record_of(found, ["t1c"]))
    assert last == "Nor has anybody measured that in other patients (medmap evaluate)."


def test_the_model_that_comes_along_has_measured_every_single_absence() -> None:
    model = read_model(SHIPPED)
    for subset in model.modalities.subsets():
        others = population(model, subset)
        assert others is not None
        assert {*others["with"], *subset} == set(model.modalities)


# ---- in pictures -------------------------------------------------------------------------------------------------


def drawn(found: Explanation, case: Case) -> list[str]:
    """Words of a figure, drawn in full: layout warnings are errors here."""
    figure = explanation_figure(record_of(found), views(found, case))
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text()]


@pytest.mark.parametrize("label", [1, 3], ids=["no ET", "ET"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_figure_draws_for_any_number_of_sequences_and_names_its_axes(count: int, label: int) -> None:
    case = made_up_case(**dict(zip(GLIOMA_MRI, [LEFT, RIGHT, None, LEFT][:count], strict=False)))
    words = drawn(explain(predictor_of(label), case), case)
    assert words.count("share carried (%)") == words.count("volume (ml)") == 3
    assert words.count("5 cm") == words.count("R") == 3
    assert ("nothing to share out" in words) == ("not in the full answer" in words) == (label == 1)
    assert f"subsets, of {2**count - 1}, whose\nmask has the voxel (%)" in words


def test_many_sequences_draw() -> None:
    six = ModalitySet(("t1n", "t1c", "t2w", "t2f", "adc", "pet"))
    predictor = Predictor([bright_voxels(six, 3)], ModelCard(six, SCHEMES["brats2023"], None), precision="fp32")
    case = made_up_case(**{name: LEFT if index % 2 else RIGHT for index, name in enumerate(six)})
    assert "subsets, of 63, whose\nmask has the voxel (%)" in drawn(explain(predictor, case, clean=False), case)


@pytest.mark.parametrize("turned", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)])
def test_slices_stand_in_one_view_however_a_file_is_stored(turned: tuple[int, int, int]) -> None:
    """A blob on the patient's left, in front, is at the high end of both axes of the slice."""
    case = made_up_case(t1c=np.s_[10:14, 9:14, 8:11], t2f=None)
    flipped = {name: image[:: turned[0], :: turned[1], :: turned[2]].copy() for name, image in case.images.items()}
    stored = Case("p", flipped, np.diag([*turned, 1]).astype(float))
    view = views(explain(predictor_of(), stored), stored)["ET"]
    expected = np.zeros((14, 14), bool)
    expected[9:13, 8:13] = True  # the brain begins at voxel 1
    np.testing.assert_array_equal(view["mask"], expected)
    assert (view["on"], view["image"][10, 10]) == ("t1c", 50)


# ---- a folder ----------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tiny_phantoms: Path) -> dict[str, Path]:
    return {name: tiny_phantoms / PATIENT / f"{PATIENT}-{name}.nii.gz" for name in GLIOMA_MRI}


def test_a_folder_with_numbers_words_maps_and_a_picture(
    tiny_run: Path, images: dict[str, Path], tmp_path: Path
) -> None:
    predictor = Predictor.load(tiny_run, device="cpu", precision="fp32")
    inputs = read_inputs({name: images[name] for name in ("t2f", "t1c")}, known=GLIOMA_MRI)
    out = tmp_path / "why"
    record = explain_case(predictor, inputs, out, clean=False, model=read_model(tiny_run))
    assert {path.name for path in out.iterdir()} == FILES
    assert json.loads((out / "explanation.json").read_text()) == record
    assert (out / "explanation.txt").read_text().splitlines() == record["sentences"]
    assert (out / "explanation.png").read_bytes().startswith(b"\x89PNG")
    assert record["sequences"] == {"used": ["t1c", "t2f"], "missing": ["t1n", "t2w"], "ignored": []}
    assert (record["case"], record["subsets"]) == (PATIENT, ["t1c", "t2f", "t1c+t2f"])
    assert set(record["model"]["weights_sha256"]) == {"."}
    assert record["other_patients"] is None
    whole = record["regions"]["WT"]
    assert sum(whole["shapley"].values()) == pytest.approx(1, abs=2e-4)
    agreement, affine = read_volume(out / "agreement-WT.nii.gz")
    first = nib.load(images["t2f"])
    assert agreement.shape == first.shape
    np.testing.assert_allclose(affine, first.affine)
    # what the shares of all masks add up to is the sum of their volumes
    assert agreement.sum() * 3 * 4.0**3 / 1000 == pytest.approx(sum(whole["volumes_ml"].values()), rel=1e-4)


def test_the_command_says_it_in_words_or_in_json(tiny_run: Path, images: dict[str, Path], tmp_path: Path) -> None:
    words = ("explain", "--model", tiny_run, "--flair", images["t2f"], "--t1ce", images["t1c"], "-o", tmp_path / "why")
    planned = answer(*words, "--dry-run")
    assert (planned["dry_run"], planned["subsets"], list(planned["images"])) == (True, 3, ["t2f", "t1c"])
    assert {Path(path).name for path in planned["would_make"]} == FILES
    assert not (tmp_path / "why").exists()
    assert "would segment 3 subsets of t2f + t1c" in works(*words, "--dry-run")
    record = answer(*words, "--raw")
    assert record == json.loads((tmp_path / "why" / "explanation.json").read_text())
    assert record["small_enhancing_tumour_dropped_below_ml"] is None
    said = works(*words, "--raw")
    assert (tmp_path / "why" / "explanation.txt").read_text() in said


def test_a_folder_of_one_case_and_no_other(tiny_run: Path, tiny_phantoms: Path, tmp_path: Path) -> None:
    one, out = tmp_path / "one", tmp_path / "why"
    shutil.copytree(tiny_phantoms / PATIENT, one / PATIENT)
    words = ("explain", "--model", tiny_run, "-o", out, "--dry-run")
    assert answer(*words, "-i", one)["subsets"] == 15
    assert answer(*words, "-i", one / PATIENT)["subsets"] == 15
    assert "holds 3 cases; one patient is explained at a time" in fails(*words, "-i", tiny_phantoms)
    assert "no such file or folder; expected a folder of one case" in fails(*words, "-i", tmp_path / "nowhere")


def test_what_cannot_be_explained_is_said(tiny_run: Path, images: dict[str, Path], tmp_path: Path) -> None:
    words = ("explain", "--model", tiny_run)
    image, file = images["t2f"], tmp_path / "file"
    file.write_text("")
    assert "name the images" in fails(*words, "-o", tmp_path / "why", code=2)
    assert "not both" in fails(*words, "--t2f", image, "-i", tmp_path, "-o", tmp_path / "why", code=2)
    assert "is a file; an explanation is a folder" in fails(*words, "--t2f", image, "-o", file)
    assert "is the folder of the images" in fails(*words, "--t2f", image, "-o", image.parent)
    assert "no sequence in common" in fails(*words, "--image", f"adc={image}", "-o", tmp_path / "why")
    assert "expected the image t2f" in fails(*words, "--t2f", "nowhere.nii.gz", "-o", tmp_path / "why")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_plan_is_made_without_torch(tiny_run: Path, images: dict[str, Path], tmp_path: Path) -> None:
    argv = [
        "medmap",
        "explain",
        "--model",
        str(tiny_run),
        "--t2f",
        str(images["t2f"]),
        "-o",
        str(tmp_path),
        "--dry-run",
    ]
    code = (
        f"import sys\nsys.argv = {argv!r}\nfrom medmap.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print([name for name in ('torch', 'matplotlib', 'monai') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_contrast_agent_carries_the_enhancing_tumour_of_a_real_patient(real_data: Path) -> None:
    """Only T1c shows enhancement; whichever model comes along should have learned that."""
    (files,) = recognise(real_data / "brats2021-2mm" / "BraTS2021_00000").cases
    case = read_case(files)
    three = Case(case.id, {name: case.images[name] for name in ("t1c", "t2w", "t2f")}, case.affine)
    found = explain(Predictor.load(device="cpu"), three)
    et = found.regions["ET"].shapley
    assert et is not None
    assert et["t1c"] > 0.5
    for one in found.regions.values():
        assert one.shapley is not None
        assert sum(one.shapley.values()) == pytest.approx(1)
        assert one.agreement[one.mask].min() >= np.float32(1 / 7)
