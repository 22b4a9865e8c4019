"""Several processes train what one would have trained. Two on a CPU stand for any number of devices."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up_processes import (
    in_two_processes,
    joined,
    loss_of_rows,
    means,
    srun,
    torchrun,
    trained,
    trained_without_draws,
)
from made_up_training import THREE, Interrupted, config, interrupt_at, patients, quick_and_exact, rows, state, tensors
from torch import Tensor

from medmap import train
from medmap.align import Output
from medmap.core.modality import ModalitySet
from medmap.criterion import DiceCE, total_loss
from medmap.data.dataset import Patients, training_batch
from medmap.data.store import Store
from medmap.errors import ConfigError, DivergenceError, InputError
from medmap.models.backbone import Auxiliary
from medmap.parallel import MEDMAP, SRUN, TORCHRUN, Crew, crew_of, launch
from medmap.train import fit

# Stochastic gradient descent moves weights by what their gradients are; Adam would move one whose gradient is 0 but for
# the order of a sum by as much as any other.
LINEAR = config(
    data={"modalities": THREE, "folds": 6, "val_fraction": 0.4}, train__optimizer="sgd", train__momentum=0.9
)
LAST_BIT = 5e-6
"""Relative, and of weights of order 1: sums over other halves of a batch, six steps long."""
GRADIENT = 1e-3
"""Relative: on the way back through normalisations of a few voxels the last bits grow."""


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    with quick_and_exact():
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six patients; several lack sequences. One tests, two validate, three train."""
    return patients(tmp_path_factory.mktemp("six"), 6, seed=5, missing=0.2).path


@pytest.fixture(scope="module")
def alone(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    fit(LINEAR, Store(store), run, device="cpu")
    return run


def assert_same_run(run: Path, other: Path) -> None:
    """Every loss, term, gradient, score and weight but for the order of sums; all validation scores alike."""
    one, two = rows(run), rows(other)
    assert [(row["kind"], row["step"]) for row in one] == [(row["kind"], row["step"]) for row in two]
    for a, b in zip(one, two, strict=True):
        if a["kind"] == "train":
            assert b["loss"] == pytest.approx(a["loss"], rel=LAST_BIT)
            assert b["terms"] == pytest.approx(a["terms"], rel=20 * LAST_BIT)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=GRADIENT)
            assert b["lr"] == a["lr"]
        else:
            assert b["cases"] == a["cases"] > 1
            assert b["subsets"].keys() == a["subsets"].keys()
            assert b["mean"] == pytest.approx(a["mean"], abs=1e-3)
            assert b["latents"].keys() == a["latents"].keys() == {"x3", "x4"}
            for level, latents in a["latents"].items():
                assert set(latents) == {"gap", "chance", "std", "std_min", "rank"}
                assert b["latents"][level] == pytest.approx(latents, rel=1e-3)
    for stem in ("model", "ema"):
        here, there = tensors(run, "last", stem), tensors(other, "last", stem)
        for name, tensor in here.items():
            torch.testing.assert_close(there[name], tensor, rtol=0, atol=LAST_BIT)


# ---- the same run ------------------------------------------------------------------------------------------------


def test_two_processes_have_the_losses_and_weights_of_one_with_the_whole_batch(
    store: Path, alone: Path, tmp_path: Path
) -> None:
    given = in_two_processes(trained, store, [(LINEAR, tmp_path / "run")])
    assert_same_run(alone, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "env.json").read_text())["processes"] == 2
    # No case twice in an epoch, neither in a process nor in both.
    split = json.loads((alone / "splits.json").read_text())["train"]
    visits = [case for step in zip(*given, strict=True) for case in step]
    assert (len(visits), len(split)) == (12, 3)
    for epoch in range(4):
        assert sorted(visits[3 * epoch : 3 * epoch + 3]) == sorted(split)


@pytest.mark.parametrize("first", [1, 2])
def test_a_run_goes_on_with_another_number_of_processes(store: Path, alone: Path, tmp_path: Path, first: int) -> None:
    run = tmp_path / "run"
    if first == 1:
        with pytest.raises(Interrupted):
            fit(LINEAR, Store(store), run, device="cpu", on_row=interrupt_at("train", 4))
        assert state(run, "last")["step"] == 2
        in_two_processes(trained, store, [(LINEAR, run)], True)
    else:
        one, two = in_two_processes(trained, store, [(LINEAR, run)], False, ("train", 4))
        assert (type(one), type(two)) == (Interrupted, SystemExit)
        assert state(run, "last")["step"] == 2
        fit(LINEAR, Store(store), run, device="cpu", resume=True)
    assert_same_run(alone, run)


def test_rows_of_a_batch_are_those_of_the_whole(store: Path) -> None:
    cases, names, where = Store(store), ModalitySet(tuple(THREE)), torch.device("cpu")
    settings = config(train__batch_size=4)
    chosen = Patients(cases, cases.ids, names)
    whole = training_batch(chosen, names, settings, 3, where)
    for part in (slice(0, 2), slice(2, 4)):
        own = training_batch(chosen, names, settings, 3, where, rows=part)
        assert own.ids == whole.ids[part]
        for mine, every in zip(own[:4], whole[:4], strict=True):
            assert torch.equal(mine, every[part])


def test_every_network_trains_as_alone_and_srun_may_start_it(store: Path, tmp_path: Path) -> None:
    levels = {"pmkl": "x4", "acn": "private", "mmformer": "x4", "rfnet": "x4", "uhved": "x4"}
    short = {"train__steps": 2, "train__batch_size": 4, "train__optimizer": "sgd", "data__val_fraction": 0}
    chosen = {
        name: config(model={"name": name, "size": "tiny"}, align={"anchor": "pstar", "levels": [level]}, **short)
        for name, level in levels.items()
    }
    chosen["mmformer"] = config(model={"name": "mmformer", "size": "tiny"}, **short, train__patch=[32, 32, 32])
    one, two = ([(each, tmp_path / which / name) for name, each in chosen.items()] for which in ("one", "two"))
    in_two_processes(trained_without_draws, store, two, starter="srun")
    trained_without_draws(store, one)
    for (_, here), (_, there) in zip(one, two, strict=True):
        pairs = list(zip(rows(here, "train"), rows(there, "train"), strict=True))
        # PMKL's students begin in the second step: what each learns from the teacher is a mean over processes.
        for a, b in pairs[:1] if here.name == "pmkl" else pairs:
            assert b["terms"] == pytest.approx(a["terms"], rel=10 * LAST_BIT), here.name
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=GRADIENT), here.name
        assert pairs[1][0]["terms"].keys() == pairs[1][1]["terms"].keys()
        assert math.isfinite(pairs[1][1]["loss"])


# ---- the loss of all rows ----------------------------------------------------------------------------------------


def made_up_output() -> tuple[Output, Tensor]:
    """Four rows; one auxiliary answer counts in three of them, another in the last alone."""
    draws = torch.Generator().manual_seed(0)
    logits, other = (torch.randn(4, 4, 3, 4, 5, generator=draws) for _ in range(2))
    masks = torch.tensor([[True, True, False, True], [False, False, False, True]])
    auxiliary = {"deep": Auxiliary(other), "most": Auxiliary(other, masks[0]), "last": Auxiliary(other, masks[1])}
    return Output(logits, auxiliary, {}, {}, {}), torch.randint(0, 4, (4, 3, 4, 5), generator=draws)


def test_the_loss_of_two_processes_is_that_of_all_rows_whatever_counts_where() -> None:
    output, target = made_up_output()
    settings = config(model__loss_weights={"second": 0.5})
    first, second = in_two_processes(joined, loss_of_rows, output, target, settings)
    leaves = {"logits": output.logits.clone().requires_grad_()}
    leaves |= {name: part.logits.clone().requires_grad_() for name, part in output.auxiliary.items()}
    whole = output._replace(
        logits=leaves["logits"],
        auxiliary={name: part._replace(logits=leaves[name]) for name, part in output.auxiliary.items()},
        # a term that only the second process has is the mean over its rows
        losses={"everybody": leaves["logits"].square().mean(), "second": leaves["logits"][2:].mean()},
    )
    loss, terms = total_loss(whole, target, DiceCE(), settings)
    loss.backward()
    for found, found_terms, _ in (first, second):
        assert found == pytest.approx(float(loss.detach()), rel=1e-6)
        assert found_terms == pytest.approx({name: float(term.detach()) for name, term in terms.items()}, rel=1e-6)
    for name, leaf in leaves.items():
        halves = np.concatenate([first[2][name], second[2][name]]) / 2  # the mean that is taken of all gradients
        assert leaf.grad is not None
        np.testing.assert_allclose(halves, leaf.grad.numpy(), rtol=1e-4, atol=1e-8)


def test_means_are_the_same_everywhere_and_a_number_that_is_none_is_so_for_all() -> None:
    first, second = in_two_processes(joined, means)
    for found in (first, second):
        assert found["mean"] == [1.0, 2.5]
        assert found["gradient"] == [3.0, 3.0]
        assert found["there"] == 5.0
        assert found["nan"]
        assert found["gathered"] == ["of 0", "of 1"]
    assert first["seed"] == train._step_seed(0, 3) != second["seed"]


# ---- who is there ------------------------------------------------------------------------------------------------


def test_the_crew_is_what_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*torchrun(0), *srun(0)]:
        monkeypatch.delenv(name, raising=False)
    assert (crew_of(), crew_of(3)) == (Crew(1), Crew(3, 1, MEDMAP))
    with monkeypatch.context() as patch:
        for name, value in srun(1).items():
            patch.setenv(name, value)
        assert crew_of() == crew_of(1) == Crew(1, 2, SRUN)
        assert (crew_of().size, crew_of().number, crew_of().is_echo) == (2, 1, False)
        with pytest.raises(ConfigError, match=r"--devices 4: srun has started 1 processes on this machine"):
            crew_of(4)
        patch.delenv("SLURM_STEP_ID")  # the job's own script, of which there is one
        assert crew_of(2) == Crew(2, 1, MEDMAP)
        patch.setenv("SLURM_STEP_ID", "0")
        patch.delenv("SLURM_NTASKS_PER_NODE")
        with pytest.raises(ConfigError, match=r"srun: started 2 processes .* --ntasks-per-node=N"):
            crew_of()
    with monkeypatch.context() as patch:
        for name, value in (torchrun(5) | {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"}).items():
            patch.setenv(name, value)
        assert crew_of() == Crew(4, 2, TORCHRUN)
        assert (crew_of().size, crew_of().number, crew_of().is_echo) == (8, 5, True)


def test_a_batch_that_cannot_be_divided_is_refused(store: Path, tmp_path: Path) -> None:
    Crew(2).check_batch(4)
    with pytest.raises(ConfigError, match=r"batch_size: 3 .* among 2 \(--devices\); set it to 2 or 4, or take"):
        fit(config(train__batch_size=3), Store(store), tmp_path / "run", device="cpu", devices=2)
    with pytest.raises(ConfigError, match=r"batch_size: 2 .* among 8 \(torchrun\); set it to 8,"):
        Crew(4, 2, TORCHRUN).check_batch(2)
    assert not (tmp_path / "run").exists()


def test_devices_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"--device cuda:1: names one device for 2 processes; say cuda"):
        launch(Crew(2), torch.device("cuda", 1), bf16=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=r"srun: 4 processes on a machine that shows each of them 1 GPUs"):
        launch(Crew(4, 1, SRUN), torch.device("cuda"), bf16=False)


# ---- the end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("nan", DivergenceError, r"^step 2: dice_ce, loss is not finite"),
        ("input", InputError, r"^the disk of machine 1$"),
    ],
)
def test_what_goes_wrong_in_one_process_stops_all_and_is_told_once(
    store: Path, tmp_path: Path, fault: str, kind: type[Exception], words: str
) -> None:
    found = in_two_processes(trained, store, [(LINEAR, tmp_path / "run")], False, None, fault)
    told = [error for error in found if not isinstance(error, SystemExit)]
    assert len(told) == 1
    with pytest.raises(kind, match=words):
        raise told[0]
    assert state(tmp_path / "run", "last")["step"] == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [1]


# ---- the commands ------------------------------------------------------------------------------------------------


def medmap(*words: Any, by: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *by, "-m", "medmap", *map(str, words)]
    # MONAI imports ignite where it is installed (it comes with the bundles' tests), and ignite what torch calls old
    shown = "default,ignore::DeprecationWarning:torch.jit._script"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "PYTHONWARNINGS": shown}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)


def test_the_command_starts_as_many_as_it_is_told_and_torchrun_goes_on(store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    chosen = LINEAR.model_copy(update={"train": LINEAR.train.model_copy(update={"steps": 2, "checkpoint_every": 1})})
    (tmp_path / "c.yaml").write_text(chosen.to_yaml())
    words = ("train", "-c", tmp_path / "c.yaml", "-d", store, "-o", run, "--device", "cpu")
    done = medmap(*words, "--devices", "2")
    assert done.returncode == 0, done.stderr
    assert "device    2 × cpu, fp32, seed 0" in done.stdout
    assert done.stdout.count("\nnext: medmap evaluate") == done.stdout.count("step 2: validation") == 1
    assert {line.split("/")[0] for line in done.stderr.splitlines()} <= {"training 1", "training 2"}
    (run / "config.yaml").write_text(chosen.to_yaml().replace("steps: 2", "steps: 3"))
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    done = medmap("train", "--resume", run, "--device", "cpu", by=torchrun)
    assert done.returncode == 0, done.stderr
    assert "goes on from step 2" in done.stdout
    assert [row["step"] for row in rows(run, "train")] == [1, 2, 3]
    again = medmap("train", "--resume", run, by=torchrun)
    assert again.returncode == 1
    assert again.stderr.count("error: ") == again.stderr.count("is finished, step 3") == 1
