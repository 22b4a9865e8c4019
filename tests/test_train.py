from __future__ import annotations

import csv
import json
import math
import pickle
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up_training import (
    THREE,
    Interrupted,
    Row,
    config,
    equal,
    interrupt_at,
    patients,
    quick_and_exact,
    rows,
    state,
    tensors,
)

from medmap import criterion, train
from medmap.checkpoint import load_network
from medmap.cli.jobs import STOPPED, Job, checked
from medmap.config import Config
from medmap.core.labels import SCHEMES
from medmap.core.modality import ModalitySet
from medmap.data.dataset import Patients
from medmap.data.splits import choose_split
from medmap.data.store import Store
from medmap.errors import CheckpointError
from medmap.run import read_log, read_run
from medmap.state import fresh
from medmap.train import _aside, examined, fit, full_and_missing, learning_rate, over_patients

GLIOMA = SCHEMES["brats2023"]
SETTINGS: dict[str, Config] = {
    "fp32, adamw": config(),
    "bf16, sgd": config(train__precision="bf16", train__optimizer="sgd", align__fill="kept", train__log_every=2),
}


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    with quick_and_exact():
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Five patients; several lack sequences."""
    return patients(tmp_path_factory.mktemp("store"), 5, seed=5, missing=0.2)


@pytest.fixture(scope="module")
def done(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run that nobody interrupted, by the name of its settings; trained when it is first asked for."""
    runs: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in runs:
            runs[name] = tmp_path_factory.mktemp("done") / "run"
            fit(SETTINGS[name], store, runs[name], device="cpu")
        return runs[name]

    return run


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty steps on one patient, without alignment, validation or augmentation."""
    root = tmp_path_factory.mktemp("overfitted")
    recipe = {"steps": 30, "lr": 0.02, "schedule": "constant", "foreground": 1.0, "warmup_steps": 3}
    alone = config(
        data={"modalities": THREE, "folds": 2, "val_fraction": 0},
        augment={"enabled": False},
        sampling={"subsets": "full"},
        align__alpha=0,
        **{f"train__{key}": value for key, value in recipe.items()},
    )
    fit(alone, patients(root, 2, seed=0), root / "run", device="cpu")
    return root / "run"


def without_seconds(log: list[Row]) -> list[Row]:
    return [{key: value for key, value in row.items() if key not in ("seconds", "waiting")} for row in log]


def assert_same_run(run: Path, other: Path) -> None:
    """Weights, moving average, optimiser, the best of all and the log: bit for bit, but for the clock."""
    for which, stem in (("last", "model"), ("last", "ema"), ("last", "optimizer"), ("best", "model")):
        assert equal(tensors(run, which, stem), tensors(other, which, stem)), (which, stem)
    for which in ("last", "best"):
        assert without_seconds([state(run, which)]) == without_seconds([state(other, which)])
    assert without_seconds(rows(run)) == without_seconds(rows(other))
    tables = []
    for folder in (run, other):
        with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
            tables.append(without_seconds(list(csv.DictReader(file))))
    assert tables[0] == tables[1]


# ---- interrupted and resumed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "step", "goes_on_from"),
    [
        ("fp32, adamw", "train", 5, 4),
        ("fp32, adamw", "train", 1, 0),
        ("fp32, adamw", "val", 3, 2),  # the best is of step 3 then, and the last of step 2
        ("bf16, sgd", "val", 6, 4),
    ],
)
def test_an_interrupted_run_ends_bit_for_bit_like_one_that_was_not(
    store: Store, done: Callable[[str], Path], tmp_path: Path, name: str, kind: str, step: int, goes_on_from: int
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        fit(SETTINGS[name], store, run, device="cpu", on_row=interrupt_at(kind, step))
    assert state(run, "last")["step"] == goes_on_from
    torch.manual_seed(99)  # the state of the machine's own generator must not matter
    seen: list[Row] = []
    fit(SETTINGS[name], store, run, device="cpu", resume=True, on_row=seen.append)
    assert min(row["step"] for row in seen) == goes_on_from + (2 if name.startswith("bf16") else 1)
    assert_same_run(run, done(name))


@pytest.mark.parametrize("step", [2, 3])
def test_a_teacher_and_students_go_on_where_they_were_interrupted(store: Store, tmp_path: Path, step: int) -> None:
    """At the last step of the teacher, and at the first of the students."""
    four = config(model={"name": "pmkl", "size": "tiny"}, train__steps=4, data__val_fraction=0)
    fit(four, store, tmp_path / "whole", device="cpu")
    with pytest.raises(Interrupted):
        fit(four, store, tmp_path / "parts", device="cpu", on_row=interrupt_at("train", step))
    fit(four, store, tmp_path / "parts", device="cpu", resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_run_may_be_interrupted_again_and_again(store: Store, done: Callable[[str], Path], tmp_path: Path) -> None:
    run, name = tmp_path / "run", "fp32, adamw"
    for resume, step in ((False, 2), (True, 3), (True, 5)):
        with pytest.raises(Interrupted):
            fit(SETTINGS[name], store, run, device="cpu", resume=resume, on_row=interrupt_at("train", step))
    with (run / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 4, "lo')  # and the last line was never finished
    fit(SETTINGS[name], store, run, device="cpu", resume=True)
    assert_same_run(run, done(name))


def test_a_network_that_draws_numbers_itself_draws_the_same_ones_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = criterion.total_loss

    def shaken(*arguments: Any) -> Any:  # as dropout would
        loss, terms = original(*arguments)
        return loss * (1 + torch.rand(())), terms

    monkeypatch.setattr(criterion, "total_loss", shaken)
    short = config(train__steps=3, data__val_fraction=0)
    fit(short, store, tmp_path / "whole", device="cpu")
    with pytest.raises(Interrupted):
        fit(short, store, tmp_path / "parts", device="cpu", on_row=interrupt_at("train", 3))
    torch.manual_seed(99)
    fit(short, store, tmp_path / "parts", device="cpu", resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(store: Store, done: Callable[[str], Path]) -> None:
    run = done("fp32, adamw")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    fit(SETTINGS["fp32, adamw"], store, run, device="cpu", resume=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_resumed_run_learns_from_the_patients_it_was_begun_with(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list was edited meanwhile, or another folder has another list of that name: testers must not teach."""
    run, mine, ids = tmp_path / "run", tmp_path / "mine.json", list(store.ids)
    monkeypatch.chdir(tmp_path)
    mine.write_text(json.dumps({"train": ids[:2], "test": ids[2:]}), encoding="utf-8")
    short = config(align="none", train__steps=2, data__split="mine.json")
    with pytest.raises(Interrupted):
        fit(short, store, run, device="cpu", on_row=interrupt_at("train", 1))
    mine.write_text(json.dumps({"train": ids[2:], "test": ids[:2]}), encoding="utf-8")
    taught: list[str] = []
    original = train.training_batch

    def heard(cases: Patients, *rest: Any) -> Any:
        taught.extend(cases.ids)
        return original(cases, *rest)

    monkeypatch.setattr(train, "training_batch", heard)
    fit(short, store, run, device="cpu", resume=True)
    assert set(taught) == set(ids[:2])
    assert checked(Job(short, run, STOPPED), store).to_dict() == json.loads((run / "splits.json").read_text())


def test_a_run_that_was_never_begun_cannot_be_resumed(store: Store, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="run: no checkpoint 'last'"):
        fit(config(), store, tmp_path / "run", device="cpu", resume=True)
    assert not (tmp_path / "run").exists()


def test_training_moves_every_part_of_the_network_that_was_used(done: Callable[[str], Path]) -> None:
    run = done("fp32, adamw")
    _, card = read_run(run)
    torch.manual_seed(0)
    start = fresh(config(), card, torch.device("cpu")).network.state_dict()
    end = tensors(run, "last", "model")
    still = {name for name in start if torch.equal(start[name], end[name])}
    assert still == set()


# ---- what a run leaves behind ------------------------------------------------------------------------------------


def test_rows_of_the_log_have_the_documented_keys(done: Callable[[str], Path]) -> None:
    log = rows(done("fp32, adamw"))
    assert [(row["kind"], row["step"]) for row in log] == [
        ("train", 1),
        ("train", 2),
        ("train", 3),
        ("val", 3),
        ("train", 4),
        ("train", 5),
        ("train", 6),
        ("val", 6),
    ]
    for row in rows(done("fp32, adamw"), "train"):
        named = {
            "kind",
            "step",
            "steps",
            "loss",
            "terms",
            "lr",
            "grad_norm",
            "weights",
            "latents",
            "seconds",
            "waiting",
        }
        assert set(row) == named
        assert row["steps"] == 6
        assert 0 < row["waiting"] < 1
        assert set(row["terms"]) == {"dice_ce", "align/x3", "align/x4"}
        aligned = (row["terms"]["align/x3"] + row["terms"]["align/x4"]) / 2
        assert row["loss"] == pytest.approx(row["terms"]["dice_ce"] + 0.1 * aligned, rel=1e-5)
        assert row["lr"] == learning_rate(config().train, row["step"] - 1)
        for level in ("x3", "x4"):
            assert list(row["weights"][level]) == THREE
            assert sum(row["weights"][level].values()) == pytest.approx(1, abs=1e-5)
            assert set(row["latents"][level]) == {"std", "std_min", "rank"}
            assert 1 <= row["latents"][level]["rank"] <= {"x3": 32, "x4": 48}[level]
    seconds = [row["seconds"] for row in rows(done("fp32, adamw"), "train")]
    assert all(a < b for a, b in pairwise([0.0, *seconds]))


def test_validation_asks_every_subset_and_the_best_is_kept(store: Store, done: Callable[[str], Path]) -> None:
    run = done("fp32, adamw")
    split = json.loads((run / "splits.json").read_text(encoding="utf-8"))
    val = Patients(store, split["val"], ModalitySet(tuple(THREE)))
    best = -math.inf
    for row in rows(run, "val"):
        named = {"kind", "step", "mean", "subsets", "cases", "latents", "weights"}
        assert set(row) - {"best", "full", "missing", "cost"} == named
        assert row["cases"] == len(val) == 1
        assert set(row["subsets"]) == {str(s) for s in ModalitySet(tuple(val[0].images)).subsets()}
        assert row["mean"] == pytest.approx(np.mean([list(r.values()) for r in row["subsets"].values()]))
        full = row["subsets"].get("+".join(THREE))
        assert row.get("full") == (full and pytest.approx(np.mean(list(full.values()))))
        assert row.get("best", False) == (row["mean"] > best)
        best = max(best, row["mean"])
        if row.get("best"):
            kept = row
    assert state(run, "best") == {"step": kept["step"], "validation_mean_dice": kept["mean"]}
    assert state(run, "last")["best"] == best
    # It is the smoothed weights that are asked, and that are kept.
    for which, row in (("best", kept), ("last", rows(run, "val")[-1])):
        network = load_network(run, which)
        answers, latents = examined(network, GLIOMA, val, "fp32")
        assert (over_patients(answers), latents) == (row["subsets"], row["latents"])
        assert full_and_missing(answers, "+".join(THREE)).items() <= row.items()
    # The anchor's weights are those that are being learned: a gate's mean over steps never saw a case.
    network.load_state_dict(tensors(run, "last", "model"))
    assert rows(run, "val")[-1]["weights"] == network.anchor_weights()
    assert not equal(tensors(run, "last", "ema"), tensors(run, "last", "model"))


def test_a_worse_validation_does_not_replace_the_best(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.5, 0.7, 0.6, 0.6])
    monkeypatch.setattr(train, "examined", lambda *arguments: ([{"t1c": {"WT": next(scores)}}], {}))
    short = config(train__steps=3, train__validate_every=1, train__checkpoint_every=1)
    with pytest.raises(Interrupted):
        fit(short, store, tmp_path / "run", device="cpu", on_row=interrupt_at("val", 3))
    fit(short, store, tmp_path / "run", device="cpu", resume=True)
    assert state(tmp_path / "run", "best") == {"step": 2, "validation_mean_dice": 0.7}
    assert state(tmp_path / "run", "last")["best"] == 0.7
    assert [row.get("best") for row in rows(tmp_path / "run", "val")] == [True, True, None]


def test_a_run_for_one_subset_is_chosen_by_it(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it was never taught gets worse meanwhile, and says nothing."""
    scores = iter([(0.5, 0.9), (0.7, 0.1)])

    def examined(*arguments: Any) -> tuple[list[dict[str, dict[str, float]]], dict[str, Any]]:
        taught, other = next(scores)
        return [{"t2w": {"WT": taught}, "t1c": {"WT": other}}], {}

    monkeypatch.setattr(train, "examined", examined)
    short = config(train__steps=2, train__validate_every=1, train__checkpoint_every=1, sampling={"subsets": "t2w"})
    fit(short, store, tmp_path / "run", device="cpu")
    assert state(tmp_path / "run", "best") == {"step": 2, "validation_mean_dice": 0.7}


def test_a_run_says_where_it_comes_from(store: Store, done: Callable[[str], Path]) -> None:
    run = done("bf16, sgd")
    written, card = read_run(run)
    assert written == SETTINGS["bf16, sgd"]
    assert (card.modalities.names, card.scheme, card.spacing_mm) == (tuple(THREE), GLIOMA, 4.0)
    split = choose_split(written.data, store)
    assert json.loads((run / "splits.json").read_text(encoding="utf-8")) == split.to_dict()
    assert {*split.train, *split.val, *split.test} == set(store.ids)
    environment = json.loads((run / "env.json").read_text(encoding="utf-8"))
    assert environment["store_sha256"] == store.sha256
    assert environment["parameters"] == sum(p.numel() for p in load_network(run).parameters())
    assert environment["device"] == "cpu"


def test_nothing_in_a_run_is_a_pickle(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("pickled")

    for module, name in (
        *((pickle, name) for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler")),
        (torch, "load"),
        (torch, "save"),
    ):
        monkeypatch.setattr(module, name, refuse)
    short = config(train__steps=2, train__checkpoint_every=1)
    fit(short, store, tmp_path / "a", device="cpu")
    fit(config(train__steps=3), store, tmp_path / "a", device="cpu", resume=True)
    fit(short, store, tmp_path / "b", device="cpu", init=tmp_path / "a")
    load_network(tmp_path / "b")
    left = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.suffix for path in left} == {".yaml", ".json", ".jsonl", ".csv", ".safetensors"}
    for path in left:
        if path.suffix != ".safetensors":
            path.read_text(encoding="utf-8")


def test_auto_precision_is_settled_and_written_down(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "resolve_precision", lambda precision, device: {"auto": "bf16"}[precision])
    with pytest.raises(Interrupted):
        fit(config(train__precision="auto"), store, tmp_path, device="cpu", on_row=interrupt_at("train", 1))
    assert read_run(tmp_path)[0].train.precision == "bf16"


def test_bf16_trains_other_numbers_into_weights_of_full_precision(
    store: Store, done: Callable[[str], Path], tmp_path: Path
) -> None:
    fit(config(train__precision="bf16", train__steps=1), store, tmp_path, device="cpu")
    rounded, exact = rows(tmp_path, "train")[0]["loss"], rows(done("fp32, adamw"), "train")[0]["loss"]
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)
    assert {tensor.dtype for tensor in tensors(tmp_path, "last", "model").values()} == {torch.float32}


# ---- it learns ---------------------------------------------------------------------------------------------------


def test_the_loss_on_one_patient_falls(overfitted: Path) -> None:
    losses = [row["loss"] for row in rows(overfitted, "train")]
    assert len(losses) == 30
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3])


def test_without_alignment_there_is_no_trace_of_it(overfitted: Path) -> None:
    for row in rows(overfitted):
        assert set(row) == {"kind", "step", "steps", "loss", "terms", "lr", "grad_norm", "seconds", "waiting"}
        assert row["kind"] == "train"
        assert row["terms"] == {"dice_ce": row["loss"]}
    assert not any(name.startswith("anchors") for name in tensors(overfitted, "last", "model"))


def test_without_validation_the_smoothed_weights_of_the_end_are_shipped(overfitted: Path) -> None:
    assert equal(tensors(overfitted, "best", "model"), tensors(overfitted, "last", "ema"))
    assert state(overfitted, "best") == {"step": 30, "validation_mean_dice": None}


# ---- the log -----------------------------------------------------------------------------------------------------


def test_a_last_line_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    whole = '{"step": 1}\n{"step": 2}\n'
    for torn, steps in (("", [1, 2]), ('{"step": 3', [1, 2]), ('{"step": 3}', [1, 2, 3]), ("\n", None)):
        file.write_text(whole + torn, encoding="utf-8")
        if steps is not None:
            assert [row["step"] for row in read_log(file)] == steps
    file.write_text("", encoding="utf-8")
    assert read_log(file) == []


def test_the_table_is_the_log_flattened(done: Callable[[str], Path]) -> None:
    run = done("fp32, adamw")
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    log = rows(run)
    assert len(table) == len(log)
    for line, row in zip(table, log, strict=True):
        assert (line["kind"], int(line["step"])) == (row["kind"], row["step"])
        if row["kind"] == "train":
            assert float(line["loss"]) == row["loss"]
            assert float(line["weights/x4/t2f"]) == row["weights"]["x4"]["t2f"]
            assert float(line["terms/align/x3"]) == row["terms"]["align/x3"]
            assert line["mean"] == ""
        else:
            assert float(line["mean"]) == row["mean"]
            assert float(line["subsets/t2w/WT"]) == row["subsets"]["t2w"]["WT"]


@pytest.mark.parametrize(("stem", "levels", "mask"), [("none", ["x4"], "seen"), ("joint", ["stem", "x4"], "kept")])
def test_a_stem_that_mixes_is_watched_where_it_may_look(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stem: str, levels: list[str], mask: str
) -> None:
    batches, masks = [], []
    make, watch = train.training_batch, train.latent_spread
    monkeypatch.setattr(train, "training_batch", lambda *given: batches.append(make(*given)) or batches[-1])
    monkeypatch.setattr(train, "latent_spread", lambda z, seen: masks.append(seen) or watch(z, seen))
    rarely = config(model__stem=stem, align__levels=levels, sampling={"subsets": "bernoulli", "keep_probability": 0.2})
    with pytest.raises(Interrupted):
        fit(rarely, store, tmp_path / "run", device="cpu", on_row=interrupt_at("train", 1))
    assert not torch.equal(batches[0].seen, batches[0].kept)
    assert len(masks) == len(levels)
    assert all(torch.equal(found, getattr(batches[0], mask)) for found in masks)


def test_a_thread_beside_the_training_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's current device is a thread's own, and the first where nobody says which."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    for name in ("cuda:1", "cuda", "cpu"):
        _aside(torch.device(name))
    assert chosen == [torch.device("cuda:1")]
