from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RECIPE
from made_up_scores import (
    BRAIN,
    GLIOMA,
    ID,
    SHAPE,
    TUMOUR,
    Shifted,
    card_of,
    prepared_store,
    scored,
    tumour,
    write_folder,
    write_made_up_run,
)

from medmap.align import build_segmenter
from medmap.checkpoint import save_checkpoint
from medmap.config import Config, load_config
from medmap.core.box import Box, Boxed
from medmap.core.case import Prepared
from medmap.core.modality import GLIOMA_MRI
from medmap.data.store import Store
from medmap.evaluate import evaluate_cases
from medmap.exhibits import example_slices, pooled_latents, write_exhibits
from medmap.figures import example_overlays, latent_pca
from medmap.run import write_run
from medmap.scores import Score, write_scores
from medmap.train import fit

IDS = [ID.format(number) for number in range(4)]
STEMS = {
    "separable": ("model.size=tiny", "align=pstar"),
    "no anchor": ("model.size=tiny", "align.anchor=none"),
    "private stem": ("model.size=tiny", "model.stem=non_shared", "align.anchor=pstar", "align.levels=[stem]"),
    "joint stem": ("model.size=tiny", "model.stem=joint", "align.anchor=pstar", "align.levels=[stem, x2]"),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Four patients: two with everything, the third without t1c, the fourth without a tumour."""
    cases = {case: tumour() for case in IDS[:3]} | {IDS[3]: tumour() * 0}
    root = tmp_path_factory.mktemp("exhibits") / "cases"
    return prepared_store(write_folder(root, cases, {IDS[2]: ("t1n", "t2w", "t2f")}))


def write_trained(run: Path, store: Store, settings: tuple[str, ...], seed: int = 3, test: list[str] = IDS) -> Config:
    """A run whose best weights are those of its seed, a tenth larger."""
    config = load_config(None, [*settings, f"seed={seed}"])
    write_made_up_run(run, store, test)
    write_run(run, config, card_of())
    torch.manual_seed(seed)
    network = build_segmenter(config.model, config.align, GLIOMA_MRI, 4)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.1)
    save_checkpoint(run, "best", {"model": network.state_dict()}, {"step": 1})
    return config


def write_table(run: Path, rows: list[Score]) -> None:
    write_scores(run, rows, GLIOMA_MRI, GLIOMA, "brats", [], {"evaluated": "made-up"})


def cases_of(store: Store, ids: list[str] = IDS) -> list[Prepared]:
    return [store.load(case) for case in ids]


# ---- latents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", STEMS.values(), ids=list(STEMS))
def test_one_latent_a_patient_and_sequence(store: Store, tmp_path: Path, settings: tuple[str, ...]) -> None:
    config = write_trained(tmp_path, store, settings)
    latents = pooled_latents(tmp_path, cases_of(store))
    pairs = [(case, name) for case in IDS for name in GLIOMA_MRI if (case, name) != (IDS[2], "t1c")]
    assert list(zip(latents["case"].tolist(), latents["modality"].tolist(), strict=True)) == pairs
    backbone = build_segmenter(config.model, config.align, GLIOMA_MRI, 4).backbone
    deepest = max(backbone.strides, key=lambda name: backbone.strides[name])
    expected = {"separable": "x4", "joint stem": "x2"}
    name = next(name for name, words in STEMS.items() if words == settings)
    assert latents["level"].item() == expected.get(name, deepest)
    assert latents["before"].shape == latents["after"].shape
    assert latents["before"].shape[0] == 15
    assert np.isfinite(latents["before"]).all()
    assert not np.allclose(latents["before"], latents["after"], rtol=0.01)


def test_latents_of_before_are_those_of_the_seed_and_draws_are_left_alone(store: Store, tmp_path: Path) -> None:
    settings = STEMS["separable"]
    for name, seed in (("a", 3), ("b", 4)):
        write_trained(tmp_path / name, store, settings, seed)
    cases = cases_of(store, IDS[:1])
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = pooled_latents(tmp_path / "a", cases)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    again, other = pooled_latents(tmp_path / "a", cases), pooled_latents(tmp_path / "b", cases)
    np.testing.assert_array_equal(first["before"], again["before"])
    np.testing.assert_array_equal(first["after"], again["after"])
    assert not np.allclose(first["before"], other["before"])


def test_before_is_what_training_begins_with(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("medmap.train.training_batch", stopped)
    with pytest.raises(KeyboardInterrupt):
        fit(load_config(None, [*TINY_RECIPE, "seed=7"]), Store(tiny_store), tmp_path / "run", device="cpu")
    case = Store(tiny_store).load(Store(tiny_store).ids[0])
    latents = pooled_latents(tmp_path / "run", [case], which="last")  # its checkpoint is of step 0
    # One lies in memory as it was trained, the other as it was made: sums are taken in another order.
    np.testing.assert_allclose(latents["before"], latents["after"], atol=1e-5)
    assert latents["before"].std() > 1e-3


# ---- slices --------------------------------------------------------------------------------------------------------


@pytest.fixture
def evaluated(store: Store, tmp_path: Path) -> Path:
    write_table(tmp_path, evaluate_cases(Shifted(), store, store.ids))
    return tmp_path


def test_slices_have_the_axes_the_report_draws(store: Store, evaluated: Path) -> None:
    examples = example_slices(Shifted(), evaluated, cases_of(store), 3)  # type: ignore[arg-type]
    x, y, _ = BRAIN.shape
    assert examples["cases"].tolist() == IDS[:2]  # who has every sequence and a tumour
    assert examples["images"].shape == (2, 4, x, y)
    assert examples["truth"].shape == (2, x, y)
    assert examples["predictions"].shape == (2, 4, x, y)
    assert examples["modalities"].tolist() == list(GLIOMA_MRI)
    assert examples["spacing_mm"].tolist() == [2, 2]
    subsets = examples["subsets"].tolist()
    assert subsets[0] == "t1n+t1c+t2w+t2f"
    assert [text.count("+") + 1 for text in subsets] == [4, 3, 2, 1]
    # a cube of 8, one voxel further for each sequence that is not given
    np.testing.assert_allclose(examples["dice"][0, :, 0], [1, 7 / 8, 6 / 8, 5 / 8])
    truth, predictions = examples["truth"][0], examples["predictions"][0]
    np.testing.assert_array_equal(predictions[0], truth)
    np.testing.assert_array_equal(predictions[2], np.roll(truth, 2, axis=0))
    assert truth[TUMOUR.relative_to(BRAIN.start).slices[:2]].all()
    assert (truth > 0).sum() == 64
    example_overlays(examples)


def test_the_best_the_median_and_the_worst(store: Store, tmp_path: Path) -> None:
    cases = [Prepared(f"c{i}", c.grid, c.native, c.images, c.labels) for i, c in enumerate([store.load(IDS[0])] * 5)]
    worth = {"c0": 0.3, "c1": 0.9, "c2": 0.1, "c3": 0.5, "c4": 0.7}
    bad = {"t2w": 0.0, "t1n+t2f": 0.0}
    rows = [
        row
        for case, dice in worth.items()
        for subset in map(str, GLIOMA_MRI.subsets())
        for region, value in (("WT", bad.get(subset, dice)), ("ET-pp", 1 - dice), ("ET", float("nan")))
        for row in scored(case, subset, region, dice=value, hd95_mm=100 * dice, truth_ml=1.0)
    ]
    write_table(tmp_path, rows)
    examples = example_slices(Shifted(), tmp_path, cases, 3)  # type: ignore[arg-type]
    assert examples["cases"].tolist() == ["c1", "c3", "c2"]
    assert examples["subsets"].tolist()[2:] == ["t1n+t2f", "t2w"]  # of each size the one that costs most
    assert example_slices(Shifted(), tmp_path, cases, 1)["cases"].tolist() == ["c1"]  # type: ignore[arg-type]


def test_the_slice_is_where_the_tumour_is_largest(store: Store, evaluated: Path) -> None:
    case = store.load(IDS[0])
    codes = np.zeros(SHAPE, np.uint8)
    codes[5:9, 5:9, 3:9] = 2
    codes[5:12, 5:12, 10] = 1
    marked = Prepared(case.id, case.grid, case.native, case.images, Boxed.tight(codes))
    examples = example_slices(Shifted(), evaluated, [marked], 3)  # type: ignore[arg-type]
    assert set(np.unique(examples["truth"])) == {0, 1}
    assert (examples["truth"] > 0).sum() == 49
    z = 10 - BRAIN.start[2]
    for m, name in enumerate(GLIOMA_MRI):
        np.testing.assert_array_equal(examples["images"][0, m], case.images[name].values[:, :, z])


def test_patients_on_grids_of_their_own_fit_one_frame(store: Store, tmp_path: Path) -> None:
    small = prepared_store(write_folder(tmp_path / "small", {IDS[0]: tumour()}))
    codes, image = np.pad(tumour(), 6), np.pad(store.load(IDS[1]).images["t1n"].window(Box((0, 0, 0), SHAPE)), 6)
    case = small.load(IDS[0])
    grid = type(case.grid)((36, 32, 28), case.grid.affine)
    large = Prepared(IDS[1], grid, grid, dict.fromkeys(GLIOMA_MRI, Boxed.tight(image)), Boxed.tight(codes))
    write_table(tmp_path, evaluate_cases(Shifted(), store, IDS[:2]))
    examples = example_slices(Shifted(), tmp_path, [case, large], 2)  # type: ignore[arg-type]
    assert examples["predictions"].shape[2:] == examples["truth"].shape[1:] == examples["images"].shape[2:]
    for e in range(2):
        np.testing.assert_array_equal(examples["predictions"][e, 0], examples["truth"][e])
        assert (examples["truth"][e] > 0).sum() == 64


# ---- files ---------------------------------------------------------------------------------------------------------


def test_a_run_gets_both_files(store: Store, tmp_path: Path) -> None:
    write_trained(tmp_path, store, STEMS["separable"])
    write_table(tmp_path, evaluate_cases(Shifted(), store, store.ids))
    write_exhibits(tmp_path, store, count=1, device="cpu")
    with np.load(tmp_path / "latents.npz", allow_pickle=False) as latents:
        assert len(latents["before"]) == 15
        latent_pca(latents)
    with np.load(tmp_path / "examples.npz", allow_pickle=False) as examples:
        assert examples["predictions"].shape[:2] == (1, 4)
        example_overlays(examples)


def test_without_a_complete_patient_there_are_latents_and_no_slices(store: Store, tmp_path: Path) -> None:
    write_trained(tmp_path, store, STEMS["separable"], test=IDS[2:])
    write_table(tmp_path, evaluate_cases(Shifted(), store, IDS[2:]))
    write_exhibits(tmp_path, store, device="cpu")
    assert (tmp_path / "latents.npz").is_file()
    assert not (tmp_path / "examples.npz").exists()
