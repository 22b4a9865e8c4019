from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_up_network import bright_voxels, made_up_prepared, mirrored, tiny_network
from torch import Tensor
from torch.nn import functional as F

from medmap import inference
from medmap.align import AlignedSegmenter, build_segmenter
from medmap.checkpoint import save_checkpoint
from medmap.config import AlignConfig, Config, ModelConfig, parse_config
from medmap.core.box import Box, Boxed
from medmap.core.case import Case, Prepared
from medmap.core.labels import SCHEMES
from medmap.core.metrics import postprocess
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.core.witnesses import Witnesses
from medmap.data.preprocess import prepare_case, restore
from medmap.errors import CheckpointError, InputError
from medmap.inference import SubsetAnswer, Windows, answer_subsets, network_device, pass_memory
from medmap.models.backbone import Decoded, Encoded
from medmap.models.blocks import placed
from medmap.phantom import Settings, simulate
from medmap.predict import Predictor, resolve_device, resolve_precision
from medmap.run import ModelCard, write_run
from medmap.scores import score_classes

GLIOMA = SCHEMES["brats2023"]
ALL = GLIOMA_MRI.subsets()
TINY = ModelConfig(size="tiny")
STRIDE = 8

NETWORKS: dict[str, tuple[ModelConfig, AlignConfig]] = {
    "plain": (TINY, AlignConfig(anchor="none")),
    "filled": (TINY, AlignConfig(anchor="pstar", levels=("x4", "x2"), fill="kept")),
    "private stem": (ModelConfig(size="tiny", stem="non_shared"), AlignConfig(anchor="pstar", levels=("stem",))),
    "filled stem": (
        ModelConfig(size="tiny", stem="enhanced"),
        AlignConfig(anchor="pstar", levels=("stem",), fill="kept"),
    ),
    "joint stem": (ModelConfig(size="tiny", stem="joint"), AlignConfig(anchor="pstar", levels=("stem",))),
    "published": (
        ModelConfig(size="tiny", stem="joint", stem_published=True),
        AlignConfig(anchor="pstar", levels=("stem",), fill="seen", weights="ratio", scale_at_test=True),
    ),
}
SEPARABLE = ("plain", "filled", "private stem")

BOXES = {
    "t1n": Box((3, 2, 5), (16, 15, 14)),
    "t1c": Box((9, 10, 1), (23, 22, 15)),
    "t2w": Box((2, 1, 9), (12, 23, 21)),
    "t2f": Box((9, 1, 10), (13, 5, 14)),  # smaller than the network's coarsest voxel
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def networks() -> dict[str, AlignedSegmenter]:
    return {name: tiny_network(*settings) for name, settings in NETWORKS.items()}


@pytest.fixture(scope="module")
def plain(networks: dict[str, AlignedSegmenter]) -> AlignedSegmenter:
    return networks["plain"]


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return made_up_prepared(BOXES)


@pytest.fixture(scope="module")
def phantom() -> Case:
    return simulate(3, Settings(spacing_mm=4.0))


def answers(network: AlignedSegmenter, patient: Prepared, subsets: list[ModalitySet], **how: Any) -> list[SubsetAnswer]:
    return list(answer_subsets(network, patient, subsets, **how))


def answer(network: AlignedSegmenter, patient: Prepared, subset: ModalitySet, **how: Any) -> SubsetAnswer:
    return answers(network, patient, [subset], **how)[0]


def same(one: SubsetAnswer, other: SubsetAnswer) -> bool:
    return one.box == other.box and np.array_equal(one.probabilities, other.probabilities)


def with_only(patient: Prepared, subset: ModalitySet) -> Prepared:
    return replace(patient, images={name: patient.images[name] for name in subset})


def with_others_changed(patient: Prepared, subset: ModalitySet) -> Prepared:
    """Other scans in place of those that are not in the subset: other voxels, other boxes, other order."""
    others = made_up_prepared({n: Box((0, 0, 0), (39, 33, 37)) for n in GLIOMA_MRI if n not in subset}, seed=99)
    return replace(patient, images={**others.images, **with_only(patient, subset).images})


# ---- the leakage law ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_not_asked_for_might_as_well_not_exist(
    networks: dict[str, AlignedSegmenter], prepared: Prepared, name: str, precision: str
) -> None:
    network = networks[name]
    subsets = ALL if name == "plain" else ALL[1::3]
    for subset, found in zip(subsets, answers(network, prepared, subsets, precision=precision), strict=True):
        assert found.subset == subset
        assert same(found, answer(network, with_only(prepared, subset), subset, precision=precision)), subset
        assert same(found, answer(network, with_others_changed(prepared, subset), subset, precision=precision)), subset


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_asked_for_counts(networks: dict[str, AlignedSegmenter], prepared: Prepared, name: str) -> None:
    everything = answer(networks[name], prepared, GLIOMA_MRI)
    for sequence in GLIOMA_MRI:
        image = prepared.images[sequence]
        images = {**prepared.images, sequence: Boxed(-image.values, image.box)}
        changed = answer(networks[name], replace(prepared, images=images), GLIOMA_MRI)
        assert np.abs(changed.probabilities - everything.probabilities).max() > 1e-4, sequence


def test_a_file_taken_away_and_a_file_declared_missing_give_one_mask(plain: AlignedSegmenter, phantom: Case) -> None:
    whole = prepare_case(phantom, None)
    predictor = Predictor([plain], ModelCard(GLIOMA_MRI, GLIOMA, None), precision="fp32", et_min_ml=0)
    for subset in (GLIOMA_MRI.parse("t1c"), GLIOMA_MRI.parse("t2w+t2f")):
        taken_away = Case("p", {name: phantom.images[name] for name in subset}, phantom.affine)
        (declared,) = predictor.answers(whole, [subset])
        expected = restore(declared.on_grid(whole.grid.shape), whole).argmax(axis=0)
        assert np.array_equal(predictor.predict(taken_away).classes, expected)


# ---- encoded once, decoded many times ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS)
def test_only_a_stem_that_mixes_or_is_filled_has_to_be_encoded_for_every_subset(
    networks: dict[str, AlignedSegmenter], name: str
) -> None:
    assert networks[name].separable == (name in SEPARABLE)


@pytest.mark.parametrize("name", SEPARABLE)
def test_every_sequence_is_encoded_once(
    networks: dict[str, AlignedSegmenter], prepared: Prepared, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, encode, asked = networks[name], networks[name].encode, []

    def counted(images: dict[str, Tensor], *masks: Tensor) -> Any:
        asked.append(tuple(images))
        return encode(images, *masks)

    monkeypatch.setattr(network, "encode", counted)
    together = answers(network, prepared, ALL)
    assert asked == [(sequence,) for sequence in GLIOMA_MRI]
    assert all(same(found, answer(network, prepared, found.subset)) for found in together)


def by_hand(network: AlignedSegmenter, patient: Prepared, subset: ModalitySet) -> tuple[Box, np.ndarray]:
    """Each sequence through its encoder on its own box; zeros around its latents up to the union; one decoder."""
    boxes = {}
    for name in subset:
        box = patient.images[name].box
        start = [a // STRIDE * STRIDE for a in box.start]
        stop = [max(-(-b // STRIDE) * STRIDE, a + 2 * STRIDE) for a, b in zip(start, box.stop, strict=True)]
        boxes[name] = Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2]))
    low = np.min([box.start for box in boxes.values()], axis=0)
    high = np.max([box.stop for box in boxes.values()], axis=0)
    levels: dict[str, dict[str, Tensor]] = {level: {} for level in network.backbone.strides}
    for name, box in boxes.items():
        full = np.zeros([64] * 3, np.float32)
        full[patient.images[name].box.slices] = patient.images[name].values
        image = torch.from_numpy(full[box.slices])[None, None]
        mask = torch.tensor([[other == name for other in GLIOMA_MRI]])
        encoded = network.backbone.encode({name: image}, mask)
        for level, stride in network.backbone.strides.items():
            around = [
                int(n) // stride
                for axis in (2, 1, 0)
                for n in (box.start[axis] - low[axis], high[axis] - box.stop[axis])
            ]
            levels[level][name] = F.pad(encoded.levels[level][name], around)
    kept = torch.from_numpy(subset.mask(GLIOMA_MRI))[None]
    size = tuple(int(n) for n in high - low)
    logits = network.backbone.decode(replace(encoded, levels=levels, size=size), kept).logits
    return Box(tuple(low.tolist()), tuple(high.tolist())), logits.softmax(dim=1)[0].numpy()


@torch.inference_mode()
def test_the_answer_is_that_of_own_boxes_joined_by_hand(plain: AlignedSegmenter, prepared: Prepared) -> None:
    for subset in ALL:
        found, (box, expected) = answer(plain, prepared, subset), by_hand(plain, prepared, subset)
        assert found.box == box
        assert np.array_equal(found.probabilities, expected), subset


def test_a_subset_is_answered_on_the_union_of_its_own_boxes(plain: AlignedSegmenter, prepared: Prepared) -> None:
    def box(text: str) -> Box:
        return answer(plain, prepared, GLIOMA_MRI.parse(text)).box

    assert box("t1n") == Box((0, 0, 0), (16, 16, 16))
    assert box("t1c") == Box((8, 8, 0), (24, 24, 16))
    assert box("t1n+t1c") == Box((0, 0, 0), (24, 24, 16))
    # 4 voxels wide: two strides from where its lattice cell begins
    assert box("t2f") == Box((8, 0, 8), (24, 16, 24))


def test_probabilities_are_probabilities(plain: AlignedSegmenter, prepared: Prepared) -> None:
    found = answer(plain, prepared, GLIOMA_MRI, mirror=(0, 1))
    assert found.probabilities.dtype == np.float32
    assert found.probabilities.shape == (4, *found.box.shape)
    assert found.probabilities.min() >= 0
    np.testing.assert_allclose(found.probabilities.sum(axis=0), 1, atol=1e-5)


# ---- mirrors -----------------------------------------------------------------------------------------------------

WIDE = {**BOXES, "t2f": Box((9, 1, 10), (23, 15, 23))}


@pytest.mark.parametrize(
    ("name", "mirror"), [("plain", (0, 1, 2)), ("plain", (2, 1)), ("filled", (0,)), ("joint stem", (0,))]
)
def test_mirroring_is_the_mean_over_the_answers_to_all_mirror_images(
    networks: dict[str, AlignedSegmenter], name: str, mirror: tuple[int, ...]
) -> None:
    network, patient = networks[name], made_up_prepared(WIDE)
    subset, each = GLIOMA_MRI.parse("t1c+t2w+t2f"), []
    for size in range(len(mirror) + 1):
        for axes in combinations(sorted(mirror), size):
            flipped = answer(network, mirrored(patient, axes), subset)
            each.append(np.flip(flipped.probabilities, [axis + 1 for axis in axes]))
    found = answer(network, patient, subset, mirror=mirror)
    np.testing.assert_allclose(found.probabilities, np.mean(each, axis=0), atol=1e-6)
    assert np.abs(found.probabilities - each[0]).max() > 1e-3


@pytest.mark.parametrize("axes", [(0,), (1,), (2,), (0, 2)])
def test_a_mirrored_patient_gets_the_mirrored_answer(plain: AlignedSegmenter, axes: tuple[int, ...]) -> None:
    patient, subset = made_up_prepared(WIDE), GLIOMA_MRI.parse("t1n+t2w+t2f")
    found = answer(plain, patient, subset, mirror=axes).on_grid((40, 40, 40))
    flipped = answer(plain, mirrored(patient, axes), subset, mirror=axes).on_grid((40, 40, 40))
    np.testing.assert_allclose(np.flip(flipped, [axis + 1 for axis in axes]), found, atol=1e-6)


def test_an_axis_named_twice_counts_once(plain: AlignedSegmenter, prepared: Prepared) -> None:
    subset = GLIOMA_MRI.parse("t1n")
    assert same(answer(plain, prepared, subset, mirror=(0,)), answer(plain, prepared, subset, mirror=(0, 0)))


# ---- on the grid, and home to the file's grid --------------------------------------------------------------------


def test_outside_the_box_is_background() -> None:
    inside = np.zeros((4, 2, 2, 2), np.float32)
    inside[2] = 1
    full = SubsetAnswer(GLIOMA_MRI, Box((1, 0, 2), (3, 2, 4)), inside).on_grid((4, 3, 5))
    classes = np.zeros((4, 3, 5), int)
    classes[1:3, 0:2, 2:4] = 2
    assert np.array_equal(full.argmax(axis=0), classes)
    assert np.array_equal(full.sum(axis=0), np.ones((4, 3, 5)))


def test_a_box_that_reaches_past_the_grid_is_cut() -> None:
    ramp = np.arange(4 * 4 * 4 * 4, dtype=np.float32).reshape(4, 4, 4, 4)
    full = SubsetAnswer(GLIOMA_MRI, Box((2, 0, 1), (6, 4, 5)), ramp).on_grid((3, 4, 4))
    assert np.array_equal(full[:, 2:, :, 1:], ramp[:, :1, :, :3])
    assert np.array_equal(full[:, :2].argmax(axis=0), np.zeros((2, 4, 4)))
    before = SubsetAnswer(GLIOMA_MRI, Box((-1, 0, -2), (3, 4, 2)), ramp).on_grid((3, 4, 4))
    assert np.array_equal(before[:, :, :, :2], ramp[:, 1:, :, 2:])


ORIENTATIONS = {
    "RAS": np.diag([1.0, 1.0, 3.0, 1.0]),
    "LPS": np.diag([-1.0, -1.0, 3.0, 1.0]),
    "SRP": np.array([[0, 1.0, 0, 4], [0, 0, -1.0, -7], [3.0, 0, 0, 11], [0, 0, 0, 1]]),
}


def bright_case(affine: np.ndarray) -> tuple[Case, np.ndarray]:
    """Two sequences with brains of their own, and where their z-scores sum to more than 1."""
    generator, shape = np.random.default_rng(56), (11, 14, 17)
    images, total = {}, np.zeros(shape, np.float32)
    for index, name in enumerate(("t1c", "t2f")):
        image = np.zeros(shape, np.float32)
        brain = (slice(1 + index, 9), slice(2, 13 - index), slice(3, 15))
        image[brain] = generator.integers(1, 1000, image[brain].shape)
        at = image != 0
        z = (image - image[at].mean()) / image[at].std()
        total += np.where(at, z, 0).astype(np.float16).astype(np.float32)
        images[name] = image
    assert np.abs(total - 1).min() > 2e-3  # no voxel so near the threshold that rounding decides
    return Case("p", images, affine), total > 1


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_voxel_of_a_mask_comes_home(orientation: str) -> None:
    case, expected = bright_case(ORIENTATIONS[orientation])
    predictor = Predictor([bright_voxels()], ModelCard(GLIOMA_MRI, GLIOMA, None), precision="fp32")
    found = predictor.predict(case, probabilities=True)
    assert found.classes.dtype == np.uint8
    assert np.array_equal(found.classes, expected)
    assert found.grid.matches(case.grid)
    assert found.used == ("t1c", "t2f")
    assert found.probabilities is not None
    assert set(found.probabilities) == {"WT", "TC", "ET"}
    assert np.array_equal(found.probabilities["TC"] > 0.5, expected)
    assert found.probabilities["ET"].max() == 0


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_model_with_its_own_spacing_answers_in_place(orientation: str) -> None:
    affine = ORIENTATIONS[orientation]
    image = np.zeros((36, 36, 36), np.float32)
    image[3:33, 3:33, 3:33] = 1 + np.random.default_rng(0).random((30, 30, 30))
    image[8:20, 12:24, 6:18] += 20
    case = Case("p", {"t2f": image}, affine)
    predictor = Predictor([bright_voxels()], ModelCard(GLIOMA_MRI, GLIOMA, 2.0), precision="fp32")
    mask = predictor.predict(case).classes
    assert mask.shape == image.shape
    middle = np.argwhere(mask).mean(axis=0)
    np.testing.assert_allclose(middle, (13.5, 17.5, 11.5), atol=0.4)
    assert 0.75 < mask.sum() / 12**3 < 1.25


def test_region_probabilities_are_sums_of_classes(plain: AlignedSegmenter, phantom: Case) -> None:
    predictor = Predictor([plain], ModelCard(GLIOMA_MRI, GLIOMA, None), precision="fp32")
    p = predictor.predict(phantom, probabilities=True).probabilities
    assert p is not None
    assert (p["WT"] >= p["TC"]).all()
    assert (p["TC"] >= p["ET"]).all()
    assert (p["TC"] > p["ET"]).any()
    assert predictor.predict(phantom).probabilities is None


def test_sequences_that_the_model_does_not_know_are_left_aside(phantom: Case) -> None:
    pair = ModalitySet(("t2f", "t1c"))
    predictor = Predictor([tiny_network(modalities=pair)], ModelCard(pair, GLIOMA, None), precision="fp32")
    found = predictor.predict(phantom)
    assert found.used == ("t2f", "t1c")
    alone = Case("p", {name: phantom.images[name] for name in ("t1c", "t2f")}, phantom.affine)
    assert np.array_equal(found.classes, predictor.predict(alone).classes)


# ---- several networks --------------------------------------------------------------------------------------------


def test_an_ensemble_is_the_mean_of_its_members_probabilities(prepared: Prepared) -> None:
    members = [tiny_network(seed=seed) for seed in range(3)]
    predictor = Predictor(members, ModelCard(GLIOMA_MRI, GLIOMA, None), mirror=(1,), precision="fp32")
    subsets = ALL[4:6]
    each = [answers(network, prepared, subsets, mirror=(1,)) for network in members]
    for index, found in enumerate(predictor.answers(prepared, subsets)):
        expected = np.mean([member[index].probabilities for member in each], axis=0)
        assert found.box == each[0][index].box
        np.testing.assert_allclose(found.probabilities, expected, atol=1e-6)
        assert np.abs(found.probabilities - each[0][index].probabilities).max() > 1e-3


def left_run(run: Path, network: AlignedSegmenter, card: ModelCard, config: Config | None = None) -> None:
    """What training leaves of a network."""
    write_run(run, config or parse_config({"model": {"size": "tiny"}, "align": "none"}), card)
    save_checkpoint(run, "best", {"model": network.state_dict()}, {"step": 1})


def test_a_folder_of_folds_answers_as_an_ensemble(tmp_path: Path, prepared: Prepared) -> None:
    # As they lie in memory where they answer: in another layout sums are taken in another order.
    members = [placed(tiny_network(seed=seed), torch.device("cpu")) for seed in range(2)]
    card = ModelCard(GLIOMA_MRI, GLIOMA, 2.0)
    predict = {"mirror": [2], "et_min_ml": 0.25}
    for fold, network in enumerate(members):
        config = parse_config({"model": {"size": "tiny"}, "align": "none", "predict": predict})
        left_run(tmp_path / f"fold{fold}", network, card, config)
    predictor = Predictor.load(tmp_path, device="cpu", precision="fp32")
    assert (predictor.card, predictor.mirror, predictor.et_min_ml) == (card, (2,), 0.25)
    assert not any(network.training for network in predictor.networks)
    (found,) = predictor.answers(prepared, [GLIOMA_MRI])
    (expected,) = Predictor(members, card, mirror=(2,), precision="fp32").answers(prepared, [GLIOMA_MRI])
    assert same(found, expected)
    (single,) = Predictor.load(tmp_path / "fold1", device="cpu", precision="fp32").answers(prepared, [GLIOMA_MRI])
    assert same(single, answer(members[1], prepared, GLIOMA_MRI, mirror=(2,)))


def test_runs_of_two_kinds_do_not_answer_together(tmp_path: Path) -> None:
    for name, spacing_mm in (("a", 2.0), ("b", 1.0)):
        left_run(tmp_path / name, tiny_network(), ModelCard(GLIOMA_MRI, GLIOMA, spacing_mm))
    with pytest.raises(CheckpointError, match=r"b and .*a cannot answer together: .* name one of them"):
        Predictor.load(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"predict": {"et_min_ml": 0.25}}, r"b and .*a cannot .*: predict.et_min_ml is 0.25 and 0.5; make it the same"),
        ({"model": {"size": "base"}}, r"b and .*a cannot .*: a network of stride 16 and one of 8 .* name one of them"),
    ],
)
def test_runs_that_look_at_a_patient_in_two_ways_do_not_answer_together(
    tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    """Boxes of two strides have two sizes, and settings of the first run would hold for all in silence."""
    for name, changes in (("a", {}), ("b", other)):
        config = parse_config({"model": {"size": "tiny"}, "align": "none"} | changes)
        network = build_segmenter(config.model, config.align, GLIOMA_MRI, 4)
        left_run(tmp_path / name, network, ModelCard(GLIOMA_MRI, GLIOMA, 2.0), config)
    with pytest.raises(CheckpointError, match=message):
        Predictor.load(tmp_path, device="cpu")


# ---- after the network -------------------------------------------------------------------------------------------


def test_an_enhancing_tumour_too_small_to_be_believed_becomes_core() -> None:
    classes = np.zeros((4, 4, 4), np.uint8)
    classes[0, 0, :2], classes[1, 0, :], classes[2, 0, 0] = 1, 2, 3
    classes[3, :3, 0] = 3
    before = classes.copy()
    cleaned = postprocess(classes, GLIOMA, (5.0, 5.0, 5.0), 0.51)  # four voxels of 0.125 ml
    assert np.array_equal(classes, before)
    assert np.array_equal(cleaned, np.where(before == 3, 1, before))
    assert cleaned.dtype == np.uint8
    for region in ("WT", "TC"):
        assert np.array_equal(GLIOMA.region_mask(cleaned, region), GLIOMA.region_mask(before, region))
    assert np.array_equal(postprocess(classes, GLIOMA, (5.0, 5.0, 5.0), 0.5), before)
    assert np.array_equal(postprocess(classes, GLIOMA, (5.0, 5.0, 2.5), 0.5), cleaned)
    assert np.array_equal(postprocess(classes, GLIOMA, (1.0, 1.0, 1.0), 0.0), before)


def test_a_scheme_without_enhancing_tumour_is_not_post_processed() -> None:
    scheme = type(GLIOMA)("organ", ("background", "liver"), {"liver": 1}, {"liver": ("liver",)})
    classes = np.array([[[0, 1]]], np.uint8)
    assert postprocess(classes, scheme, (1.0, 1.0, 1.0), 10.0) is classes


def test_labels_without_a_necrotic_core_have_nothing_that_a_small_tumour_could_become() -> None:
    """As of a data set that tells oedema and enhancement apart and no more; scores and witnesses ask as well."""
    regions = {"WT": ("ed", "et"), "ET": ("et",)}
    scheme = type(GLIOMA)("two", ("background", "ed", "et"), {"ed": 1, "et": 2}, regions)
    classes = np.zeros((4, 4, 4), np.uint8)
    classes[:2, 0, 0] = 2
    assert postprocess(classes, scheme, (1.0, 1.0, 1.0), 0.5) is classes
    scores = score_classes(classes, classes, (1.0, 1.0, 1.0), scheme)
    assert scores["ET-pp", "dice"] == scores["ET", "dice"] == 1
    witnesses = Witnesses(scheme, classes.shape, (1.0, 1.0, 1.0), 0.5)
    witnesses.add("t1c", Box((0, 0, 0), (4, 4, 4)), np.eye(3, dtype=np.float32)[classes].transpose(3, 0, 1, 2))
    assert witnesses.about("t1c")["ET-pp"].volume_ml == pytest.approx(0.002)


def test_the_rule_counts_millilitres_on_the_patients_own_grid() -> None:
    case, expected = bright_case(np.diag([-2.0, -2.0, 2.0, 1.0]))  # 8 mm³ a voxel
    ml = expected.sum() * 0.008
    card = ModelCard(GLIOMA_MRI, GLIOMA, 4.0)
    at_4_mm = Predictor([bright_voxels(label=3)], card, precision="fp32", et_min_ml=0).predict(case).classes
    ml = (at_4_mm == 3).sum() * 0.008
    assert ml > 0
    for threshold, label in ((ml * 0.99, 3), (ml * 1.01, 1)):
        predictor = Predictor([bright_voxels(label=3)], card, precision="fp32", et_min_ml=threshold)
        assert np.array_equal(predictor.predict(case).classes, np.where(at_4_mm == 3, label, 0))
        assert np.array_equal(predictor.predict(case, clean=False).classes, at_4_mm)


def test_a_predictor_is_called_as_a_network_is() -> None:
    case, _ = bright_case(np.diag([-2.0, -2.0, 2.0, 1.0]))
    predictor = Predictor([bright_voxels(label=3)], ModelCard(GLIOMA_MRI, GLIOMA, 4.0), precision="fp32", et_min_ml=1e6)
    for how in ({}, {"clean": False, "probabilities": True}):
        called, predicted = predictor(case, **how), predictor.predict(case, **how)
        assert np.array_equal(called.classes, predicted.classes)
        assert called.used == predicted.used
        assert (called.probabilities is None) == (predicted.probabilities is None)


# ---- machines ----------------------------------------------------------------------------------------------------


def test_bf16_is_near_fp32_and_not_the_same(plain: AlignedSegmenter, prepared: Prepared) -> None:
    for exact, rounded in zip(
        answers(plain, prepared, ALL[::7]), answers(plain, prepared, ALL[::7], precision="bf16"), strict=True
    ):
        assert rounded.probabilities.dtype == np.float32
        difference = np.abs(exact.probabilities - rounded.probabilities)
        assert 0 < difference.max() < 0.2
        assert difference.mean() < 0.01


@pytest.mark.parametrize("name", ["plain", "joint stem"])
def test_a_generator_that_sleeps_leaves_nothing_switched_on(
    networks: dict[str, AlignedSegmenter], prepared: Prepared, name: str
) -> None:
    asleep = answer_subsets(networks[name], prepared, ALL[:2], precision="bf16")
    next(asleep)
    assert not torch.is_inference_mode_enabled()
    assert not torch.is_autocast_enabled("cpu")
    one = torch.ones(2, 2, requires_grad=True)
    assert (one @ one).dtype == torch.float32
    assert (one @ one).requires_grad
    next(asleep)
    assert not torch.is_inference_mode_enabled()


def test_fp32_holds_although_the_caller_computes_in_bf16(plain: AlignedSegmenter, prepared: Prepared) -> None:
    expected = answer(plain, prepared, GLIOMA_MRI)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(answer(plain, prepared, GLIOMA_MRI), expected)
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("flags", "expected"), [("sse4 avx512f avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx2 avx512f", "fp32")]
)
def test_auto_takes_bf16_where_the_processor_multiplies_it(
    flags: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: f"flags : {flags}")
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) == expected
    assert [resolve_precision(name, cpu) for name in ("fp32", "bf16")] == ["fp32", "bf16"]


def test_auto_is_fp32_where_the_processor_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(self: Path, encoding: str) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", silent)
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_does_not_emulate_bf16_on_a_gpu(native: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert resolve_precision("auto", torch.device("cuda")) == expected


def test_a_device_is_found_or_named() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    assert network_device(bright_voxels()) == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "quantum:0"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(InputError, match=rf"device '{device}' is not to be had here .*expected auto, cpu, cuda"):
        resolve_device(device)


# ---- what cannot be answered -------------------------------------------------------------------------------------


def test_a_subset_with_a_sequence_that_is_missing_is_refused(plain: AlignedSegmenter, prepared: Prepared) -> None:
    partial = with_only(prepared, GLIOMA_MRI.parse("t1n+t2f"))
    asked = [GLIOMA_MRI.parse("t1n"), GLIOMA_MRI.parse("t1n+t1c+t2w")]
    with pytest.raises(InputError, match=r"made-up: asked for t1n\+t1c\+t2w, but t1c, t2w is missing; .* t1n, t2f"):
        next(answer_subsets(plain, partial, asked))


def test_a_subset_with_a_sequence_that_the_model_does_not_know_is_refused(prepared: Prepared) -> None:
    pair = ModalitySet(("t1n", "t2w"))
    with pytest.raises(InputError, match=r"asked for t1n\+t2f, but t2f is unknown to the model; .* t1n, t2w"):
        answer(tiny_network(modalities=pair), prepared, GLIOMA_MRI.parse("t1n+t2f"))


def test_a_patient_without_any_sequence_of_the_model_is_refused(plain: AlignedSegmenter, phantom: Case) -> None:
    predictor = Predictor([plain], ModelCard(GLIOMA_MRI, GLIOMA, None), precision="fp32")
    other = Case("p", {"adc": phantom.images["t2w"], "swi": phantom.images["t2f"]}, phantom.affine)
    with pytest.raises(InputError, match=r"no sequence in common: the input has adc, swi, the model knows t1n, t1c"):
        predictor.predict(other)
    with pytest.raises(InputError, match="the input has none"):
        predictor.usable([])


# ---- a network that does not answer every subset ------------------------------------------------------------------


def test_a_patient_is_answered_from_the_largest_subset_that_the_network_answers(phantom: Case) -> None:
    network = tiny_network(model=ModelConfig(name="pmkl", size="tiny"), align=AlignConfig(anchor="none"))
    predictor = Predictor([network], ModelCard(GLIOMA_MRI, GLIOMA, phantom.grid.spacing_mm[0]))

    def of(*names: str) -> Case:
        return Case(phantom.id, {name: phantom.images[name] for name in names}, phantom.affine)

    whole, pair, one = (predictor.predict(of(*names)) for names in (GLIOMA_MRI.names, ("t2w", "t2f"), ("t2w",)))
    assert (whole.used, whole.notes) == (GLIOMA_MRI.names, ())
    assert (pair.used, one.used, one.notes) == (("t2w",), ("t2w",), ())
    assert pair.notes == ("t2f not used: the model has no answer from all of t2w+t2f",)
    np.testing.assert_array_equal(pair.classes, one.classes)


# ---- window by window --------------------------------------------------------------------------------------------

SMALL = Windows(memory_gb=1e-9, size=(16, 16, 16))
"""No pass fits into a byte."""


@pytest.mark.parametrize("name", [*SEPARABLE, "joint stem"])
def test_by_windows_too_what_is_not_asked_for_might_as_well_not_exist(
    networks: dict[str, AlignedSegmenter], prepared: Prepared, name: str
) -> None:
    network, subsets = networks[name], ALL[1::3]
    for subset, found in zip(subsets, answers(network, prepared, subsets, windows=SMALL), strict=True):
        assert same(found, answer(network, with_only(prepared, subset), subset, windows=SMALL)), subset
        assert same(found, answer(network, with_others_changed(prepared, subset), subset, windows=SMALL)), subset
        assert found.box == answer(network, prepared, subset).box
        np.testing.assert_allclose(found.probabilities.sum(axis=0), 1, atol=1e-5)


@pytest.mark.parametrize("mirror", [(), (0, 2)])
def test_windows_of_a_network_that_looks_at_single_voxels_say_what_one_pass_says(
    prepared: Prepared, mirror: tuple[int, ...]
) -> None:
    network = AlignedSegmenter(Voxelwise(), None, {}).eval()
    for subset in ALL[::4]:
        whole, parts = (answer(network, prepared, subset, mirror=mirror, windows=w) for w in (None, SMALL))
        inside = np.zeros(whole.box.shape, dtype=bool)
        for member in subset:
            inside[prepared.images[member].box.snapped(STRIDE).relative_to(whole.box.start).slices] = True
        np.testing.assert_allclose(parts.probabilities[:, inside], whole.probabilities[:, inside], atol=1e-6)


def test_one_window_round_everything_is_one_pass(plain: AlignedSegmenter) -> None:
    cube = made_up_prepared({name: Box((0, 0, 0), (32, 32, 32)) for name in GLIOMA_MRI})
    whole, window = (answer(plain, cube, ALL[5], windows=w) for w in (None, Windows(1e-9, (32, 32, 32))))
    np.testing.assert_allclose(window.probabilities, whole.probabilities, atol=1e-6)


def test_windows_are_taken_where_a_pass_is_too_large_and_nowhere_else(
    plain: AlignedSegmenter, prepared: Prepared
) -> None:
    whole = answer(plain, prepared, GLIOMA_MRI)
    needed_gb = pass_memory(plain, 1, "fp32").gb(np.prod(whole.box.shape))
    assert same(whole, answer(plain, prepared, GLIOMA_MRI, windows=Windows(1.01 * needed_gb, (16, 16, 16))))
    assert not same(whole, answer(plain, prepared, GLIOMA_MRI, windows=Windows(0.99 * needed_gb, (16, 16, 16))))
    flipped = answer(plain, prepared, GLIOMA_MRI, mirror=(0,))
    again = answer(plain, prepared, GLIOMA_MRI, mirror=(0,), windows=Windows(1.01 * needed_gb, (16, 16, 16)))
    assert not same(flipped, again)  # the latents of both flips are held


def test_whether_a_subset_is_answered_by_windows_depends_on_nothing_else_that_is_asked(
    plain: AlignedSegmenter, prepared: Prepared
) -> None:
    sizes = sorted(np.prod(answer(plain, prepared, subset).box.shape) for subset in ALL)
    some = Windows(pass_memory(plain, 1, "fp32").gb(sizes[len(sizes) // 2]), (16, 16, 16))
    together = answers(plain, prepared, ALL, windows=some)
    assert [found.subset for found in together] == ALL
    assert all(same(found, answer(plain, prepared, found.subset, windows=some)) for found in together)
    in_one_pass = [same(found, answer(plain, prepared, found.subset)) for found in together]
    assert any(in_one_pass)
    assert not all(in_one_pass)


@given(st.tuples(*[st.integers(-20, 60)] * 3), st.tuples(*[st.integers(1, 50)] * 3), st.sampled_from([16, 24, 40]))
def test_windows_cover_a_box_and_lie_on_a_lattice_that_is_fixed(
    start: tuple[int, int, int], extent: tuple[int, int, int], edge: int
) -> None:
    windows = Windows(1.0, (edge, edge, 16))
    box = Box(start, Box((0, 0, 0), extent).shifted(start).stop)
    covered = np.zeros(extent, dtype=int)
    for window in windows.over(box, STRIDE):
        steps = (edge // 2 // STRIDE * STRIDE, edge // 2 // STRIDE * STRIDE, STRIDE)
        assert all(a % step == 0 for a, step in zip(window.start, steps, strict=True))
        covered[tuple(slice(max(part.start, 0), part.stop) for part in window.relative_to(start).slices)] += 1
        assert all(b - a == n for a, b, n in zip(window.start, window.stop, windows.size, strict=True))
    assert covered.min() >= 1


def test_a_pass_may_be_larger_the_less_it_holds(plain: AlignedSegmenter) -> None:
    one, four = (pass_memory(plain, flips, "fp32") for flips in (1, 4))
    held = (8, 16 + 1, 32 + 1, 48 + 1)  # channels of a level, and the weight of a gated one
    latents = sum(channels / 8**level for level, channels in enumerate(held))  # per voxel and sequence
    assert four.per_voxel - one.per_voxel == pytest.approx(inference.ROOM * 3 * 4 * 4 * latents)
    assert pass_memory(plain, 1, "bf16").per_voxel < one.per_voxel


def test_weights_at_another_precision_are_charged_once_and_not_by_the_voxel() -> None:
    """A network of many weights and few features: what its pass over a larger cube takes is foretold."""
    heavy = AlignedSegmenter(Heavy(), None, {}).eval()
    need = pass_memory(heavy, 1, "bf16")
    foretold = (need.gb(96**3) * 1e9 - inference.ANSWERS * 4 * heavy.backbone.classes * 96**3) / inference.ROOM
    assert foretold == pytest.approx(inference._most(heavy, 1, "bf16", 96), rel=0.05)
    assert inference._most(heavy, 1, "bf16", 32) * 27 > 1.5 * foretold  # by the voxel of a small cube it would be more


def test_a_network_that_nobody_holds_is_let_go() -> None:
    network = AlignedSegmenter(Voxelwise(), None, {}).eval()
    assert pass_memory(network, 1, "fp32") is pass_memory(network, 1, "fp32")
    held = weakref.ref(network)
    del network
    gc.collect()
    assert held() is None


class Voxelwise(torch.nn.Module):
    """A backbone whose answer in a voxel depends on that voxel alone."""

    modalities, classes, strides, separable = GLIOMA_MRI, 4, {"x1": 1, "x2": STRIDE}, True

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Conv3d(4, 4, 1)

    def supported_subsets(self) -> list[ModalitySet]:
        return self.modalities.subsets()

    def encode(self, images: dict[str, Tensor], seen: Tensor) -> Encoded:
        coarse = {name: F.avg_pool3d(image, STRIDE) for name, image in images.items()}
        size = next(iter(images.values())).shape[2:]
        return Encoded({"x1": dict(images), "x2": coarse}, tuple(size))

    def decode(self, encoded: Encoded, kept: Tensor) -> Decoded:
        images = encoded.levels["x1"]
        none = torch.zeros_like(next(iter(images.values())))
        return Decoded(self.mix(torch.cat([images.get(name, none) for name in self.modalities], dim=1)), {}, {})


class Heavy(Voxelwise):
    """With many weights, which are needed where most else lives."""

    def __init__(self) -> None:
        super().__init__()
        self.deep = torch.nn.Conv3d(4, 1024, STRIDE, STRIDE)

    def decode(self, encoded: Encoded, kept: Tensor) -> Decoded:
        images = torch.cat(list(encoded.levels["x1"].values()), dim=1)
        logits = self.mix(images)
        self.deep(images)
        return Decoded(logits, {}, {})


def test_what_is_made_of_a_sequence_once_for_all_subsets_changes_no_answer(
    plain: AlignedSegmenter, prepared: Prepared
) -> None:
    """Bit for bit: with its own box on the common one, and laid on a larger one."""
    torch.manual_seed(0)
    network = copy.deepcopy(plain)
    for fusion in network.backbone.fusions.values():
        for score in fusion.scores.values():
            torch.nn.init.normal_(score.weight)
    alike = made_up_prepared(dict.fromkeys(GLIOMA_MRI, BOXES["t1n"]))
    for patient in (alike, prepared):
        before = answers(network, patient, ALL)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AlignedSegmenter, "digested", lambda self, encoded: encoded)
            assert all(same(one, two) for one, two in zip(before, answers(network, patient, ALL), strict=True))
