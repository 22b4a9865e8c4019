"""The model that comes with medmap: what it says of itself, and that it answers."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from made_up_calls import works
from made_up_scores import scored
from safetensors.numpy import load_file

from medmap.card import SHIPPED, read_model
from medmap.checkpoint import load_network
from medmap.config import load_config
from medmap.core.labels import SCHEMES
from medmap.core.metrics import dice
from medmap.core.modality import GLIOMA_MRI
from medmap.data.cases import read_case
from medmap.data.layouts import recognise
from medmap.phantom import Settings, simulate
from medmap.predict import Predictor
from medmap.robustness import CARD_JSON, CARD_TEXT
from medmap.run import read_run
from medmap.scores import write_scores

PATIENT = "PHANTOM-00000-000"


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor.load(device="cpu")


def test_it_is_small_and_in_half_precision() -> None:
    weights = load_file(SHIPPED / "checkpoints" / "best" / "model.safetensors")
    assert {array.dtype for array in weights.values() if array.dtype.kind == "f"} == {np.dtype("float16")}
    assert sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file()) < 16e6


def test_it_is_what_the_committed_configuration_makes() -> None:
    config, card = read_run(SHIPPED)
    committed = load_config(Path(__file__).parent.parent / "configs" / "phantom.yaml")
    same_precision = committed.train.model_copy(update={"precision": config.train.precision})
    assert config == committed.model_copy(update={"train": same_precision})
    assert config.data.source == "phantom"
    assert card.modalities == GLIOMA_MRI
    assert card.spacing_mm == config.phantom.spacing_mm


def test_it_says_that_it_saw_no_patient_and_what_to_expect() -> None:
    model = read_model()
    assert "trained on simulated patients alone; not a medical device" in model.about
    for subset in GLIOMA_MRI.subsets():
        expected = model.expected("+".join(subset), clean=True)
        assert expected is not None, subset
        assert set(expected["dice"]) == {"WT", "TC", "ET"}
    text = " ".join((SHIPPED / CARD_TEXT).read_text(encoding="utf-8").split())
    assert "on no patient" in text
    assert "Not a medical device" in text
    assert all("+".join(subset) in text for subset in GLIOMA_MRI.subsets())
    four = model.expected("t1n+t1c+t2w+t2f", clean=False)
    assert four is not None
    assert f"| t1n+t1c+t2w+t2f | {100 * four['dice']['WT']['mean']:.0f} [" in text
    made = json.loads((SHIPPED / CARD_JSON).read_text(encoding="utf-8"))["model"]
    assert (made["weights_sha256"], made["parameters"]) == (model.weights_sha256, model.parameters)
    assert model.parameters == sum(p.numel() for p in load_network(SHIPPED).state_dict().values())


def test_its_parts_say_nothing_of_a_machine() -> None:
    for file in SHIPPED.rglob("*"):
        if file.suffix in (".yaml", ".json", ".md"):
            text = file.read_text(encoding="utf-8")
            assert "/tmp" not in text, file
            assert "/home" not in text, file


def test_it_finds_the_tumour_of_a_phantom_it_never_saw(predictor: Predictor) -> None:
    case = simulate(123456789, Settings(spacing_mm=3.0))
    found = predictor.predict(case).classes
    assert case.labels is not None
    assert dice(found > 0, case.labels > 0) > 0.5


@pytest.mark.parametrize("names", [("t2f",), ("t1c", "t2f"), GLIOMA_MRI.names])
def test_it_finds_the_tumours_of_patients(predictor: Predictor, real_data: Path, names: tuple[str, ...]) -> None:
    folder = recognise(real_data / "brats2021-2mm")
    scheme = SCHEMES["brats2021"]
    scores = []
    for files in folder.cases[2:5]:
        case = read_case(files)
        given = type(case)(case.id, {name: case.images[name] for name in names}, case.affine)
        assert case.labels is not None
        truth = scheme.region_mask(scheme.encode(case.labels, case.id), "WT")
        scores.append(dice(predictor.predict(given).classes > 0, truth))
    assert np.mean(scores) > 0.6


def test_predict_uses_it_where_no_model_is_named_and_says_so(tiny_phantoms: Path, tmp_path: Path) -> None:
    image, mask = tiny_phantoms / PATIENT / f"{PATIENT}-t2f.nii.gz", tmp_path / "seg.nii.gz"
    said = works("predict", "--t2f", image, "-o", mask)
    assert "model: the model that comes with medmap, trained on simulated patients alone; not a medical device" in said
    record = json.loads((tmp_path / "seg.medmap.json").read_text())
    assert record["model"]["about"].endswith("not a medical device")
    assert record["expected"]["dice"]["WT"]["n"] > 0


# ---- made again --------------------------------------------------------------------------------------------------


def test_shipping_keeps_the_confidence_of_the_same_weights_and_makes_that_of_others_anew(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ship = _script("ship")
    run, shipped = shutil.copytree(tiny_run, tmp_path / "run"), tmp_path / "shipped"
    monkeypatch.setattr(ship, "SHIPPED", shipped)
    few = [row for n in range(2) for row in scored(f"c{n}", "t1c", "WT", dice=0.5, truth_ml=1.0)]
    write_scores(run, few, GLIOMA_MRI, SCHEMES["brats2023"], "brats", [], {"evaluated": "made-up cases"})
    ship.main(run, run)
    assert "confidence.json: none" in capsys.readouterr().out
    here = shipped / "confidence.json"
    for weights, said, kept in ((read_model(shipped).weights_sha256, "kept", True), ({".": "other"}, "none", False)):
        here.write_text(json.dumps({"weights_sha256": weights, "as": "it was"}))
        ship.main(run, run)
        assert f"confidence.json: {said}" in capsys.readouterr().out
        assert here.is_file() is kept
        assert not kept or json.loads(here.read_text())["as"] == "it was"


def _script(name: str) -> ModuleType:
    """A file of scripts/, which is no package."""
    file = Path(__file__).parents[1] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
