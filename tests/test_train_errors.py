from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning_fabric
import pytest
import torch
from made_up_training import (
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

from medmap import align, criterion, train
from medmap.align import Output
from medmap.checkpoint import load_network
from medmap.config import Config
from medmap.core.labels import SCHEMES, LabelScheme
from medmap.core.modality import ModalitySet
from medmap.data.layouts import recognise
from medmap.data.store import Store, write_store
from medmap.errors import CheckpointError, ConfigError, DivergenceError, InputError
from medmap.phantom import Settings, write_phantoms
from medmap.run import ModelCard, read_run, write_run
from medmap.state import fresh, start_from
from medmap.train import fit

GLIOMA = SCHEMES["brats2023"]


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    with quick_and_exact():
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Five patients; several lack sequences."""
    return patients(tmp_path_factory.mktemp("store"), 5, seed=5, missing=0.2)


@pytest.fixture(scope="module")
def finished(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, aligned."""
    run = tmp_path_factory.mktemp("finished") / "run"
    fit(config(train__steps=2, train__warmup_steps=0, data__val_fraction=0), store, run, device="cpu")
    return run


@pytest.fixture(scope="module")
def unaligned(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps that knew no anchor."""
    run = tmp_path_factory.mktemp("unaligned") / "run"
    fit(config(train__steps=2, align__alpha=0, data__val_fraction=0), store, run, device="cpu")
    return run


# ---- divergence --------------------------------------------------------------------------------------------------


def spoilt_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """The alignment of level x4 is not a number in step 4 (each step aligns two levels)."""
    original, calls = align.alignment_loss, []

    def spoilt(*arguments: Any) -> Tensor:
        calls.append(1)
        value: Tensor = original(*arguments)
        return value * math.nan if len(calls) == 8 else value

    monkeypatch.setattr(align, "alignment_loss", spoilt)


def spoilt_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = criterion.total_loss, []

    def spoilt(output: Output, *others: Any) -> tuple[Tensor, dict[str, Tensor]]:
        calls.append(1)
        loss, terms = original(output, *others)
        return (loss + (0 * output.logits.sum()).sqrt() if len(calls) == 4 else loss), terms

    monkeypatch.setattr(criterion, "total_loss", spoilt)


def spoilt_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "learning_rate", lambda config, step, stages: math.inf if step == 3 else 1e-3)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoilt_loss, "step 4: align/x4, loss is not finite"),
        (spoilt_gradient, "step 4: gradient is not finite"),
        (spoilt_weights, "step 4: weights is not finite"),
    ],
)
def test_divergence_names_term_and_step_and_leaves_the_last_good_checkpoint(
    store: Store, tmp_path: Path, spoil: Callable[[pytest.MonkeyPatch], None], words: str
) -> None:
    run, settings = tmp_path / "run", config(train__checkpoint_every=1, data__val_fraction=0)
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch)
        with pytest.raises(DivergenceError, match=rf"^{words}\. The last good checkpoint is kept in checkpoints/last"):
            fit(settings, store, run, device="cpu")
    assert state(run, "last")["step"] == state(run, "best")["step"] == 3
    for which, stem in (("last", "model"), ("last", "ema"), ("last", "optimizer"), ("best", "model")):
        assert all(torch.isfinite(tensor).all() for tensor in tensors(run, which, stem).values())
    assert [row["step"] for row in rows(run)] == [1, 2, 3]
    fit(settings, store, run, device="cpu", resume=True)
    assert rows(run)[-1]["step"] == 6


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_learning_rate_beyond_reason_is_a_divergence(store: Store, tmp_path: Path, optimizer: str) -> None:
    wild = config(train__lr=1e12, train__warmup_steps=0, train__optimizer=optimizer)
    with pytest.raises(DivergenceError, match=r"^step 2: .*loss is not finite.* Lower train\.lr"):
        fit(wild, store, tmp_path / "run", device="cpu")
    assert load_network(tmp_path / "run", "last")  # that of the start


# ---- starting from another run -----------------------------------------------------------------------------------


def hardly_moving(**changes: Any) -> Config:
    return config(train__steps=1, train__lr=1e-12, train__warmup_steps=0, data__val_fraction=0, **changes)


def test_a_run_starts_from_the_best_weights_of_another(store: Store, finished: Path, tmp_path: Path) -> None:
    fit(hardly_moving(seed=5), store, tmp_path / "run", device="cpu", init=finished)
    start = tensors(finished, "best", "model")
    for stem in ("model", "ema"):
        found = tensors(tmp_path / "run", "last", stem)
        assert found.keys() == start.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, start[name], atol=1e-9, rtol=1e-6)
    assert state(tmp_path / "run", "last")["step"] == 1


def test_alignment_can_be_added_to_a_run_that_had_none(store: Store, unaligned: Path, tmp_path: Path) -> None:
    fit(hardly_moving(), store, tmp_path / "run", device="cpu", init=unaligned)
    start, found = tensors(unaligned, "best", "model"), tensors(tmp_path / "run", "last", "model")
    assert found.keys() - start.keys() == {"anchors.x3.theta", "anchors.x4.theta"}
    for name, tensor in start.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-9, rtol=1e-6)


def test_a_run_that_began_from_another_resumes_from_there(store: Store, unaligned: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        fit(config(), store, tmp_path, device="cpu", init=unaligned, on_row=interrupt_at("train", 1))
    start, found = tensors(unaligned, "best", "model"), tensors(tmp_path, "last", "model")
    assert equal({name: found[name] for name in start}, start)


@pytest.mark.parametrize(
    ("changes", "sides"),
    [
        ({"model__size": "small"}, "model is unet tiny, stem none, wanted here unet small, stem none"),
        ({"model__name": "rfnet", "align__levels": ["x4"]}, "model is unet tiny, stem none, wanted here rfnet tiny"),
        ({"model__stem": "joint"}, "model is unet tiny, stem none, wanted here unet tiny, stem joint"),
        ({"data__modalities": ["t2f", "t2w"]}, "set of modalities is .*, wanted here t2w t2f"),
    ],
)
def test_weights_of_another_network_are_no_start(
    store: Store, finished: Path, tmp_path: Path, changes: dict[str, Any], sides: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"--init .*: weights of another network: {sides}"):
        fit(config(**changes), store, tmp_path / "run", device="cpu", init=finished)
    assert not (tmp_path / "run").exists()


def test_weights_of_anchors_do_not_change_places(finished: Path) -> None:
    run = finished
    _, card = read_run(run)
    turned = replace(card, modalities=ModalitySet(card.modalities.names[::-1]))
    with pytest.raises(CheckpointError, match="weights of another network: set of modalities is"):
        start_from(run, fresh(config(), turned, torch.device("cpu")), config(), turned)


def test_weights_of_other_classes_are_no_start(finished: Path) -> None:
    _, card = read_run(finished)
    scheme = LabelScheme("liver", ("background", "a", "b", "c"), {"a": 1, "b": 2, "c": 3})
    liver = replace(card, scheme=scheme)
    with pytest.raises(CheckpointError, match=r"classes is .*, wanted here background a b c"):
        start_from(finished, fresh(config(), liver, torch.device("cpu")), config(), liver)


def test_a_start_must_be_one_run(store: Store, tmp_path: Path) -> None:
    for fold in ("fold0", "fold1"):
        write_run(tmp_path / "runs" / fold, config(), ModelCard(ModalitySet(("t1c",)), GLIOMA, None))
    with pytest.raises(CheckpointError, match=r"--init .*runs: holds 2 runs \(.*fold0, …\); name one of them"):
        fit(config(), store, tmp_path / "run", device="cpu", init=tmp_path / "runs")
    with pytest.raises(CheckpointError, match=r"nowhere does not exist"):
        fit(config(), store, tmp_path / "run", device="cpu", init=tmp_path / "nowhere")


# ---- refused before the first step -------------------------------------------------------------------------------


def test_a_run_is_not_overwritten(store: Store, finished: Path) -> None:
    run = finished
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"run already holds a run; go on with `medmap train --resume"):
        fit(config(seed=1), store, run, device="cpu")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("patch", [[16, 20, 16], [8, 16, 16], [16, 16, 17]])
def test_a_patch_must_suit_the_networks_stride(store: Store, tmp_path: Path, patch: list[int]) -> None:
    words = rf"train.patch: \[{', '.join(map(str, patch))}\] .* of 8 .*: the nearest is \[16, 16, 16\]"
    with pytest.raises(ConfigError, match=words):
        fit(config(train__patch=patch), store, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_data_without_segmentations_cannot_teach(tmp_path: Path) -> None:
    ids = write_phantoms(tmp_path / "raw", 2, 0, Settings(spacing_mm=4.0))
    for case in ids:
        (tmp_path / "raw" / case / f"{case}-seg.nii.gz").unlink()
    write_store(recognise(tmp_path / "raw"), tmp_path / "store")
    with pytest.raises(ConfigError, match=r"store: the data have no segmentations; training needs them"):
        fit(config(), Store(tmp_path / "store"), tmp_path / "run", device="cpu")


def test_a_modality_that_the_data_do_not_have_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"modality adc is not one of t1n, t1c, t2w, t2f"):
        fit(config(data__modalities=["adc", "t2f"]), store, tmp_path / "run", device="cpu")


def test_a_place_that_cannot_be_written_is_one_sentence(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/run: cannot be written \(.*\); make room, or choose a folder"):
        fit(config(), store, tmp_path / "file" / "run", device="cpu")


@pytest.mark.parametrize(("index", "asked"), [(1, [1]), (None, 1)])
def test_the_gpu_that_was_named_is_the_one_that_trains(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: int | None, asked: Any
) -> None:
    found: dict[str, Any] = {}

    def fabric(**settings: Any) -> None:
        found.update(settings)
        raise Interrupted

    monkeypatch.setattr(lightning_fabric, "Fabric", fabric)
    monkeypatch.setattr(
        train, "resolve_device", lambda device: torch.device("cuda") if index is None else torch.device("cuda", index)
    )
    with pytest.raises(Interrupted):
        fit(config(), store, tmp_path / "run", device="cuda")
    assert found == {"accelerator": "cuda", "devices": asked, "precision": "32-true"}
