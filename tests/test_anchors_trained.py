"""Anchors in a network: trained with really absent sequences, resumed, on several processes, filled in, recorded."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from made_up_network import made_up_prepared, tiny_network
from made_up_processes import in_two_processes, trained
from made_up_training import (
    THREE,
    Interrupted,
    config,
    equal,
    interrupt_at,
    patients,
    quick_and_exact,
    rows,
    state,
    tensors,
)
from torch import Tensor

from medmap.align import build_segmenter
from medmap.anchors import GatedMixture, MovingMoments, PrecisionWeighted, alignment_loss
from medmap.checkpoint import load_network
from medmap.config import FILLING, AlignConfig, ModelConfig
from medmap.core.box import Box
from medmap.core.gaussian import Gaussian
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.data.store import Store
from medmap.errors import ConfigError
from medmap.inference import answer_subsets
from medmap.predict import answerable
from medmap.train import fit

NEW = ("precision", "moments", "ema", "gated", "lckd")
PAIR = ModalitySet(("t1c", "t2f"))
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    with quick_and_exact():
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Five patients; several lack sequences."""
    return patients(tmp_path_factory.mktemp("store"), 5, seed=5, missing=0.2)


def network(anchor: str, name: str = "unet", modalities: ModalitySet = PAIR, stem: str = "none", **align: Any) -> Any:
    """Of weights that have left their start."""
    model = ModelConfig(name=name, size="tiny", stem=stem)
    made = tiny_network(model, AlignConfig(anchor=anchor, **align), modalities)
    made.elect({"t1c": 0.5})
    return made


def batch(modalities: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(2, modalities, 16, 16, 16, generator=torch.Generator().manual_seed(seed))


ALL, ONE = torch.tensor([[True, True], [True, True]]), torch.tensor([[True, False], [False, True]])


# ---- training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("anchor", "names"), list(product(NEW, (["t1c", "t2f"], list(GLIOMA_MRI)))), ids=str)
def test_training_goes_on_where_it_was_interrupted(store: Store, tmp_path: Path, anchor: str, names: list[str]) -> None:
    settings = config(
        data__modalities=names,
        align={"anchor": anchor, "levels": ["x3", "x4"]},
        train__steps=2,
        train__validate_every=1,
        train__checkpoint_every=1,
        train__warmup_steps=0,
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(settings, store, whole, device="cpu")
    with pytest.raises(Interrupted):
        fit(settings, store, parts, device="cpu", on_row=interrupt_at("train", 2))
    assert state(parts, "last")["step"] == 1
    fit(settings, store, parts, device="cpu", resume=True)
    for stem in ("model", "ema", "optimizer"):
        assert equal(tensors(whole, "last", stem), tensors(parts, "last", stem))
    assert equal(tensors(whole, "best", "model"), tensors(parts, "best", "model"))
    first, second = rows(whole, "train")
    for name in ("align/x3", "align/x4"):
        assert math.isfinite(second["terms"][name])
        assert second["terms"][name] > 0
    assert (first["terms"]["align/x4"] == 0) == (anchor == "lckd")  # whose teacher is elected after the first step
    assert ("log_var" in second["latents"]["x4"]) == (anchor == "precision")
    assert set(second["weights"]) == (set() if anchor in ("precision",) else {"x3", "x4"})
    for w in second["weights"].values():
        assert list(w) == names
        assert sum(w.values()) == pytest.approx(1, abs=1e-6)


def test_a_trained_teacher_is_the_best_of_the_last_validation(store: Store, tmp_path: Path) -> None:
    settings = config(align={"anchor": "lckd"}, train__steps=2, train__validate_every=1)
    fit(settings, store, tmp_path / "run", device="cpu")
    (first, last) = rows(tmp_path / "run", "val")
    for row, when in ((last, "last"), (first if first.get("best") and not last.get("best") else last, "best")):
        alone = {name: sum(row["subsets"][name].values()) for name in THREE if name in row["subsets"]}
        found = load_network(tmp_path / "run", when).anchor_weights()["x4"]
        assert alone[max(found, key=lambda name: found[name])] == max(alone.values())


def test_without_anybody_who_validates_there_is_no_teacher(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lckd elects its teacher by validation, and no patient validates; raise"):
        fit(config(align={"anchor": "lckd"}, data__val_fraction=0), store, tmp_path / "run", device="cpu")


def test_two_processes_have_the_anchors_of_one(store: Store, tmp_path: Path) -> None:
    """One anchor from the rows of both, and one teacher."""
    short = {"train__steps": 3, "train__validate_every": 2, "train__optimizer": "sgd", "train__momentum": 0.9}
    data = {"modalities": THREE, "folds": 5, "val_fraction": 0.5}
    chosen = {name: config(align={"anchor": name}, data=data, **short) for name in ("ema", "gated", "lckd", "moments")}
    one, two = ([(each, tmp_path / which / name) for name, each in chosen.items()] for which in ("one", "two"))
    in_two_processes(trained, store.path, two)
    trained(store.path, one)
    for (_, here), (_, there) in zip(one, two, strict=True):
        for a, b in zip(rows(here, "train"), rows(there, "train"), strict=True):
            assert b["terms"] == pytest.approx(a["terms"], rel=5e-5), here.name
        mine, theirs = tensors(here, "last", "model"), tensors(there, "last", "model")
        for key in mine:
            torch.testing.assert_close(theirs[key], mine[key], rtol=1e-5, atol=1e-5)
        if here.name == "ema":
            assert int(theirs["anchors.x4.batches"]) == 3
            assert mine["anchors.x4.mean"].abs().max() > 0.01


# ---- samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", ["none", "non_shared", "joint"])
def test_a_learned_variance_is_sampled_in_training_and_not_at_test(stem: str) -> None:
    net = network("precision", stem=stem, levels=("x4",) if stem == "none" else ("stem", "x4"))
    with torch.no_grad():
        first, second = (net.train()(batch(), ALL, ONE).logits for _ in range(2))
        assert (first - second).abs().max() > 1e-3
        first, second = (net.eval()(batch(), ALL, ONE).logits for _ in range(2))
        assert torch.equal(first, second)


def test_the_criterion_reaches_variances_through_samples_and_the_loss_is_about_means() -> None:
    net = network("precision").train()
    out = net(batch(), ALL, ONE)
    heads = list(net.anchors["x4"].heads.parameters())
    assert all(bool(g.any()) for g in torch.autograd.grad(out.logits.square().mean(), heads, retain_graph=True))
    encoded = net.encode({"t1c": batch()[:, :1], "t2f": batch()[:, 1:]}, ALL)
    means = torch.stack([encoded.levels["x4"][name] for name in PAIR], dim=1)
    torch.testing.assert_close(out.latents["x4"], means)
    torch.testing.assert_close(out.losses["align/x4"], alignment_loss(means, net.anchors["x4"], ALL))


def test_what_is_absent_or_filled_in_gets_no_noise() -> None:
    """A filled latent is the anchor's mean, made of means; the latent of an absent sequence stays 0."""
    net, given = network("precision", fill="kept").train(), []
    seen = torch.tensor([[True, True], [True, False]])
    decode = net.backbone.decode
    net.backbone.decode = lambda encoded, kept: given.append(encoded) or decode(encoded, kept)
    encoded = net.encode({"t1c": batch()[:, :1], "t2f": batch()[:, 1:]}, seen)
    net.decode(encoded, torch.tensor([[True, False], [True, False]]), seen)
    (filled,) = given
    torch.testing.assert_close(filled.levels["x4"]["t2f"], encoded.levels["x4"]["t1c"])
    assert (filled.levels["x4"]["t1c"] - encoded.levels["x4"]["t1c"]).abs().max() > 0.1
    net.fill = "none"
    net.decode(encoded, torch.tensor([[True, False], [True, False]]), seen)
    assert not given[1].levels["x4"]["t2f"][1].any()
    assert (given[1].levels["x4"]["t2f"][0] - encoded.levels["x4"]["t2f"][0]).abs().max() > 0.1


def test_a_network_whose_latents_are_gaussian_brings_its_own_variances() -> None:
    net = network("precision", name="uhved").train()
    assert isinstance(net.anchors["x4"], PrecisionWeighted)
    assert len(net.anchors["x4"].heads) == 0
    out = net(batch(), ALL, ONE)
    own = Gaussian.split(out.latents["x4"], dim=2)
    torch.testing.assert_close(out.losses["align/x4"], alignment_loss(own.mean, PrecisionWeighted(2), ALL, own.log_var))
    assert net.anchor_log_var()["x4"] == pytest.approx(own.log_var.mean().item(), abs=1e-5)
    assert network("precision", name="uhved", levels=("stem",), stem="non_shared").anchors["stem"].heads


# ---- any network, at test ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "anchor"),
    [
        (name, anchor)
        for name in ("unet", "mmformer", "rfnet", "acn", "pmkl", "uhved")
        for anchor in NEW
        if (name, anchor) != ("pmkl", "precision")  # refused, see test_pmkl
    ],
)
def test_every_network_can_be_aligned_at_each_of_its_levels(name: str, anchor: str) -> None:
    edge = 32 if name == "mmformer" else 16
    net = network(anchor, name, levels=tuple(network("none", name).backbone.strides)).train()
    images = torch.randn(2, 2, edge, edge, edge)
    out = net(images, ALL, ALL if name == "pmkl" else ONE)
    loss = sum(out.losses[f"align/{level}"] for level in net.anchors)
    assert set(net.anchors) == set(net.backbone.strides)
    assert bool(loss.isfinite())
    assert bool(loss > 0)
    for level, anchored in net.anchors.items():
        width = out.latents[level].shape[2] // (2 if name == "uhved" else 1)
        if isinstance(anchored, MovingMoments):
            assert (int(anchored.batches), len(anchored.mean)) == (1, width)
        if isinstance(anchored, GatedMixture):
            assert len(anchored.gate) == width


@pytest.mark.parametrize(
    ("anchor", "fill"),
    [(anchor, fill) for anchor in NEW for fill in ("none", "kept") if fill == "none" or anchor in FILLING],
)
def test_a_prediction_of_each_subset_is_that_of_its_images_alone(anchor: str, fill: str) -> None:
    """Each sequence is encoded once, and what is not asked for has no influence."""
    net, calls = network(anchor, fill=fill, modalities=GLIOMA_MRI), []
    boxes = {
        "t1c": Box((8, 8, 8), (24, 24, 24)),
        "t2w": Box((0, 8, 8), (16, 24, 32)),
        "t2f": Box((8, 8, 0), (24, 32, 24)),
    }
    case = made_up_prepared(boxes)
    for name, encoder in net.backbone.encoders.items():
        encoder.register_forward_hook(lambda *_, name=name: calls.append(name))
    answers = {str(a.subset): a for a in answer_subsets(net, case, answerable([net], case.images))}
    assert sorted(calls) == sorted(case.images)
    for name in case.images:
        (alone,) = answer_subsets(net, case, [ModalitySet((name,))])
        torch.testing.assert_close(
            torch.from_numpy(answers[name].probabilities), torch.from_numpy(alone.probabilities), **CLOSE
        )


def test_a_network_that_fills_is_recorded_and_compiled_as_it_is(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pytest.importorskip("openvino")
    from medmap.compiled import Compiled
    from medmap.export.graphs import record
    from medmap.export.onnx import check, write_graphs

    one, other = (network(anchor, fill="kept", levels=("x3", "x4")) for anchor in ("gated", "precision"))
    one.anchors["x4"] = other.anchors["x4"]
    write_graphs(record(one), tmp_path)
    assert check(one, tmp_path, None, "unet")["largest_difference"] < 1e-4
    compiled = Compiled(one, "fp32")
    compiled({"t2f": batch()[:1, :1]})
    assert compiled.agreement(("t2f",)) > 0.99


# ---- what does not go together -----------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", ["moments", "ema", "lckd"])
def test_what_has_no_value_for_every_element_fills_nothing(anchor: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"align: fill: kept needs an anchor .* found anchor: {anchor}, take pstar, pk"
    ):
        config(align={"anchor": anchor, "fill": "kept"})


@pytest.mark.parametrize("anchor", NEW)
def test_the_published_scale_at_test_is_of_the_published_anchors(anchor: str) -> None:
    with pytest.raises(ConfigError, match=rf"scale_at_test is of the published anchors; {anchor} has no weights"):
        config(align={"anchor": anchor, "scale_at_test": True})


def test_asking_a_network_for_its_channels_leaves_no_trace() -> None:
    """The same weights, the same random state, and training mode as before."""
    found = []
    for anchor in ("gated", "uniform"):
        torch.manual_seed(0)
        net = build_segmenter(ModelConfig(name="acn", size="tiny"), AlignConfig(anchor=anchor), PAIR, 4)
        found.append((copy.deepcopy(net.backbone.state_dict()), torch.get_rng_state(), net.training))
    assert equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2]
