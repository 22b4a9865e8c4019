"""Patients that are simulated while training asks for them: which they are, who makes them, and that runs resume."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.main import get_command

from medmap.checkpoint import load_network
from medmap.cli import app
from medmap.config import Config, PhantomConfig, load_config
from medmap.core.case import Prepared
from medmap.data.dataset import Patients
from medmap.data.splits import choose_split
from medmap.errors import CheckpointError, ClusterError, InputError
from medmap.evaluate import run_store
from medmap.phantom import Settings, write_phantoms
from medmap.stream import PhantomStream, _workers
from medmap.train import fit

TINY = [
    "data.source=phantom",
    "phantom.spacing_mm=4",
    "phantom.val=1",
    "phantom.workers=0",
    "model.size=tiny",
    "align=none",
    "train.steps=4",
    "train.batch_size=1",
    "train.patch=[16, 16, 16]",
    "train.validate_every=2",
    "train.checkpoint_every=2",
]


def config(*more: str) -> Config:
    return load_config(None, [*TINY, *more])


def same(a: Prepared, b: Prepared) -> bool:
    assert a.labels is not None
    assert b.labels is not None
    return a.images.keys() == b.images.keys() and all(
        np.array_equal(x.values, y.values)
        for x, y in zip([*a.images.values(), a.labels], [*b.images.values(), b.labels], strict=True)
    )


def test_a_patient_follows_from_seed_and_number_alone() -> None:
    stream, longer, other = (
        PhantomStream(config()),
        PhantomStream(config("train.steps=9")),
        PhantomStream(config("seed=1")),
    )
    assert longer.ids[: len(stream.ids)] == stream.ids
    assert same(stream.load(stream.ids[2]), longer.load(longer.ids[2]))
    assert not same(stream.load(stream.ids[2]), stream.load(stream.ids[3]))
    assert not same(stream.load(stream.ids[2]), other.load(other.ids[2]))
    assert stream.sha256 == longer.sha256 != other.sha256


def test_a_stream_and_a_written_set_of_one_seed_hold_the_same_patients(tmp_path: Path) -> None:
    stream = PhantomStream(config("phantom.randomised=0"))
    write_phantoms(tmp_path, 2, 0, Settings(spacing_mm=4.0))
    (manifest,) = (json.loads(file.read_text()) for file in tmp_path.glob("*.json"))
    assert [case["seed"] for case in manifest["cases"]] == [stream._seed_of(id) for id in stream.ids[:2]]


def test_one_default_stands_in_configuration_command_and_library() -> None:
    options = {option.name: option.default for option in get_command(app).commands["simulate"].params}  # type: ignore[attr-defined]
    asked = {
        "spacing_mm": "spacing",
        "noise": "noise",
        "noise_correlation": "correlation",
        "bias_correlation": "bias_correlation",
        "operated": "operated",
        "grown": "grown",
    }
    for name, option in asked.items():
        assert getattr(PhantomConfig(), name) == getattr(Settings(), name) == options[option], name


def test_there_is_a_patient_for_every_visit_and_the_first_validate() -> None:
    chosen = config("train.steps=3", "train.batch_size=2", "phantom.val=2")
    stream = PhantomStream(chosen)
    split = choose_split(chosen.data, stream)
    assert (len(split.train), len(split.val), len(split.test)) == (6, 2, 0)
    assert split.val == stream.ids[:2]
    assert not set(split.train) & set(split.val)
    train = Patients(stream, split.train, stream.modalities)
    assert len(train) == 6


def test_a_limited_number_of_patients_comes_again_and_is_simulated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = config("train.steps=6", "train.batch_size=1", "phantom.patients=2")
    stream = PhantomStream(chosen)
    split = choose_split(chosen.data, stream)
    assert (len(split.train), len(split.val)) == (2, 1)
    first = [stream.load(id) for id in split.train]
    monkeypatch.setattr(stream, "_simulated", lambda case_id: pytest.fail(f"{case_id} was simulated again"))
    assert [stream.load(id) for id in split.train] == first
    assert all(same(case, PhantomStream(config()).load(case.id)) for case in first)


def test_another_process_makes_the_same_patient_ahead() -> None:
    here, there = PhantomStream(config()), PhantomStream(config("phantom.workers=1"))
    there.expect(there.ids[1:3])
    assert set(there._coming) == set(there.ids[1:3])
    assert same(there.load(there.ids[1]), here.load(here.ids[1]))
    assert set(there._coming) == {there.ids[2]}


def kill_simulating(stream: PhantomStream) -> None:
    """As the system does where memory is short; returns when the pool has noticed."""
    assert stream._pool is not None
    for process in list(stream._pool._processes.values()):
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    for future in stream._coming.values():
        future.exception(timeout=60)


def test_a_killed_process_costs_nothing_but_the_time_of_its_patients() -> None:
    here, there = PhantomStream(config()), PhantomStream(config("phantom.workers=1"))
    there.expect(there.ids[1:3])
    kill_simulating(there)
    there.expect(there.ids[3:4])  # the pool is broken, and nobody knows yet
    assert same(there.load(there.ids[1]), here.load(here.ids[1]))
    there.expect(there.ids[3:4])
    assert set(there._coming) == {there.ids[3]}
    assert same(there.load(there.ids[3]), here.load(here.ids[3]))
    assert there._deaths == 0


def test_processes_that_are_killed_again_and_again_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed:
        """A pool whose processes are always killed."""

        def __init__(self, *arguments: Any) -> None: ...

        def submit(self, *arguments: Any) -> Future[Prepared]:
            future: Future[Prepared] = Future()
            future.set_exception(BrokenProcessPool("killed"))
            return future

        def shutdown(self, **how: Any) -> None: ...

    monkeypatch.setattr("medmap.stream.ProcessPoolExecutor", Killed)
    monkeypatch.setattr(PhantomStream, "_simulated", lambda self, case_id: None)
    stream = PhantomStream(config("phantom.workers=1"))
    *some, last = stream.ids[1:5]
    for id in some:
        stream.expect([id])
        stream.load(id)
    stream.expect([last])
    with pytest.raises(ClusterError, match=r"killed 4 times in a row \(killed\); .*lower phantom.workers"):
        stream.load(last)


def test_processes_that_train_together_share_the_cores_that_simulate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 12)
    assert (_workers(None), _workers(5)) == (11, 5)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert (_workers(None), _workers(5)) == (3, 5)


def test_an_interrupted_run_ends_with_the_weights_of_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = config()
    fit(whole, PhantomStream(whole), tmp_path / "whole")
    load = PhantomStream.load
    seen: list[str] = []

    def stops(self: PhantomStream, case_id: str) -> Prepared:
        seen.append(case_id)
        if len(seen) == 5:  # two steps, a validation, one more step
            raise KeyboardInterrupt
        return load(self, case_id)

    with monkeypatch.context() as patch:
        patch.setattr(PhantomStream, "load", stops)
        with pytest.raises(KeyboardInterrupt):
            fit(whole, PhantomStream(whole), tmp_path / "cut")
    fit(whole, PhantomStream(whole), tmp_path / "cut", resume=True)
    a, b = (load_network(tmp_path / run, "last").state_dict() for run in ("whole", "cut"))
    assert all(np.array_equal(a[name].numpy(), b[name].numpy()) for name in a)


def test_there_is_no_test_part_to_evaluate_on(tmp_path: Path) -> None:
    short = config("train.steps=1")
    fit(short, PhantomStream(short), tmp_path)
    with pytest.raises(
        CheckpointError, match=r"was trained on phantoms simulated as it went; name patients with --data"
    ):
        run_store(tmp_path)


def test_impossible_phantoms_are_refused_before_training() -> None:
    with pytest.raises(InputError, match=r"spacing: found 9\.0 mm"):
        PhantomStream(config("phantom.spacing_mm=9"))
    with pytest.raises(InputError, match="modality swi: no signal equation"):
        PhantomStream(config("data.modalities=[swi]"))
