"""What is given away answers as the model did, and tells nothing of where it came from."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up_calls import answer, fails, works
from made_up_sizes import MICRO
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from medmap.align import AlignedSegmenter, build_segmenter
from medmap.card import ABOUT_SHIPPED, SHIPPED, read_model
from medmap.confidence import read_confidence
from medmap.config import AlignConfig, ModelConfig
from medmap.core.labels import SCHEMES
from medmap.core.modality import ModalitySet
from medmap.data.nifti import read_labels, read_volume, write_volume
from medmap.errors import InputError
from medmap.export.workflow import PatientNetwork, ReadCase, WriteMask
from medmap.inputs import examine, read_inputs
from medmap.phantom import Settings, simulate
from medmap.predict import Predictor

PAIR = ModalitySet(("t1c", "t2f"))
PATIENT = "PHANTOM-00000-000"
ROOT = Path(__file__).parents[1]
PLAIN = {"anchor": "none"}


def lacks(*packages: str) -> Any:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"{', '.join(absent)} not installed")


needs_onnx = lacks("onnx", "onnxscript", "onnxruntime")
needs_monai = lacks("monai", "ignite")


def made(name: str = "unet", align: dict[str, Any] = PLAIN, size: str = "tiny", **model: Any) -> AlignedSegmenter:
    """A network whose every weight matters: gates, say, start at 0."""
    torch.manual_seed(0)
    network = build_segmenter(ModelConfig(name=name, size=size, **model), AlignConfig(**align), PAIR, classes=3)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return network.eval()


@pytest.fixture
def micro(monkeypatch: pytest.MonkeyPatch) -> str:
    """Few levels of each backbone, with everything that a level has: recording takes time by the level."""
    for name, size in MICRO.items():
        monkeypatch.setitem(import_module(f"medmap.models.{name}").SIZES, "micro", size)
    return "micro"


# ---- graphs -----------------------------------------------------------------------------------------------------


@needs_onnx
@pytest.mark.parametrize("name", ["unet", "mmformer", "acn", "rfnet", "uhved", "pmkl"])
def test_graphs_of_every_backbone_say_what_torch_says_for_every_subset(name: str, micro: str, tmp_path: Path) -> None:
    from medmap.export.graphs import DECODER, encoder_file, record
    from medmap.export.onnx import check, write_graphs

    network = made(name, size=micro)
    write_graphs(record(network), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {DECODER, *map(encoder_file, PAIR)}
    # Sums of products in another order, a few dozen layers deep.
    assert check(network, tmp_path, None, name)["largest_difference"] < 1e-4
    for file in tmp_path.iterdir():
        assert str(ROOT).encode() not in file.read_bytes(), "a place on this machine"


@needs_onnx
@pytest.mark.parametrize(
    ("align", "model"),
    [
        ({"anchor": "pstar", "levels": ["x4", "x2"], "fill": "kept"}, {}),
        (
            {"anchor": "pstar", "levels": ["x3"], "fill": "kept", "weights": "ratio", "scale_at_test": True},
            {"stem": "non_shared"},
        ),
        ({"anchor": "pstar", "levels": ["stem"], "fill": "kept"}, {"stem": "non_shared"}),
        (PLAIN, {"stem": "joint"}),
    ],
    ids=["filled", "scaled", "filled stem", "joint stem"],
)
def test_graphs_fill_and_mix_as_the_network_does(align: Any, model: Any, tmp_path: Path) -> None:
    from medmap.export.graphs import NETWORK, record
    from medmap.export.onnx import check, write_graphs

    network = made("unet", align, **model)
    write_graphs(record(network), tmp_path)
    assert (tmp_path / NETWORK).exists() == (not network.separable)
    assert check(network, tmp_path, None, "unet")["largest_difference"] < 1e-4


@needs_onnx
def test_a_graph_that_says_something_else_is_refused(tmp_path: Path) -> None:
    from onnx import numpy_helper

    from medmap.export.graphs import DECODER, record
    from medmap.export.onnx import check, write_graphs

    network = made()
    graphs = record(network)
    bias = next(tensor for tensor in graphs[DECODER].graph.initializer if tensor.name.endswith("head.bias"))
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32([0.5, 0, 0]), bias.name))
    write_graphs(graphs, tmp_path)
    with pytest.raises(InputError, match=r"on noise with t1c, onnxruntime gives probabilities 0\.\d+ from torch's"):
        check(network, tmp_path, None, "unet")


def test_masks_that_are_free_change_no_answer() -> None:
    from medmap.models.backbone import free_masks

    images = {name: torch.randn(1, 1, 32, 32, 32) for name in PAIR}
    for name in ("unet", "mmformer", "acn", "rfnet", "uhved", "pmkl"):
        network = made(name)
        for kept in (torch.tensor([[True, False]]), torch.tensor([[True, True]])):
            with torch.inference_mode():
                expected = network.decode(network.encode(images, kept), kept).logits
                with free_masks():
                    found = network.decode(network.encode(images, kept), kept).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


# ---- the example of the documentation ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped_graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "graphs"
    works("export", "--to", "onnx", "-o", out)
    return out


@needs_onnx
def test_the_graphs_describe_themselves(shipped_graphs: Path) -> None:
    import onnxruntime

    about = json.loads((shipped_graphs / "graphs.json").read_text(encoding="utf-8"))
    model = read_model()
    assert about["modalities"] == list(model.modalities)
    assert about["spacing_mm"] == model.spacing_mm
    assert about["codes"] == {"background": 0, "ncr": 1, "ed": 2, "et": 3}
    assert about["subsets"] == [str(subset) for subset in model.modalities.subsets()]
    assert about["checked"]["on"] == ["noise", "a simulated patient"]
    assert about["checked"]["largest_difference"] < about["checked"]["tolerance"]
    assert about["licence"] == "Apache-2.0"
    (member,) = about["members"]
    for graph in (member["decoder"], *member["encoders"].values()):
        session = onnxruntime.InferenceSession(shipped_graphs / graph["file"])
        assert {value.name: value.shape for value in session.get_inputs()} == graph["inputs"]
        assert {value.name: value.shape for value in session.get_outputs()} == graph["outputs"]
    t1c = member["encoders"]["t1c"]
    assert t1c["inputs"] == {"t1c": [1, 1, "X", "Y", "Z"]}
    assert list(member["levels"].values()) == [1, 2, 4, 8]
    assert t1c["outputs"]["x4_t1c"] == [1, 96, "X/8", "Y/8", "Z/8"] == member["decoder"]["inputs"]["x4_t1c"]


@needs_onnx
@pytest.mark.parametrize("names", [("t1n", "t1c", "t2w", "t2f"), ("t2f", "t1c")], ids="+".join)
def test_numpy_alone_gives_the_mask_that_medmap_gives(shipped_graphs: Path, names: tuple[str, ...]) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/export.md").read_text("utf-8"), re.S | re.M)
    own: dict[str, Any] = {}
    exec(compile(example, "export.md", "exec"), own)
    case = simulate(3, Settings(spacing_mm=2.0))
    volumes: dict[str, NDArray[Any]] = {name: case.images[name] for name in names}
    predictor = Predictor.load(device="cpu", precision="fp32")
    expected = predictor.predict(type(case)(case.id, volumes, case.affine))
    found = own["segment"](shipped_graphs, volumes)
    assert found.shape == expected.classes.shape
    assert expected.classes.any()
    # brats2023: the codes are the indices of the classes
    assert (found != expected.classes).mean() < 1e-4


# ---- a folder ---------------------------------------------------------------------------------------------------


def test_a_folder_answers_as_the_run_and_names_nobody(tiny_run: Path, tiny_phantoms: Path, tmp_path: Path) -> None:
    out, image = tmp_path / "model", tiny_phantoms / PATIENT / f"{PATIENT}-t2f.nii.gz"
    said = works("export", tiny_run, "--to", "folder", "-o", out, "--licence", "CC-BY-4.0")
    files = {"LICENSE", "README.md", "config.yaml", "model.yaml", "best/state.json", "best/model.safetensors"}
    assert {file.relative_to(out).as_posix().removeprefix("checkpoints/") for file in out.rglob("*.*")} | {
        "LICENSE"
    } == files
    assert f"{out}: 6 files" in said
    assert "SPDX-License-Identifier: CC-BY-4.0" in (out / "LICENSE").read_text()
    masks = []
    for model in (tiny_run, out):
        mask = tmp_path / f"{model.name}.nii.gz"
        works("predict", "--model", model, "--t2f", image, "-o", mask, "--device", "cpu", "--precision", "fp32")
        masks.append(read_labels(mask)[0])
    np.testing.assert_array_equal(*masks)
    for file in out.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        assert b"PHANTOM-0" not in content, file
        assert str(tiny_run.parent).encode() not in content, file


def test_folds_go_together(tiny_run: Path, tmp_path: Path) -> None:
    folds = tmp_path / "folds"
    for fold in ("fold0", "fold1"):
        shutil.copytree(tiny_run, folds / fold)
    works("export", folds, "--to", "folder", "-o", tmp_path / "model", "--licence", "MIT")
    assert [run.name for run in read_model(tmp_path / "model").runs] == ["fold0", "fold1"]
    assert len(Predictor.load(tmp_path / "model", device="cpu").networks) == 2


def test_what_comes_with_medmap_keeps_its_words_and_its_licence(tmp_path: Path) -> None:
    works("export", "--to", "folder", "-o", tmp_path / "model")
    assert (tmp_path / "model" / "card.md").read_text() == (SHIPPED / "card.md").read_text()
    assert "trained on simulated patients alone" in (tmp_path / "model" / "README.md").read_text()
    assert "Apache-2.0" in (tmp_path / "model" / "LICENSE").read_text()
    expected = read_model().expected("t1c+t2f", clean=True)
    assert read_model(tmp_path / "model").expected("t1c+t2f", clean=True) == expected
    assert read_model(tmp_path / "model").about == ABOUT_SHIPPED
    assert read_confidence(read_model(tmp_path / "model")) == read_confidence(read_model())
    works("export", tmp_path / "model", "--to", "folder", "-o", tmp_path / "again")
    assert "Apache-2.0" in (tmp_path / "again" / "LICENSE").read_text()
    assert (tmp_path / "again" / "confidence.json").is_file()


def test_measurements_of_other_weights_stay_behind(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED, tmp_path / "run")
    weights = tmp_path / "run" / "checkpoints" / "best" / "model.safetensors"
    save_file({name: 2 * value for name, value in load_file(weights).items()}, weights)
    works("export", tmp_path / "run", "--to", "folder", "-o", tmp_path / "model")
    assert not {"card.json", "card.md", "card.png", "summary.json", "confidence.json"} & {
        file.name for file in (tmp_path / "model").iterdir()
    }
    said = (tmp_path / "model" / "README.md").read_text()
    assert "Nobody has measured these weights on held-out patients." in said
    assert "the model that comes with medmap" not in said


def test_without_a_licence_it_says_so(tiny_run: Path, tmp_path: Path) -> None:
    plan = answer("export", tiny_run, "--to", "folder", "-o", tmp_path / "model", "--dry-run")
    assert plan["dry_run"]
    assert plan["networks"] == 1
    assert not list(tmp_path.iterdir())
    done = answer("export", tiny_run, "--to", "folder", "-o", tmp_path / "model")
    assert sum(done["files"].values()) == sum(f.stat().st_size for f in (tmp_path / "model").rglob("*") if f.is_file())
    assert (tmp_path / "model" / "LICENSE").read_text().startswith("No licence was given")


# ---- a bundle ---------------------------------------------------------------------------------------------------

BY_MONAI = """
import sys, torch, monai.bundle
root, data, out = sys.argv[1:]
from pathlib import Path
monai.bundle.run(bundle_root=root, config_file=f"{root}/configs/inference.json", dataset_dir=data, output_dir=out)
network = monai.bundle.load(Path(root).name, bundle_dir=Path(root).parent, workflow_type="inference")
print(tuple(network(torch.randn(1, 4, 20, 18, 16)).shape))
"""


@needs_monai
def test_monai_runs_a_bundle_to_the_mask_that_medmap_gives(tiny_run: Path, tiny_phantoms: Path, tmp_path: Path) -> None:
    bundle, out = tmp_path / "bundle", tmp_path / "out"
    works("export", tiny_run, "--to", "bundle", "-o", bundle, "--licence", "MIT")
    patients = tmp_path / "patients"
    shutil.copytree(tiny_phantoms, patients)
    (patients / PATIENT / f"{PATIENT}-t1n.nii.gz").unlink()
    words = [sys.executable, "-c", BY_MONAI, bundle, patients, out]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("(1, 4, 20, 18, 16)")
    works("predict", "--model", tiny_run, "-i", patients, "-o", tmp_path / "own", "--engine", "torch")
    masks = sorted(file.name for file in out.iterdir())
    assert masks == sorted(file.name for file in (tmp_path / "own").glob("*.nii.gz"))
    assert len(masks) == 3
    for name in masks:
        np.testing.assert_array_equal(read_labels(out / name)[0], read_labels(tmp_path / "own" / name)[0])
    assert str(tiny_run.parent) not in "".join(file.read_text() for file in (bundle / "configs").iterdir())


def two_sequences() -> PatientNetwork:
    network = {"modalities": ["t1c", "t2f"], "labels": SCHEMES["brats2023"].to_dict(), "spacing_mm": None}
    return PatientNetwork({"name": "unet", "size": "tiny"}, PLAIN, **network)


def test_a_bundle_looks_at_images_as_predict_does(tiny_phantoms: Path, tmp_path: Path) -> None:
    images = {name: tiny_phantoms / PATIENT / f"{PATIENT}-{name}.nii.gz" for name in PAIR}
    volume, affine = read_volume(images["t1c"])
    read, at = ReadCase(two_sequences()), tmp_path / "at.nii.gz"
    write_volume(at, np.where(volume > volume.max() / 2, np.nan, volume), affine)
    with pytest.raises(InputError) as told:
        examine(read_inputs({**images, "t1c": at}, id="ann"))
    with pytest.raises(InputError, match=re.escape(str(told.value))):
        read({"id": "ann", "images": {**images, "t1c": at}})
    write_volume(at, volume + 100, affine)
    with pytest.warns(UserWarning, match=r"ann: .*the background is 100, 0 is expected"):
        read({"id": "ann", "images": {"t1c": at}})


def test_an_id_leads_a_bundle_to_no_other_folder(tiny_phantoms: Path, tmp_path: Path) -> None:
    network, like = two_sequences(), tiny_phantoms / PATIENT / f"{PATIENT}-t1c.nii.gz"
    pred = torch.zeros(4, *read_labels(like)[0].shape)
    WriteMask(network, tmp_path / "out")({"id": "../../evil", "like": str(like), "pred": pred})
    (mask,) = tmp_path.rglob("*.nii.gz")
    assert mask == tmp_path / "out" / "..%2F..%2Fevil.nii.gz"


@needs_monai
def test_the_metadata_of_a_bundle_are_what_monai_asks_for(tiny_run: Path, tmp_path: Path) -> None:
    from monai.bundle.properties import InferProperties, MetaProperties

    works("export", tiny_run, "--to", "bundle", "-o", tmp_path / "bundle", "--licence", "MIT")
    for name, properties in (("inference", InferProperties), ("metadata", MetaProperties)):
        tree = json.loads((tmp_path / "bundle" / "configs" / f"{name}.json").read_text(encoding="utf-8"))
        for about in properties.values():
            found: Any = tree
            for part in about["id"].removeprefix("_meta_::").split("::") if about["required"] else ():
                assert part in found, about
                found = found[part]
    # What the specification of bundles calls required.
    for key in ("version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version"):
        assert tree[key], key
    for key in ("task", "description", "authors", "copyright", "network_data_format"):
        assert tree[key], key
    assert tree["network_data_format"]["inputs"]["image"]["channel_def"]["0"] == "t1n"


def test_unlike_folds_are_no_bundle(tiny_run: Path, tmp_path: Path) -> None:
    folds = tmp_path / "folds"
    for fold in ("fold0", "fold1"):
        shutil.copytree(tiny_run, folds / fold)
    config = folds / "fold1" / "config.yaml"
    config.write_text(config.read_text().replace("et_min_ml: 0.5", "et_min_ml: 0.2"))
    assert "a bundle holds one kind" in fails("export", folds, "--to", "bundle", "-o", tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


# ---- what is refused --------------------------------------------------------------------------------------------


def test_what_cannot_be_exported_is_refused_with_the_cure(tiny_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    assert "does not exist; expected a run folder" in fails("export", tmp_path / "no", "--to", "folder", "-o", out)
    assert "no run in it" in fails("export", tmp_path, "--to", "folder", "-o", out)
    assert "is there already" in fails("export", tiny_run, "--to", "folder", "-o", tmp_path)
    words = ("export", tiny_run, "--to", "folder", "-o", out, "--licence")
    assert "no such file, and no name of a licence" in fails(*words, "my licence.txt")
    shutil.copytree(tiny_run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("steps: 2", "steps: 9"))
    said = fails("export", tmp_path / "run", "--to", "folder", "-o", out)
    assert "stopped at step 2 of 9; a finished run is expected. Go on with `medmap train --resume" in said
    fails("export", tiny_run, "--to", "paper", "-o", out, code=2)
    assert not out.exists()


def test_nothing_is_left_behind_where_it_fails(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medmap.export.folder._write_member", full)
    said = fails("export", tiny_run, "--to", "folder", "-o", tmp_path / "model", "--licence", "MIT")
    assert "cannot be written (No space left on device)" in said
    assert not list(tmp_path.iterdir())
