from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medmap.config import Config, SamplingConfig, TrainConfig, parse_config
from medmap.core.box import Box, Boxed, Index3
from medmap.core.case import Batch, Grid, Prepared
from medmap.core.labels import SCHEMES
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.data import dataset
from medmap.data.dataset import (
    Patients,
    _order,
    answers_asked,
    cases_of_step,
    draw_crop,
    draw_kept,
    random_stream,
    stack_windows,
    training_batch,
)
from medmap.data.layouts import recognise
from medmap.data.preprocess import prepare_case
from medmap.data.store import Store, write_store
from medmap.errors import ConfigError, InputError
from medmap.phantom import Settings, simulate, write_phantoms

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Patient 0 has everything, 1 lacks t1c, 2 has t2w alone, 3 has no segmentation."""
    root = tmp_path_factory.mktemp("dataset")
    ids = write_phantoms(root / "raw", 4, 1, Settings(spacing_mm=4.0))
    for case, lost in ((ids[1], ["t1c"]), (ids[2], ["t1n", "t1c", "t2f"]), (ids[3], ["seg"])):
        for name in lost:
            (root / "raw" / case / f"{case}-{name}.nii.gz").unlink()
    write_store(recognise(root / "raw"), root / "store")
    return Store(root / "store")


@pytest.fixture(scope="module")
def prepared() -> list[Prepared]:
    return [prepare_case(simulate(seed, Settings(spacing_mm=4.0)), SCHEMES["brats2023"]) for seed in (0, 1)]


def config(**sections: Any) -> Config:
    tree = {"train": {"patch": [16, 16, 16], "batch_size": 2}, **sections}
    return parse_config(tree)


# ---- which cases -------------------------------------------------------------------------------------------------


@given(count=st.integers(1, 12), batch=st.integers(1, 7), seed=st.integers(0, 2**32), epochs=st.integers(1, 4))
@settings(deadline=None)
def test_every_epoch_holds_every_case_once(count: int, batch: int, seed: int, epochs: int) -> None:
    steps = -(-count * epochs // batch)
    drawn = [case for step in range(steps) for case in cases_of_step(count, batch, seed, step)]
    assert len(drawn) == steps * batch
    for epoch in range(epochs):
        assert sorted(drawn[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_an_epochs_order_is_drawn_once_for_all_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    _order.cache_clear()
    drawn: list[int] = []
    monkeypatch.setattr(dataset, "random_stream", lambda *of: drawn.append(of[2]) or random_stream(*of))
    for step in range(7):
        for ahead in range(2):
            cases_of_step(10, 2, 0, step + ahead)
    assert drawn == [0, 1]
    with pytest.raises(ValueError, match="read-only"):
        _order(10, 0, 0)[0] = 3


def test_every_epoch_and_every_seed_has_its_own_order() -> None:
    orders = {tuple(cases_of_step(10, 10, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


# ---- where -------------------------------------------------------------------------------------------------------

SHAPE = (40, 40, 40)


def boxed_patient(brain: Box, tumour: dict[Index3, int]) -> Prepared:
    """A brain of ones, and tumour voxels of the given classes."""
    labels = np.zeros(SHAPE, np.uint8)
    for voxel, label in tumour.items():
        labels[voxel] = label
    grid = Grid(SHAPE, np.eye(4))
    images = {"t2f": Boxed(np.ones(brain.shape, np.float16), brain)}
    return Prepared("p", grid, grid, images, Boxed.tight(labels))


@st.composite
def brains(draw: st.DrawFn) -> tuple[Box, Index3]:
    """A brain box and a voxel in it."""
    start = tuple(draw(st.integers(0, 30)) for _ in range(3))
    stop = tuple(draw(st.integers(a + 1, 40)) for a in start)
    voxel = tuple(draw(st.integers(a, b - 1)) for a, b in zip(start, stop, strict=True))
    return Box((start[0], start[1], start[2]), (stop[0], stop[1], stop[2])), (voxel[0], voxel[1], voxel[2])


@given(brain=brains(), seed=st.integers(0, 10**6), foreground=st.sampled_from([0.0, 1.0]))
@settings(max_examples=200, deadline=None)
def test_a_crop_lies_in_the_brain_or_round_it_and_a_foreground_crop_holds_its_tumour_voxel(
    brain: tuple[Box, Index3], seed: int, foreground: float
) -> None:
    box, voxel = brain
    patch = (8, 12, 16)
    train = TrainConfig(patch=patch, foreground=foreground)
    crop = draw_crop(boxed_patient(box, {voxel: 3}), train, np.random.default_rng(seed))
    assert crop.shape == patch
    for axis in range(3):
        low, high = box.start[axis], box.stop[axis]
        if high - low >= patch[axis]:
            assert low <= crop.start[axis] <= crop.stop[axis] <= high
        else:
            before, after = low - crop.start[axis], crop.stop[axis] - high
            assert min(before, after) >= 0
            assert abs(before - after) <= 1  # in the middle
        if foreground:
            assert crop.start[axis] <= voxel[axis] < crop.stop[axis]


def test_crops_reach_every_corner_of_the_brain_of_all_sequences() -> None:
    patient = boxed_patient(Box((2, 5, 7), (20, 31, 35)), {})
    other = Box((9, 4, 8), (33, 30, 37))
    patient = replace(patient, images={**patient.images, "t1c": Boxed(np.ones(other.shape, np.float16), other)})
    train, generator = TrainConfig(patch=(8, 8, 8), foreground=1.0), np.random.default_rng(0)
    starts = np.array([draw_crop(patient, train, generator).start for _ in range(400)])
    assert starts.min(axis=0).tolist() == [2, 4, 7]
    assert starts.max(axis=0).tolist() == [33 - 8, 31 - 8, 37 - 8]


def test_rare_classes_are_met_as_often_as_common_ones() -> None:
    oedema = dict.fromkeys(product(range(4, 12), repeat=3), 2)
    patient = boxed_patient(Box((0, 0, 0), SHAPE), {**oedema, (35, 35, 35): 3})
    train, generator = TrainConfig(patch=(8, 8, 8), foreground=1.0), np.random.default_rng(1)
    assert patient.labels is not None
    crops = [draw_crop(patient, train, generator) for _ in range(400)]
    enhancing = sum((patient.labels.window(crop) == 3).any() for crop in crops)
    assert sum((patient.labels.window(crop) == 2).any() for crop in crops) + enhancing == 400
    assert 150 < enhancing < 250  # 5 standard deviations about 200


def test_the_share_of_foreground_crops_is_the_one_asked_for() -> None:
    patient = boxed_patient(Box((0, 0, 0), SHAPE), {(39, 39, 39): 1})
    train, generator = TrainConfig(patch=(4, 4, 4), foreground=0.25), np.random.default_rng(2)
    assert patient.labels is not None
    hits = sum(patient.labels.window(draw_crop(patient, train, generator)).any() for _ in range(1000))
    assert 182 < hits < 325  # 250, and less than one of a thousand by chance


# ---- which sequences a pass may look at --------------------------------------------------------------------------

SAMPLINGS = ("uniform", "counts", "bernoulli", "full")


@given(data=st.data(), subsets=st.sampled_from(SAMPLINGS), per=st.sampled_from(["sample", "batch"]))
@settings(deadline=None)
def test_what_is_kept_was_seen_and_is_never_nothing(data: st.DataObject, subsets: Any, per: Any) -> None:
    width = data.draw(st.integers(1, 5))
    row = st.lists(st.booleans(), min_size=width, max_size=width).filter(any)
    seen = np.array(data.draw(st.lists(row, min_size=1, max_size=4)))
    before = seen.copy()
    kept = draw_kept(seen, SamplingConfig(subsets=subsets, per=per), np.random.default_rng(data.draw(st.integers(0))))
    assert np.array_equal(seen, before)
    assert kept.dtype == bool
    assert not (kept & ~seen).any()
    assert kept.any(axis=1).all()
    if subsets == "full" and per == "sample":
        assert np.array_equal(kept, seen)
    if per == "batch":
        for index, own in enumerate(kept):
            shared = kept[0] & seen[index]
            assert not shared.any() or np.array_equal(own, shared)


def frequencies(sampling: SamplingConfig, seen: list[bool], draws: int = 6000) -> dict[tuple[bool, ...], float]:
    kept = draw_kept(np.array([seen] * draws), sampling, np.random.default_rng(3))
    return {subset: count / draws for subset, count in Counter(map(tuple, kept.tolist())).items()}


def expected_share(subset: tuple[bool, ...], name: str, keep: float = 0.5) -> float:
    n, k = len(subset), sum(subset)
    if name == "counts":
        ways = {1: 3, 2: 3, 3: 1}[k]
        return 1 / n / ways
    p = {"uniform": 0.5, "bernoulli": keep}[name]
    return p**k * (1 - p) ** (n - k) / (1 - (1 - p) ** n)


@pytest.mark.parametrize(("name", "keep"), [("uniform", 0.5), ("counts", 0.5), ("bernoulli", 0.8), ("bernoulli", 0.2)])
def test_each_subset_of_what_is_seen_comes_as_often_as_its_law_says(name: Any, keep: float) -> None:
    seen = [True, False, True, True]  # the absent one has no part in it
    found = frequencies(SamplingConfig(subsets=name, keep_probability=keep), seen)
    subsets = [s for s in product((False, True), repeat=3) if any(s)]
    if name == "uniform":
        assert expected_share(subsets[0], name) == pytest.approx(1 / (2**3 - 1))
    for subset in subsets:
        share = expected_share(subset, name, keep)
        tolerance = 5 * np.sqrt(share * (1 - share) / 6000)
        assert found.pop((subset[0], False, *subset[1:])) == pytest.approx(share, abs=tolerance), subset
    assert found == {}


def test_samples_of_a_batch_draw_for_themselves_or_in_the_published_form_together() -> None:
    seen = np.ones((64, 4), bool)
    alone = draw_kept(seen, SamplingConfig(), np.random.default_rng(0))
    together = draw_kept(seen, SamplingConfig(per="batch"), np.random.default_rng(0))
    assert len({tuple(row) for row in alone.tolist()}) > 10
    assert np.array_equal(together, np.broadcast_to(alone[0], seen.shape))


def test_a_sample_that_has_none_of_the_shared_sequences_keeps_some_of_its_own() -> None:
    seen = np.array([[True, True, False, False], [False, False, True, True], [False, True, True, False]])
    for seed in range(20):
        kept = draw_kept(seen, SamplingConfig(per="batch"), np.random.default_rng(seed))
        assert kept[1].any()
        if kept[0, 1]:
            assert kept[2].tolist() == [False, True, False, False]


# ---- batches -----------------------------------------------------------------------------------------------------


def equal(one: Batch, other: Batch) -> bool:
    return one.ids == other.ids and all(torch.equal(a, b) for a, b in zip(one[:4], other[:4], strict=True))


@pytest.mark.parametrize("augmented", [True, False])
def test_a_batch_is_a_function_of_seed_and_step(prepared: list[Prepared], augmented: bool) -> None:
    def batch(seed: int, step: int) -> Batch:
        settings = config(seed=seed, augment={"enabled": augmented})
        return training_batch(prepared, GLIOMA_MRI, settings, step, CPU)

    reference = batch(7, 3)
    torch.manual_seed(123)
    np.random.default_rng().random()
    assert equal(batch(7, 3), reference)
    others = [batch(7, 4), batch(7, 5), batch(8, 3)]
    for other in others:
        assert not torch.equal(other.images, reference.images)
        assert not torch.equal(other.target, reference.target)
    assert len({tuple(map(tuple, batch(7, step).kept.tolist())) for step in range(4)}) > 1


def test_flat_voxels_are_turned_in_mm_and_leave_no_empty_corner() -> None:
    """The patch comes from the middle of a brain that is larger than whatever it takes."""
    shape, spacing_mm = (96, 96, 96), (2.0, 2.0, 6.0)
    labels = np.zeros(shape, np.uint8)
    labels[48, 48, 48] = 1
    grid = Grid(shape, np.diag([*spacing_mm, 1.0]))
    brain = Boxed(np.ones(shape, np.float16), Box((0, 0, 0), shape))
    patient = Prepared("p", grid, grid, {"t2f": brain}, Boxed.tight(labels))
    turned = {"p_rotation": 1.0, "rotation_deg": [-45.0, 45.0], "p_scaling": 0.0}
    still = {key: 0.0 for key in type(config().augment).model_fields if key.startswith("p_")}
    settings = config(augment=still | turned, train={"patch": [16, 16, 16], "foreground": 1.0})
    for step in range(5):
        images = training_batch([patient], ModalitySet(("t2f",)), settings, step, CPU).images
        empty = (images == 0).float().mean()
        assert empty == 0, f"step {step}: {empty:.0%} of the patch came from nowhere"


@pytest.mark.parametrize("augmented", [True, False])
def test_without_what_was_dropped_a_batch_is_otherwise_the_same(prepared: list[Prepared], augmented: bool) -> None:
    for step in range(6):
        settings = config(augment={"enabled": augmented})
        whole, part = (training_batch(prepared, GLIOMA_MRI, settings, step, CPU, dropped=d) for d in (True, False))
        assert equal(part._replace(images=whole.images), whole)
        assert torch.equal(part.images, whole.images * whole.kept[:, :, None, None, None])
        assert part.images.abs().sum() < whole.images.abs().sum() or whole.kept.all()


def test_shapes_and_types_are_those_that_a_network_takes(prepared: list[Prepared]) -> None:
    settings = config(train={"patch": [16, 24, 8], "batch_size": 3})
    images, seen, kept, target, ids = training_batch(prepared, GLIOMA_MRI, settings, 0, CPU)
    assert (images.shape, images.dtype) == ((3, 4, 16, 24, 8), torch.float32)
    assert (target.shape, target.dtype) == ((3, 16, 24, 8), torch.int64)
    assert (seen.shape, seen.dtype) == (kept.shape, kept.dtype) == ((3, 4), torch.bool)
    assert set(ids) <= {case.id for case in prepared}
    assert len(ids) == 3


def test_without_augmentation_a_batch_is_cut_out_of_the_patients(prepared: list[Prepared]) -> None:
    """Found again by its voxels: every patch lies somewhere in its patient, all sequences and labels at one place."""
    settings = config(augment={"enabled": False}, train={"patch": [12, 12, 12], "batch_size": 2, "foreground": 1.0})
    batch = training_batch(prepared, GLIOMA_MRI, settings, 1, CPU)
    for row, case in enumerate(batch.ids):
        patient = next(p for p in prepared if p.id == case)
        assert patient.labels is not None
        volumes = {name: image.window(Box((0, 0, 0), patient.grid.shape)) for name, image in patient.images.items()}
        wanted = {name: batch.images[row, m].numpy() for m, name in enumerate(GLIOMA_MRI)}
        places = list(product(*(range(n - 12 + 1) for n in patient.grid.shape)))
        first = wanted["t1n"][6, 6, 6]
        found = [
            (x, y, z)
            for x, y, z in places
            if volumes["t1n"][x + 6, y + 6, z + 6] == first
            and all(np.array_equal(volumes[n][x : x + 12, y : y + 12, z : z + 12], wanted[n]) for n in GLIOMA_MRI)
        ]
        assert len(found) == 1
        x, y, z = found[0]
        window = Box((x, y, z), (x + 12, y + 12, z + 12))
        assert np.array_equal(patient.labels.window(window), batch.target[row].numpy())
        assert (batch.target[row] > 0).any()


NOTHING_CHANGED = {
    f"p_{name}": 0
    for name in (
        *("rotation", "scaling", "flip", "bias", "noise", "blur", "brightness", "contrast", "low_resolution"),
        *("gamma", "gamma_inverted"),
    )
}


@pytest.mark.parametrize("augmentation", [{"enabled": False}, NOTHING_CHANGED], ids=["off", "on, and nothing drawn"])
def test_a_tumour_voxel_far_from_the_rim_stands_in_the_middle(augmentation: dict[str, Any]) -> None:
    patient = boxed_patient(Box((2, 3, 1), (40, 40, 38)), {(17, 21, 19): 3})
    settings = config(augment=augmentation, train={"patch": [8, 12, 16], "batch_size": 1, "foreground": 1.0})
    batch = training_batch([patient], ModalitySet(("t2f",)), settings, 0, CPU)
    assert batch.target.nonzero().tolist() == [[0, 4, 6, 8]]
    assert batch.target.max() == 3
    assert (batch.images == 1).all()


def test_the_order_of_the_modalities_is_that_of_the_masks(prepared: list[Prepared]) -> None:
    window = Box((8, 8, 8), (24, 24, 24))
    images, _ = stack_windows(prepared[:1], [window], ModalitySet(("t2f", "t1n")), CPU)
    for column, name in enumerate(("t2f", "t1n")):
        expected = prepared[0].images[name].window(window).astype(np.float32)
        assert np.array_equal(images[0, column].numpy(), expected)
        assert expected.any()


@pytest.mark.parametrize("augmented", [True, False])
def test_a_sequence_that_does_not_exist_is_zeros_and_unseen(store: Store, augmented: bool) -> None:
    patients = Patients(store, store.ids[:3], GLIOMA_MRI)
    settings = config(augment={"enabled": augmented}, train={"patch": [16, 16, 16], "batch_size": 3})
    for step in range(6):
        batch = training_batch(patients, GLIOMA_MRI, settings, step, CPU)
        seen = dict(zip(batch.ids, batch.seen.tolist(), strict=True))
        assert seen == {
            store.ids[0]: [True, True, True, True],
            store.ids[1]: [True, False, True, True],
            store.ids[2]: [False, False, True, False],
        }
        assert not (batch.kept & ~batch.seen).any()
        assert (batch.images[~batch.seen] == 0).all()
        assert batch.images[batch.seen].flatten(1).any(dim=1).all()


# ---- the patients of a store -------------------------------------------------------------------------------------


def test_patients_are_loaded_with_the_sequences_asked_for(store: Store) -> None:
    pair = ModalitySet(("t2f", "t1c"))
    patients = Patients(store, store.ids[1::-1], pair)
    assert [patient.id for patient in patients] == [store.ids[1], store.ids[0]]
    assert [set(patient.images) for patient in patients] == [{"t2f"}, {"t1c", "t2f"}]
    whole = store.load(store.ids[0])
    assert np.array_equal(patients[1].images["t1c"].values, whole.images["t1c"].values)
    assert len(patients) == 2
    assert not Patients(store, [], pair)


def test_a_case_without_any_of_the_modalities_is_refused_by_name(store: Store) -> None:
    with pytest.raises(InputError, match=rf"1 cases \({store.ids[2]}\) have none of the modalities t1n, t2f; leave"):
        Patients(store, store.ids[:3], ModalitySet(("t1n", "t2f")))


def test_a_case_without_a_segmentation_is_refused_by_name(store: Store) -> None:
    with pytest.raises(InputError, match=rf"1 cases \({store.ids[3]}\) have no segmentation; leave them out"):
        Patients(store, store.ids, GLIOMA_MRI)


def test_many_refused_cases_are_not_all_listed(tmp_path: Path) -> None:
    class Bare:
        def sequences(self, case: str) -> tuple[str, ...]:
            return ("adc",)

        def has_labels(self, case: str) -> bool:
            return True

    ids: Any = [f"c{i}" for i in range(9)]
    store: Any = Bare()
    with pytest.raises(InputError, match=r"9 cases \(c0, c1, c2, c3, c4\) have none of the modalities t1n"):
        Patients(store, ids, GLIOMA_MRI)


def test_a_network_that_answers_few_subsets_is_asked_for_these_alone() -> None:
    subsets = [ModalitySet(("t1n",)), ModalitySet(("t2f",)), ModalitySet(("t1n", "t1c", "t2f"))]
    answers = np.array([subset.mask(GLIOMA_MRI) for subset in subsets])
    seen = np.array([[True, True, True, True], [True, False, False, True], [False, False, False, True]] * 40)
    kept = draw_kept(seen, SamplingConfig(), np.random.default_rng(1), answers)
    drawn = [{tuple(map(bool, row)) for row in kept[start::3]} for start in range(3)]
    t1n, t2f, three = (tuple(map(bool, subset.mask(GLIOMA_MRI))) for subset in subsets)
    assert drawn == [{t1n, t2f, three}, {t1n, t2f}, {t2f}]
    full = draw_kept(seen[:1], SamplingConfig(subsets="full"), np.random.default_rng(1), answers)
    assert tuple(map(bool, full[0])) == three
    with pytest.raises(InputError, match="none of the subsets of sequences that this network answers"):
        draw_kept(np.array([[False, True, False, False]]), SamplingConfig(), np.random.default_rng(1), answers)


def _drawn_of_three(count: int = 4000, **how: Any) -> list[int]:
    """How often each of t1n, t2f, t1n+t1c+t2f was drawn, of patients who have all four."""
    subsets = [ModalitySet(("t1n",)), ModalitySet(("t2f",)), ModalitySet(("t1n", "t1c", "t2f"))]
    answers = np.array([subset.mask(GLIOMA_MRI) for subset in subsets])
    kept = draw_kept(np.ones((count, 4), bool), SamplingConfig(**how), np.random.default_rng(1), answers)
    return [int((kept == answer).all(axis=1).sum()) for answer in answers]


def test_few_subsets_are_drawn_as_the_sampling_says() -> None:
    uniform, counts, bernoulli = (np.array(_drawn_of_three(subsets=how)) for how in ("uniform", "counts", "bernoulli"))
    for drawn, expected in ((uniform, (1 / 3, 1 / 3, 1 / 3)), (counts, (1 / 4, 1 / 4, 1 / 2))):
        assert drawn / 4000 == pytest.approx(expected, abs=0.04)
    assert bernoulli / 4000 == pytest.approx(uniform / 4000, abs=0.04)  # a fair coin
    odds = np.array([0.9 * 0.1**3, 0.9 * 0.1**3, 0.9**3 * 0.1])
    often = np.array(_drawn_of_three(subsets="bernoulli", keep_probability=0.9))
    assert often / 4000 == pytest.approx(odds / odds.sum(), abs=0.02)
    assert _drawn_of_three(100, subsets="bernoulli", keep_probability=1.0) == [0, 0, 100]
    assert sum(_drawn_of_three(100, subsets="bernoulli", keep_probability=1 - 1e-12)) == 100
    assert sorted(_drawn_of_three(100, per="batch")) == [0, 0, 100]


def test_a_batch_has_one_of_few_subsets_where_all_can_answer_it() -> None:
    answers = np.array([[True, True, True, False], [True, False, False, False]])
    seen = np.array([[True] * 4, [True, True, False, True], [True] * 4])
    for seed in range(20):
        kept = draw_kept(seen, SamplingConfig(per="batch"), np.random.default_rng(seed), answers)
        assert (kept[0] == kept[2]).all()
        assert (kept[1] == answers[1]).all()


# --- one subset for all -----------------------------------------------------------------------------------------------


def test_one_subset_may_be_named_for_all(store: Store) -> None:
    one = config(sampling={"subsets": "t2f+t1n"})
    whole = Patients(store, [store.ids[0], store.ids[1]], GLIOMA_MRI)
    asked = answers_asked(one, GLIOMA_MRI.subsets(), whole)
    assert asked is not None
    assert asked.tolist() == [[True, False, False, True]]
    for step in range(3):
        batch = training_batch(whole, GLIOMA_MRI, one, step, CPU, asked)
        assert batch.kept.tolist() == [[True, False, False, True]] * 2
    assert answers_asked(config(), GLIOMA_MRI.subsets(), whole) is None
    with pytest.raises(InputError, match=r"t1n\+t2f is to be learned from, and 1 cases lack some of it \(.*00002"):
        answers_asked(one, GLIOMA_MRI.subsets(), Patients(store, store.ids[:3], GLIOMA_MRI))
    students = [GLIOMA_MRI.parse(name) for name in ("t1c", "t2f")]
    with pytest.raises(ConfigError, match=r"unet has no answer from t1n\+t2f; it answers t1c, t2f"):
        answers_asked(one, students, whole)


def test_a_word_that_is_nearly_a_way_to_draw_is_no_subset() -> None:
    with pytest.raises(ConfigError, match="did you mean uniform"):
        config(sampling={"subsets": "unifrom"})
    with pytest.raises(ConfigError, match=r"expected uniform, counts, bernoulli, full, or a subset such as t1c\+t2f"):
        config(sampling={"subsets": "t1c & t2f"})
