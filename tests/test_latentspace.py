"""Numbers on the latents of a run: which latents they are of, and that each is there for every network."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up_network import bright_voxels, made_up_prepared, tiny_network
from made_up_scores import card_of

from medmap.align import build_segmenter
from medmap.checkpoint import save_checkpoint, untrained_network
from medmap.config import AlignConfig, ModelConfig, load_config
from medmap.core.box import Box, Boxed
from medmap.core.case import Prepared
from medmap.core.modality import GLIOMA_MRI
from medmap.core.spread import effective_rank
from medmap.errors import InputError
from medmap.exhibits import pooled_latents
from medmap.figures import latent_map
from medmap.latentspace import conditional_dependence, latent_numbers, level_numbers, read_latents
from medmap.models import BACKBONES
from medmap.run import write_run

pytest.importorskip("sklearn", reason="numbers on latents need the extra study")

NAMES = tuple(GLIOMA_MRI)
BRAIN = Box((4, 4, 4), (28, 36, 24))


def patient(number: int, names: tuple[str, ...] = NAMES, brain: Box = BRAIN) -> Prepared:
    case = made_up_prepared(dict.fromkeys(names, brain), labels=None, seed=number)
    return Prepared(f"BraTS-GLI-{number:05d}-000", case.grid, case.native, case.images)


@pytest.fixture(scope="module")
def cases() -> list[Prepared]:
    return [patient(0), patient(1), patient(2, NAMES[:2]), patient(3), patient(4)]


def written(run: Path, *settings: str, factor: float = 1.5) -> Path:
    """A run whose best weights are those of its seed, times a factor."""
    config = load_config(None, [*settings, "seed=3"])
    write_run(run, config, card_of())
    torch.manual_seed(3)
    network = build_segmenter(config.model, config.align, GLIOMA_MRI, 4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(factor)
    save_checkpoint(run, "best", {"model": network.state_dict()}, {"step": 1})
    return run


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory, cases: list[Prepared]) -> dict[str, Any]:
    run = written(tmp_path_factory.mktemp("runs") / "unet", "model.size=tiny", "model.stem=non_shared")
    return latent_numbers(run, cases, levels=("stem", "x3"), components=1)


# ---- every network ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_every_level_of_every_network_has_all_numbers(name: str, tmp_path: Path, cases: list[Prepared]) -> None:
    run = written(tmp_path, f"model.name={name}", "model.size=tiny", "align.anchor=none")
    found = latent_numbers(run, cases, components=1)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    strides = build_segmenter(ModelConfig(name=name, size="tiny"), AlignConfig(), GLIOMA_MRI, 4).backbone.strides
    assert {level: one["stride"] for level, one in found["levels"].items()} == dict(strides)
    pairs = [(case.id, m) for case in cases for m in NAMES if m in case.images]
    assert list(zip(found["rows"]["case"], found["rows"]["modality"], strict=True)) == pairs
    for name_of_level, level in found["levels"].items():
        before, after = level["before"], level["after"]
        assert (before["variance"] == after["variance"]) is (name_of_level == "image")  # which nothing learned makes
        assert np.shape(after["map"]["pca"]) == np.shape(after["map"]["tsne"]) == (18, 2)
        assert after["total_correlation"]["subjects"] == 4  # one lacks two sequences
        assert 1 <= after["rank"]["effective"] <= after["rank"]["channels"]
        assert all(0 <= after[key]["accuracy"] <= 1 for key in ("probe", "retrieval"))


def test_levels_of_gaussians_are_read_as_means(cases: list[Prepared]) -> None:
    network = tiny_network(ModelConfig(name="uhved", size="tiny"))
    level = next(iter(network.backbone.strides))
    found = read_latents(network, cases, [level])[level]
    case, name = cases[0], NAMES[0]
    image = torch.from_numpy(case.images[name].window(BRAIN.snapped(network.stride)).astype(np.float32))[None, None]
    with torch.inference_mode():
        whole = network.encode({name: image}, torch.tensor([[True, False, False, False]])).levels[level][name]
    assert found.clouds.points.shape[1] == 8 * whole.shape[1] // 2
    assert len(found.spreads[name].mean) == whole.shape[1] // 2


def test_before_is_what_the_report_calls_untrained(tmp_path: Path) -> None:
    """Where the brain fills whole cells, the mean of the octants is the mean that exhibits pool."""
    brain = Box((8, 8, 8), (24, 40, 24))
    full = [patient(number, brain=brain) for number in range(3)]
    run = written(tmp_path, "model.size=tiny", "align=pstar")
    exhibited = pooled_latents(run, full)
    found = latent_numbers(run, full, levels=["x4"], components=1)["levels"]["x4"]
    ours = read_latents(untrained_network(run), full, ["x4"])["x4"].clouds.points.reshape(12, -1, 8).mean(axis=2)
    np.testing.assert_allclose(ours, exhibited["before"], rtol=1e-4, atol=1e-5)
    assert found["before"]["variance"]["mean"] < found["after"]["variance"]["mean"]


# ---- one point a patient and sequence ---------------------------------------------------------------------------


def test_a_point_is_the_mean_of_each_octant_over_the_brain() -> None:
    """The latents of this network are the images themselves."""
    values = np.zeros((8, 8, 8), np.float16)
    for i in range(8):
        x, y, z = (slice(4 * bit, 4 * bit + 4) for bit in (i >> 2 & 1, i >> 1 & 1, i & 1))
        values[x, y, z] = i + 1
    values[0, 0, 0] = 0  # no brain: does not count
    values[7, 7, 7] = 16
    image = Boxed(values, Box((2, 2, 2), (10, 10, 10)))
    case = made_up_prepared({})
    case = Prepared("one", case.grid, case.native, dict.fromkeys(NAMES, image))
    found = read_latents(bright_voxels(), [case], ["x1"])["x1"]
    np.testing.assert_allclose(found.clouds.points[0], [*range(1, 8), 8 + 8 / 64])
    inside = values[values != 0].astype(float)
    assert found.spreads["t1c"].mean == pytest.approx(inside.mean())
    assert found.spreads["t1c"].covariance[0, 0] == pytest.approx(inside.var())


def test_octants_are_the_same_places_for_all_sequences_of_a_patient() -> None:
    small, large = Box((2, 2, 2), (6, 10, 10)), Box((2, 2, 2), (18, 10, 10))
    case = made_up_prepared({"t1n": small, "t1c": large})
    found = read_latents(bright_voxels(), [case], ["x1"])["x1"].clouds.points[0]
    whole = case.images["t1n"].values.astype(float)
    np.testing.assert_allclose(found[4:], whole.mean())  # it has no brain in the other half: the mean of all
    np.testing.assert_allclose(found[:4].mean(), whole.mean())


def test_patients_are_those_that_the_data_name(cases: list[Prepared]) -> None:
    """Two scans of one patient, under names that do not say so."""
    whose = {case.id: "ann" if number < 2 else case.id for number, case in enumerate(cases)}
    found = read_latents(bright_voxels(), cases, ["x1"], whose)["x1"].clouds
    assert found.patient[:8] == ("ann",) * 8
    assert len(set(found.patient)) == len(cases) - 1


def test_spreads_add_up_over_patients(cases: list[Prepared]) -> None:
    found = read_latents(bright_voxels(), cases, ["x1"])["x1"].spreads["t2w"]
    every = np.concatenate([case.images["t2w"].values.ravel() for case in cases if "t2w" in case.images]).astype(float)
    every = every[every != 0]
    assert found.mean == pytest.approx(every.mean(), abs=1e-9)
    assert found.covariance == pytest.approx(np.array([[every.var()]]))


def test_effective_rank_counts_directions() -> None:
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    assert effective_rank(turn @ np.diag([2, 2, 2, 0, 0, 0]) @ turn.T) == pytest.approx(3)
    assert np.isnan(effective_rank(np.zeros((3, 3))))


def test_two_copies_of_one_image_are_one_distribution_and_pairs() -> None:
    """What perfect alignment would look like in every number."""
    box = Box((4, 4, 4), (20, 20, 20))
    made = [made_up_prepared({"t1n": box}, seed=i) for i in range(8)]
    twins = [
        Prepared(f"BraTS-GLI-{i:05d}-000", c.grid, c.native, dict.fromkeys(NAMES, c.images["t1n"]))
        for i, c in enumerate(made)
    ]
    found = level_numbers(read_latents(bright_voxels(), twins, ["x1"])["x1"], components=1)
    assert found["kl"]["largest"] == pytest.approx(0, abs=1e-12)
    assert found["gap"]["share"] == pytest.approx(0, abs=1e-12)
    assert found["likeness"]["matched"] == pytest.approx(1)
    assert found["retrieval"]["accuracy"] == 1
    assert found["probe"]["accuracy"] <= 0.25
    assert found["mmd"]["mean"] <= 1e-12
    assert found["total_correlation"]["nats"] is None  # without bound: one is a function of the other
    assert found["total_correlation"]["p"] < 0.05


# ---- one patient ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "level", "private"),
    [
        (ModelConfig(size="tiny"), "x4", True),
        (ModelConfig(size="tiny", stem="non_shared"), "stem", True),
        (ModelConfig(size="tiny", stem="joint"), "stem", False),
        (ModelConfig(size="tiny", stem="joint"), "x2", False),
        (ModelConfig(name="uhved", size="tiny"), "x1", True),
    ],
)
def test_given_the_images_no_total_correlation_is_left(model: ModelConfig, level: str, private: bool) -> None:
    found = conditional_dependence(tiny_network(model), patient(0), level)
    assert found["nats"] == pytest.approx(0, abs=1e-12)
    assert found["private"] is private
    assert (found["leak"] < 1e-4) is private
    assert found["gaussian"] is (model.name == "uhved")


def test_a_patient_with_one_sequence_has_nothing_to_depend_on() -> None:
    with pytest.raises(InputError, match="found 1 sequences of the network, expected 2 or more"):
        conditional_dependence(tiny_network(), patient(0, ("t1c",)), "x1")


# ---- the map ----------------------------------------------------------------------------------------------------


def test_the_map_shows_every_patient_and_sequence_four_times(numbers: dict[str, Any]) -> None:
    figure = latent_map(numbers, "stem")
    figure.draw_without_rendering()
    assert len(figure.axes) == 4
    for ax in figure.axes:
        assert sum(len(marks.get_offsets()) for marks in ax.collections) == 18
        assert ax.get_xlabel()
        assert ax.get_ylabel()
    assert "level stem" in figure.axes[0].get_title(loc="left")
    drawn = np.vstack([marks.get_offsets() for marks in figure.axes[1].collections])
    given = np.array(numbers["levels"]["stem"]["after"]["map"]["pca"])
    np.testing.assert_allclose(np.sort(drawn, axis=0), np.sort(given, axis=0))


def test_the_map_is_of_the_deepest_level_where_none_is_named(numbers: dict[str, Any]) -> None:
    assert "level x3" in latent_map(numbers).axes[0].get_title(loc="left")
    with pytest.raises(InputError, match="level: found 'x9', expected one of stem, x3"):
        latent_map(numbers, "x9")


# ---- wrong input ------------------------------------------------------------------------------------------------


def test_what_cannot_be_counted_is_refused(tmp_path: Path, cases: list[Prepared]) -> None:
    run = written(tmp_path / "made-up", "model.size=tiny")
    with pytest.raises(InputError, match="found 1 cases, expected 2 or more"):
        latent_numbers(run, cases[:1])
    with pytest.raises(InputError, match="the network has no x9; it has x1, x2, x3, x4"):
        latent_numbers(run, cases, levels=["x9"])
    strangers = [patient(number, ("adc",)) for number in range(2)]
    with pytest.raises(InputError, match="none has one of t1n, t1c, t2w, t2f"):
        latent_numbers(run, strangers)


def test_without_scikit_learn_nothing_is_encoded(
    tmp_path: Path, cases: list[Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InputError, match=r"pip install 'medmap\[study\]'"):
        latent_numbers(tmp_path / "nowhere", cases)
