from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from made_up_network import tiny_network
from safetensors import SafetensorError
from torch import Tensor, nn

from medmap import checkpoint
from medmap.align import build_segmenter
from medmap.card import read_model
from medmap.checkpoint import (
    flatten_optimizer,
    load_network,
    load_weights,
    read_tensors,
    save_checkpoint,
    unflatten_optimizer,
)
from medmap.config import AlignConfig, Config, ModelConfig, parse_config
from medmap.core.labels import SCHEMES
from medmap.core.modality import GLIOMA_MRI, ModalitySet
from medmap.errors import CheckpointError, InputError
from medmap.run import ModelCard, checkpoint_folder, find_runs, is_finished, read_run, write_run, write_text

CARD = ModelCard(GLIOMA_MRI, SCHEMES["brats2021"], 2.0)
CONFIG = parse_config({"model": {"size": "tiny"}, "align": "pstar", "train": {"lr": 0.003}})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run", CONFIG, CARD)
    return tmp_path / "run"


def fill(run: Path, value: int, which: str = "last") -> None:
    """A checkpoint in which every file says the same number."""
    tensors = {stem: {"w": torch.full((3,), float(value))} for stem in ("model", "ema", "optimizer")}
    save_checkpoint(run, which, tensors, {"step": value})


def content(run: Path, which: str = "last") -> int:
    """The number that a checkpoint says; fails where its files are of different ages."""
    folder = checkpoint_folder(run, which)
    step = int(json.loads((folder / "state.json").read_text(encoding="utf-8"))["step"])
    for stem in ("model", "ema", "optimizer"):
        assert read_tensors(folder / f"{stem}.safetensors")["w"].tolist() == [step] * 3
    return step


# ---- a run and its card ------------------------------------------------------------------------------------------


def test_a_run_reads_back_as_it_was_written(run: Path) -> None:
    config, card = read_run(run)
    assert config == CONFIG
    assert card == CARD
    assert card.scheme.codes["et"] == 4


def test_a_card_without_a_spacing_and_with_other_sequences_reads_back(tmp_path: Path) -> None:
    card = ModelCard(ModalitySet(("adc", "t2f")), SCHEMES["brats2024"], None)
    write_run(tmp_path / "deep" / "run", Config(), card)
    assert read_run(tmp_path / "deep" / "run") == (Config(), card)


@pytest.mark.parametrize("name", ["model.yaml", "config.yaml"])
def test_a_folder_without_card_or_configuration_is_no_run(run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(CheckpointError, match=rf"run: no {name} in it; expected a folder that `medmap train` wrote"):
        read_run(run)


@pytest.mark.parametrize("number", [2, "1", None])
def test_a_card_of_another_format_is_refused(run: Path, number: object) -> None:
    card = yaml.safe_load((run / "model.yaml").read_text(encoding="utf-8"))
    (run / "model.yaml").write_text(yaml.safe_dump({**card, "format": number}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"model.yaml: format {number!r}; this version of medmap reads 1"):
        read_run(run)


@pytest.mark.parametrize(
    "text",
    ["", "][", "format: 1", "- 1", "format: 1\nmodalities: [t1, t1n]\nlabels: {}\nspacing_mm: 1", "\x00"],
    ids=["empty", "no YAML", "half", "a list", "one sequence twice", "binary"],
)
def test_a_damaged_card_is_named_on_one_line(run: Path, text: str) -> None:
    (run / "model.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"^\S+model.yaml: damaged \([^\n]+\); copy the run again$"):
        read_run(run)


def test_runs_are_found_by_name_at_any_depth(run: Path, tmp_path: Path) -> None:
    assert find_runs(run) == [run]
    for name in ("study/seed1/fold0", "study/seed0/fold1", "study/seed0/fold0"):
        write_run(tmp_path / name, CONFIG, CARD)
    (tmp_path / "study" / "notes").mkdir()
    (tmp_path / "study" / "notes" / "config.yaml").touch()  # somebody's own file is no run
    assert [str(found.relative_to(tmp_path / "study")) for found in find_runs(tmp_path / "study")] == [
        "seed0/fold0",
        "seed0/fold1",
        "seed1/fold0",
    ]


def test_no_run_is_said_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere does not exist; expected a run folder"):
        find_runs(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"empty: no run in it \(config.yaml and model.yaml\); train one"):
        find_runs(tmp_path / "empty")


# ---- always a whole checkpoint -----------------------------------------------------------------------------------


def test_a_checkpoint_takes_the_place_of_the_one_before(run: Path) -> None:
    fill(run, 1)
    fill(run, 2)
    fill(run, 7, "best")
    assert (content(run), content(run, "best")) == (2, 7)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best", "last"]
    assert sorted(path.name for path in (run / "checkpoints" / "last").iterdir()) == [
        "ema.safetensors",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]


class Crash(BaseException):
    """The machine stops."""


def crashing(monkeypatch: pytest.MonkeyPatch, after: int) -> Callable[[], int]:
    """The machine stops before the change to the disk number ``after``; a folder is then half deleted already."""
    done = 0

    def stopping(operation: Callable[..., Any]) -> Callable[..., Any]:
        def operate(*arguments: Any, **options: Any) -> Any:
            nonlocal done
            if done == after:
                if operation is rmtree:
                    for file in Path(arguments[0]).glob("*.safetensors"):
                        file.unlink()
                raise Crash
            done += 1
            return operation(*arguments, **options)

        return operate

    rmtree, write_text = shutil.rmtree, Path.write_text
    monkeypatch.setattr(checkpoint.shutil, "rmtree", stopping(rmtree))
    monkeypatch.setattr(checkpoint.os, "replace", stopping(os.replace))
    monkeypatch.setattr(checkpoint, "save_file", stopping(checkpoint.save_file))
    monkeypatch.setattr(Path, "write_text", stopping(write_text))
    return lambda: done


def save_and_crash(run: Path, value: int, after: int) -> bool:
    """Whether the machine stopped before the checkpoint was whole in its place."""
    with pytest.MonkeyPatch.context() as patch:
        crashing(patch, after)
        try:
            fill(run, value)
        except Crash:
            return True
    return False


def test_whenever_the_machine_stops_a_whole_checkpoint_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.os, "fsync", lambda descriptor: None)  # ours is not a machine that stops
    moments = range(10)
    stopped = []
    for first in moments:
        for second in moments:
            run = tmp_path / f"{first}-{second}"
            fill(run, 1)
            stopped.append(save_and_crash(run, 2, first))
            after_one = content(run)
            assert after_one in ((1, 2) if stopped[-1] else (2,)), first
            stopped_again = save_and_crash(run, 3, second)
            assert content(run) in ((after_one, 3) if stopped_again else (3,)), (first, second)
            fill(run, 4)
            assert content(run) == 4
            assert os.listdir(run / "checkpoints") == ["last"]
    assert stopped == [True] * 90 + [False] * 10  # the last moment lies behind all nine changes to the disk


def test_between_two_renames_the_older_copy_answers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(run, 1)
    replace_folder, renamed = os.replace, []

    def second_fails(source: Path, target: Path) -> None:
        if renamed:
            raise Crash
        renamed.append(target)
        replace_folder(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", second_fails)
    with pytest.raises(Crash):
        fill(run, 2)
    assert not (run / "checkpoints" / "last").exists()
    assert content(run) == 1


def test_a_checkpoint_is_on_the_disk_before_the_one_before_it_goes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(run, 1)
    happened = []
    fsync, replace_folder = os.fsync, os.replace

    def flushed(descriptor: int) -> None:
        happened.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", flushed)
    monkeypatch.setattr(checkpoint.os, "replace", lambda a, b: (happened.append("rename"), replace_folder(a, b)))
    fill(run, 2)
    assert sorted(happened[:4]) == ["ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert happened[4:] == ["rename", "rename"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_a_full_disk_is_one_sentence_and_costs_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fill(run, 1)

    def full(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(InputError, match=r"run: cannot be written \(.*No space left on device\); make room"):
        fill(run, 2)
    assert content(run) == 1


def test_a_checkpoint_that_is_not_there_is_asked_for_by_name(run: Path) -> None:
    fill(run, 1)
    with pytest.raises(CheckpointError, match=r"run: no checkpoint 'best', there is last; it is written"):
        load_network(run)


def test_a_text_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.json"
    write_text(file, "old")
    assert save_text_and_crash(file) == "old"
    write_text(file, "new")
    assert file.read_text(encoding="utf-8") == "new"
    assert os.listdir(tmp_path) == ["a.json"]


def save_text_and_crash(file: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        crashing(patch, 1)
        with pytest.raises(Crash):
            write_text(file, "new")
    return file.read_text(encoding="utf-8")


# ---- weights -----------------------------------------------------------------------------------------------------


def test_weights_come_back_bit_for_bit_in_evaluation_mode(run: Path) -> None:
    network = tiny_network(CONFIG.model, CONFIG.align, seed=1)
    save_checkpoint(run, "best", {"model": network.state_dict()}, {"step": 3})
    loaded = load_network(run)
    assert not loaded.training
    assert loaded.state_dict().keys() == network.state_dict().keys()
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_the_smoothed_weights_of_the_last_checkpoint_are_the_ones_to_use(run: Path) -> None:
    networks = {stem: tiny_network(CONFIG.model, CONFIG.align, seed=i).state_dict() for i, stem in enumerate("ab")}
    save_checkpoint(run, "last", {"model": networks["a"], "ema": networks["b"], "optimizer": {}}, {"step": 3})
    loaded = load_network(run, "last").state_dict()
    assert all(torch.equal(tensor, networks["b"][name]) for name, tensor in loaded.items())


OTHERS: dict[str, tuple[Config, ModelCard, str]] = {
    "size": (
        CONFIG.model_copy(update={"model": ModelConfig(size="small")}),
        CARD,
        r"\d+ tensors have another shape \(such as backbone",
    ),
    "no anchor": (
        CONFIG.model_copy(update={"align": AlignConfig(anchor="none")}),
        CARD,
        r"1 tensors are not the network's \(such as anchors.x4.theta\)",
    ),
    "stem": (
        CONFIG.model_copy(update={"model": ModelConfig(size="tiny", stem="joint")}),
        CARD,
        r"4 tensors are missing \(such as stem.mix.0.weight\)",
    ),
    "modalities": (CONFIG, replace(CARD, modalities=ModalitySet(("t1n", "adc"))), r"missing \(such as .*adc"),
    "classes": (CONFIG, replace(CARD, scheme=SCHEMES["brats2024"]), r"2 tensors have another shape \(such as .*head"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_weights_of_another_network_are_refused_by_the_names_of_their_tensors(tmp_path: Path, other: str) -> None:
    config, card, words = OTHERS[other]
    write_run(tmp_path, config, card)
    weights = tiny_network(CONFIG.model, CONFIG.align).state_dict()
    save_checkpoint(tmp_path, "best", {"model": weights}, {"step": 3})
    with pytest.raises(CheckpointError, match=rf"model.safetensors: weights of another network: .*{words}"):
        load_network(tmp_path)


def test_nothing_is_loaded_half(tmp_path: Path) -> None:
    network = tiny_network()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    weights = tiny_network(seed=1).state_dict()
    last = list(weights)[-1]
    for spoilt in ({k: v for k, v in weights.items() if k != last}, {**weights, last: torch.zeros(99)}):
        checkpoint.save_file(spoilt, tmp_path / "w.safetensors")
        with pytest.raises(CheckpointError, match="weights of another network"):
            load_weights(network, tmp_path / "w.safetensors")
        assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("damage", ["absent", "empty", "cut short", "a pickle"])
def test_a_damaged_file_of_weights_is_named(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "model.safetensors"
    checkpoint.save_file({"w": torch.arange(100.0)}, file)
    whole = file.read_bytes()
    file.unlink()
    if damage == "a pickle":
        torch.save({"w": torch.zeros(3)}, file)
    elif damage != "absent":
        file.write_bytes(whole[: 0 if damage == "empty" else -7])
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot be read as safetensors"):
        read_tensors(file)


def test_weights_may_share_memory_and_come_in_any_layout(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    save_checkpoint(tmp_path, "last", {"model": {"t": matrix.T, "g": nn.Parameter(matrix)}}, {})
    found = read_tensors(checkpoint_folder(tmp_path, "last") / "model.safetensors")
    assert torch.equal(found["t"], matrix.T)
    assert torch.equal(found["g"], matrix)


# ---- optimisers --------------------------------------------------------------------------------------------------

OPTIMISERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True),
    "sgd without momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.01),
}


def descend(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 3, generator=generator)
        network[0](x).square().sum().backward()  # the second layer never meets a gradient
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_optimiser_goes_on_from_a_file_as_if_it_had_never_stopped(name: str, tmp_path: Path) -> None:
    def fresh() -> tuple[nn.Sequential, torch.optim.Optimizer]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        return network, OPTIMISERS[name](network.parameters())

    network, optimizer = fresh()
    descend(network, optimizer, 3, seed=1)
    flat = flatten_optimizer(optimizer.state_dict())
    if name == "adamw":
        assert set(flat) == {f"{i}.{key}" for i in (0, 1) for key in ("step", "exp_avg", "exp_avg_sq")}
    save_checkpoint(tmp_path, "last", {"model": network.state_dict(), "optimizer": flat}, {})
    descend(network, optimizer, 3, seed=2)

    other, theirs = fresh()
    folder = checkpoint_folder(tmp_path, "last")
    load_weights(other, folder / "model.safetensors")
    state = unflatten_optimizer(read_tensors(folder / "optimizer.safetensors"), theirs.state_dict()["param_groups"])
    theirs.load_state_dict(state)
    descend(other, theirs, 3, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))
    assert same_state(optimizer.state_dict()["state"], theirs.state_dict()["state"])


def same_state(one: dict[int, dict[str, Tensor]], other: dict[int, dict[str, Tensor]]) -> bool:
    flat, also = flatten_optimizer({"state": one}), flatten_optimizer({"state": other})
    return flat.keys() == also.keys() and all(torch.equal(flat[key], also[key]) for key in flat)


def test_flattening_keeps_indices_of_two_digits_and_names_with_dots_apart() -> None:
    state: dict[str, Any] = {"state": {i: {"step": torch.tensor(float(i)), "a.b": torch.ones(2) * i} for i in (1, 11)}}
    groups = [{"lr": 0.5, "params": [1, 11]}]
    back = unflatten_optimizer(flatten_optimizer(state), groups)
    assert back["param_groups"] is groups
    assert same_state(back["state"], state["state"])
    assert sorted(back["state"]) == [1, 11]


def test_the_network_of_a_run_is_the_one_its_configuration_describes(run: Path) -> None:
    config, card = read_run(run)
    network = build_segmenter(config.model, config.align, card.modalities, len(card.scheme.classes))
    assert network.state_dict().keys() == tiny_network(CONFIG.model, CONFIG.align).state_dict().keys()


def test_a_model_whose_training_stopped_says_so(tmp_path: Path) -> None:
    card = ModelCard(ModalitySet(("t1c", "t2f")), SCHEMES["brats2023"], 2.0)
    write_run(tmp_path, parse_config({"train": {"steps": 9}}), card)
    save_checkpoint(tmp_path, "best", {}, {"step": 4})
    assert read_model(tmp_path).about == ""  # nothing is known of a model that was only handed on
    save_checkpoint(tmp_path, "last", {}, {"step": 4})
    assert read_model(tmp_path).about.endswith(f"stopped at step 4 of 9; go on with `medmap train --resume {tmp_path}`")
    assert not is_finished(tmp_path)
    save_checkpoint(tmp_path, "last", {}, {"step": 9})
    assert read_model(tmp_path).about == ""
    assert is_finished(tmp_path)
