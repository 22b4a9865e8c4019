"""OpenVINO says what torch says, and where it cannot, torch says it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from made_up_calls import works

from medmap import compiled
from medmap.align import AlignedSegmenter, build_segmenter
from medmap.compiled import Compiled
from medmap.config import AlignConfig, ModelConfig
from medmap.core.box import Box
from medmap.core.case import Prepared
from medmap.core.labels import SCHEMES
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.errors import InputError
from medmap.inference import SubsetAnswer
from medmap.phantom import Settings, simulate
from medmap.predict import Begun, Predictor, resolve_engine
from medmap.run import ModelCard

# Not by importing it: that is for `medmap.compiled` to do, without its telemetry.
pytestmark = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")

CPU = torch.device("cpu")
PAIR = ModalitySet(("t1c", "t2f"))
PLAIN = AlignConfig(anchor="none")
# Sums of products in another order, a few dozen layers deep.
CLOSE = {"rtol": 0, "atol": 2e-3}


def made(name: str = "unet", align: AlignConfig = PLAIN, size: str = "tiny") -> AlignedSegmenter:
    torch.manual_seed(0)
    return build_segmenter(ModelConfig(name=name, size=size), align, GLIOMA_MRI, classes=4).eval()


def images(subset: ModalitySet, *shape: int) -> dict[str, torch.Tensor]:
    return {name: torch.randn(1, 1, *shape) for name in subset}


def by_torch(network: AlignedSegmenter, given: dict[str, torch.Tensor]) -> torch.Tensor:
    kept = torch.tensor([[name in given for name in GLIOMA_MRI]])
    with torch.inference_mode():
        return network.decode(network.encode(given, kept), kept).logits.softmax(dim=1)


@pytest.mark.parametrize("name", ["unet", "rfnet", "mmformer", "uhved"])
def test_a_graph_gives_the_probabilities_of_the_network_for_every_size_and_subset(name: str) -> None:
    network = made(name)
    graphs, stride = Compiled(network, "fp32"), network.stride
    for subset in (ModalitySet(("t2f",)), PAIR):
        for shape in ((2 * stride, 2 * stride, 2 * stride), (3 * stride, 2 * stride, 4 * stride)):
            given = images(subset, *shape)
            torch.testing.assert_close(torch.from_numpy(graphs(given)), by_torch(network, given), **CLOSE)


def test_a_graph_fills_what_is_missing_as_the_network_does() -> None:
    network = made(align=AlignConfig(anchor="pstar", levels=("x4", "x2"), fill="kept"))
    given = images(PAIR, 16, 24, 16)
    torch.testing.assert_close(torch.from_numpy(Compiled(network, "fp32")(given)), by_torch(network, given), **CLOSE)


def test_the_network_itself_stays_as_it_was() -> None:
    network = made()
    layout = [p.stride() for p in network.to(memory_format=torch.channels_last_3d).parameters()]
    Compiled(network, "fp32")(images(PAIR, 16, 16, 16))
    assert [p.stride() for p in network.parameters()] == layout


def test_only_a_few_sizes_stay_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "KEPT", 2)
    graphs = Compiled(made(), "fp32")
    for edge in (16, 24, 32, 16):
        graphs(images(PAIR, edge, 16, 16))
    assert [shape[2] for shape in graphs._graph(PAIR.names)._ready] == [32, 16]


def test_openvino_leaves_nothing_in_the_home_directory(tmp_path: Path) -> None:
    code = "from medmap.compiled import _openvino; print(_openvino().__name__)"
    home = {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=home)
    assert done.stdout == "openvino\n"
    assert list(tmp_path.iterdir()) == []


# ---- in a predictor ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case() -> Any:
    return simulate(3, Settings(spacing_mm=4.0))


def predictor(engine: str, network: AlignedSegmenter | None = None, **how: Any) -> Predictor:
    card = ModelCard(GLIOMA_MRI, SCHEMES["brats2023"], None)
    return Predictor([network or made()], card, precision="fp32", engine=engine, **how)


@pytest.mark.parametrize("mirror", [(), (0, 2)])
def test_the_engines_agree_and_say_so(case: Any, mirror: tuple[int, ...]) -> None:
    graphs, plain = predictor("openvino", mirror=mirror), predictor("torch", mirror=mirror)
    begun = graphs.begin(case)
    one, other = graphs.answer(begun), plain.answer(begun)
    assert one.agreement is not None
    assert one.agreement > 0.999
    assert other.agreement is None
    np.testing.assert_allclose(one.probabilities, other.probabilities, **CLOSE)
    assert (one.probabilities != other.probabilities).any()


def test_a_graph_that_says_something_else_is_not_used(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compiled._Graph.__call__
    monkeypatch.setattr(compiled._Graph, "__call__", lambda self, given: np.roll(whole(self, given), 1, axis=1))
    begun = predictor("torch").begin(case)
    assert same(predictor("auto").answer(begun), predictor("torch").answer(begun))
    with pytest.raises(
        InputError, match=r"[\d.]+ % of the probability to other classes than torch, on a probe of t1n\+"
    ):
        predictor("openvino").answer(begun)


def test_a_network_that_openvino_cannot_run_is_run_by_torch_unless_openvino_was_asked_for(
    case: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def cannot(*_: Any, **__: Any) -> None:
        tried.append(1)
        raise RuntimeError("first line\nno such operation: aten::what")

    monkeypatch.setattr(compiled, "_openvino", lambda: SimpleNamespace(convert_model=cannot))
    chosen = predictor("auto")
    begun = chosen.begin(case)
    assert all(same(chosen.answer(begun), predictor("torch").answer(begun)) for _ in range(2))
    assert len(tried) == 1
    with pytest.raises(InputError, match=r"openvino cannot run UNet \(no such operation: aten::what\); leave --engine"):
        predictor("openvino").answer(begun)


def test_sequences_with_boxes_of_their_own_are_left_to_torch(case: Any) -> None:
    graphs, plain = predictor("openvino"), predictor("torch")
    begun = graphs.begin(case)
    name, image = next(iter(begun.prepared.images.items()))
    half = Box(image.box.start, tuple(a + (b - a) // 2 for a, b in zip(image.box.start, image.box.stop, strict=True)))
    moved = Prepared(**{**vars(begun.prepared), "images": {**begun.prepared.images, name: _cut(image, half)}})
    apart = Begun(begun.grid, moved, begun.used, ())
    assert same(graphs.answer(apart), plain.answer(apart))


def same(one: SubsetAnswer, other: SubsetAnswer) -> bool:
    return one.agreement == other.agreement and np.array_equal(one.probabilities, other.probabilities)


def _cut(image: Any, box: Box) -> Any:
    return type(image)(image.window(box), box)


def test_an_engine_that_cannot_be_had_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_engine("auto", CPU) == "openvino"
    assert resolve_engine("auto", torch.device("cuda")) == "torch"
    assert resolve_engine("torch", CPU) == "torch"
    with pytest.raises(InputError, match="computes on a CPU, not on cuda"):
        resolve_engine("openvino", torch.device("cuda"))
    monkeypatch.setattr(importlib.import_module("medmap.predict"), "find_spec", lambda name: None)
    assert resolve_engine("auto", CPU) == "torch"
    with pytest.raises(InputError, match=r"pip install 'medmap\[cpu\]'"):
        resolve_engine("openvino", CPU)


def test_the_command_names_the_engine_that_answered(tiny_run: Path, tiny_phantoms: Path, tmp_path: Path) -> None:
    patient = "PHANTOM-00000-000"
    image = tiny_phantoms / patient / f"{patient}-t2f.nii.gz"
    for words, engine in (((), "torch"), (("--engine", "openvino", "--precision", "fp32"), "openvino")):
        mask = tmp_path / f"{engine}.nii.gz"
        works("predict", "--model", tiny_run, "--t2f", image, "-o", mask, *words)
        record = json.loads(mask.with_name(f"{engine}.medmap.json").read_text())
        assert record["model"]["engine"] == engine
        assert (record["model"]["engines_agree"] is None) == (engine == "torch")
