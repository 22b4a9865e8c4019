from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_network import bright_voxels, made_up_prepared, tiny_network
from made_up_training import (
    config,
)
from torch import Tensor, nn

from medmap import train
from medmap.align import Output
from medmap.config import TrainConfig
from medmap.core.box import Box, Boxed
from medmap.core.labels import SCHEMES
from medmap.criterion import DiceCE, total_loss
from medmap.models.backbone import Auxiliary
from medmap.state import State, optimizer_of
from medmap.train import examined, full_and_missing, learning_rate, over_patients

GLIOMA = SCHEMES["brats2023"]

# ---- the recipe's numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("poly", 0, 0.2),
        ("poly", 8, 1.8),
        ("poly", 9, 2.0),
        ("poly", 10, 2.0),
        ("poly", 60, 2 * 0.5**0.9),
        ("poly", 109, 2 * 0.01**0.9),
        ("cosine", 35, 2 * 0.5 * (1 + math.sqrt(0.5))),
        ("cosine", 60, 1.0),
        ("cosine", 85, 2 * 0.5 * (1 - math.sqrt(0.5))),
        ("constant", 4, 1.0),
        ("constant", 109, 2.0),
    ],
)
def test_the_learning_rate_follows_its_schedule(schedule: Any, step: int, expected: float) -> None:
    recipe = TrainConfig(steps=110, warmup_steps=10, lr=2.0, schedule=schedule)
    assert learning_rate(recipe, step) == pytest.approx(expected, rel=1e-12)


@given(steps=st.integers(1, 300), warmup=st.integers(0, 400), schedule=st.sampled_from(["poly", "cosine", "constant"]))
@settings(deadline=None)
def test_the_learning_rate_rises_then_falls_and_is_never_zero(steps: int, warmup: int, schedule: Any) -> None:
    recipe = TrainConfig(steps=steps, warmup_steps=warmup, lr=1.0, schedule=schedule)
    rates = [learning_rate(recipe, step) for step in range(steps)]
    assert all(0 < rate <= 1 for rate in rates)
    assert all(a < b for a, b in pairwise(rates[:warmup]))
    assert all(a >= b for a, b in pairwise(rates[warmup:]))


def test_weight_decay_spares_biases_normalisations_and_anchor_weights() -> None:
    network = tiny_network(align=config().align)
    optimizer = optimizer_of(TrainConfig(weight_decay=0.3), network)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in network.named_parameters():
        spared = name.endswith(("bias", "theta")) or parameter.ndim == 1
        assert decay[id(parameter)] == (0.0 if spared else 0.3), name
    assert len(decay) == len(list(network.parameters()))


def test_sgd_is_nesterovs_where_there_is_momentum() -> None:
    network = nn.Linear(2, 2)
    for momentum, nesterov in ((0.9, True), (0.0, False)):
        optimizer = optimizer_of(TrainConfig(optimizer="sgd", momentum=momentum), network)
        assert isinstance(optimizer, torch.optim.SGD)
        assert {(g["momentum"], g["nesterov"]) for g in optimizer.param_groups} == {(momentum, nesterov)}


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
@pytest.mark.parametrize("amsgrad", [True, False])
def test_adam_by_its_name(name: Any, kind: type[torch.optim.Optimizer], amsgrad: bool) -> None:
    optimizer = optimizer_of(TrainConfig(optimizer=name, amsgrad=amsgrad), nn.Linear(2, 2))
    assert type(optimizer) is kind
    assert {g["amsgrad"] for g in optimizer.param_groups} == {amsgrad}


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.95])
def test_the_moving_average_follows_its_formula(decay: float) -> None:
    network: Any = nn.BatchNorm1d(3)
    smoothed: Any = nn.BatchNorm1d(3).requires_grad_(False)
    moving = State(network, smoothed, torch.optim.SGD(network.parameters()))
    generator, expected = torch.Generator().manual_seed(0), torch.ones(3)
    for step in range(12):
        drawn = torch.randn(3, generator=generator)
        with torch.no_grad():
            network.weight.copy_(drawn)
        network.running_mean.copy_(drawn)
        moving.step = step
        train._smooth(moving, decay)
        d = min(decay, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * drawn
        torch.testing.assert_close(smoothed.weight.detach(), expected)
        assert torch.equal(smoothed.running_mean, drawn)  # statistics are not averaged twice
    if decay == 0:
        assert torch.equal(smoothed.weight, network.weight)


# ---- the criterion -----------------------------------------------------------------------------------------------

# Two voxels: truth ncr and background, with softmax (background, ncr, ed, et).
P = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]])
SMOOTH = 1e-5


def worked() -> float:
    ncr = (2 * 0.2 + SMOOTH) / (0.2 + 0.1 + 1 + SMOOTH)
    ed, et = SMOOTH / (0.3 + 0.1 + SMOOTH), SMOOTH / (0.4 + 0.1 + SMOOTH)
    return 1 - (ncr + ed + et) / 3 - (math.log(0.2) + math.log(0.7)) / 2


def test_the_criterion_is_the_one_worked_by_hand() -> None:
    criterion = DiceCE()
    one_sample = criterion(P.log().T.reshape(1, 4, 2, 1, 1), torch.tensor([1, 0]).reshape(1, 2, 1, 1))
    two_samples = criterion(P.log().reshape(2, 4, 1, 1, 1), torch.tensor([1, 0]).reshape(2, 1, 1, 1))
    assert float(one_sample) == pytest.approx(worked(), rel=1e-5)
    assert float(two_samples) == pytest.approx(worked(), rel=1e-5)  # sums run over the whole batch


def test_a_perfect_answer_costs_nothing_and_gradients_flow() -> None:
    target, criterion = torch.arange(64).reshape(1, 4, 4, 4) % 4, DiceCE()
    sure = nn.functional.one_hot(target, 4).movedim(-1, 1) * 60.0
    assert float(criterion(sure, target)) == pytest.approx(0, abs=1e-5)
    logits = torch.zeros(1, 4, 4, 4, 4, requires_grad=True)
    before = criterion(logits, target)
    (gradient,) = torch.autograd.grad(before, logits)
    assert gradient.abs().amin() > 0
    assert criterion(logits - gradient, target) < before


def test_coarser_logits_meet_the_truth_at_their_voxels() -> None:
    generator = torch.Generator().manual_seed(1)
    target = torch.randint(0, 4, (2, 4, 8, 4), generator=generator)
    logits = torch.randn(2, 4, 2, 4, 2, generator=generator)
    criterion = DiceCE()
    assert torch.equal(criterion(logits, target), criterion(logits, target[:, ::2, ::2, ::2]))


def test_bf16_logits_are_judged_in_full_precision() -> None:
    logits = torch.randn(1, 4, 4, 4, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    target = torch.ones(1, 4, 4, 4, dtype=torch.long)
    criterion = DiceCE()
    assert torch.equal(criterion(logits, target), criterion(logits.float(), target))


def made_up_output(rows: Tensor | None = None) -> Output:
    logits = torch.randn(2, 4, 2, 2, 2, generator=torch.Generator().manual_seed(3))
    auxiliary = {"deep/x2": Auxiliary(2 * logits), "single/t1c": Auxiliary(-logits, rows)}
    losses = {"align/x3": torch.tensor(2.0), "align/x4": torch.tensor(6.0), "prototype": torch.tensor(8.0)}
    return Output(logits, auxiliary, losses, {}, {})


TARGET = torch.arange(16).reshape(2, 2, 2, 2) % 4


@pytest.mark.parametrize(
    ("alpha", "weights", "expected"),
    [
        (0.0, {}, (0.5, 0.5, 0, 0, 1)),
        (0.5, {}, (0.5, 0.5, 0.25, 0.25, 1)),
        (2.0, {"align/x3": 3, "prototype": 0}, (0.5, 0.5, 3, 1, 0)),
        (1.0, {"single/t1c": 2, "align/x4": 0, "dice_ce": 3}, (0.5, 2, 0.5, 0, 1)),
        (1.0, {"deep": 4, "align": 0.1, "align/x4": 1}, (4, 0.5, 0.05, 0.5, 1)),
    ],
)
def test_terms_are_summed_with_their_weights(
    alpha: float, weights: dict[str, float], expected: tuple[float, ...]
) -> None:
    output, criterion = made_up_output(), DiceCE()
    settings = config(align__alpha=alpha, model__loss_weights=weights)
    loss, terms = total_loss(output, TARGET, criterion, settings)
    values = {
        "dice_ce": criterion(output.logits, TARGET),
        "deep/x2": criterion(2 * output.logits, TARGET),
        "single/t1c": criterion(-output.logits, TARGET),
        **output.losses,
    }
    assert list(terms) == list(values)
    assert all(torch.equal(terms[name], value) for name, value in values.items())
    others = list(values)[1:]
    total = weights.get("dice_ce", 1) * values["dice_ce"] + sum(
        w * values[name] for w, name in zip(expected, others, strict=True)
    )
    torch.testing.assert_close(loss, total)


def test_a_term_without_weight_is_not_worked_out_and_one_may_ask_for_the_truth() -> None:
    output = made_up_output()._replace(
        losses={"own": lambda truth: truth.float().mean(), "never": lambda truth: pytest.fail("was worked out")},
        weights={"own": 3.0, "never": 1.0, "single": 2.0},
    )
    loss, terms = total_loss(output, TARGET, DiceCE(), config(model__loss_weights={"never": 0, "deep": 0}))
    assert list(terms) == ["dice_ce", "single/t1c", "own"]
    assert terms["own"] == TARGET.float().mean()
    torch.testing.assert_close(loss, terms["dice_ce"] + 2 * terms["single/t1c"] + 3 * terms["own"])


def test_auxiliary_logits_count_for_their_own_samples_only() -> None:
    criterion = DiceCE()
    output = made_up_output(torch.tensor([False, True]))
    _, terms = total_loss(output, TARGET, criterion, config())
    assert torch.equal(terms["single/t1c"], criterion(-output.logits[1:], TARGET[1:]))
    loss, terms = total_loss(made_up_output(torch.tensor([False, False])), TARGET, criterion, config())
    assert "single/t1c" not in terms
    assert torch.isfinite(loss)


# ---- the watch on collapse ---------------------------------------------------------------------------------------


# ---- validation --------------------------------------------------------------------------------------------------


def test_a_tumour_beyond_a_sequences_brain_counts_as_missed() -> None:
    labels = np.zeros((40, 40, 40), np.uint8)
    labels[10:12, 10:12, 10:14] = 1
    bright = {"t2f": Box((8, 8, 8), (20, 20, 12)), "t2w": Box((8, 8, 8), (20, 20, 20))}
    patient = made_up_prepared(bright, labels=Boxed.tight(labels))
    images = {}
    for name, image in patient.images.items():
        values = np.full(image.values.shape, -5, np.float16)
        inside = Box((10, 10, 10), (12, 12, min(14, image.box.stop[2]))).relative_to(image.box.start)
        values[inside.slices] = 20
        images[name] = Boxed(values, image.box)
    scores = over_patients(examined(bright_voxels(), GLIOMA, [replace(patient, images=images)], "fp32")[0])
    assert scores["t2w"] == {"WT": 1.0, "TC": 1.0, "ET": 1.0}  # there is none, and none was found
    assert scores["t2f"]["WT"] == pytest.approx(2 * 8 / (8 + 16))
    assert scores["t2w+t2f"]["WT"] == 1.0


def test_patients_are_averaged_subset_by_subset_over_those_who_have_it() -> None:
    found = Boxed.tight(np.pad(np.ones((2, 2, 2), np.uint8), 10))
    nothing = Boxed.tight(np.zeros((22, 22, 22), np.uint8))
    box = Box((10, 10, 10), (14, 14, 14))

    def patient(names: tuple[str, ...], labels: Boxed) -> Any:
        values = np.full((4, 4, 4), -5, np.float16)
        values[:2, :2, :2] = 20
        made = made_up_prepared(dict.fromkeys(names, box), labels=labels)
        return replace(made, images={name: Boxed(values, box) for name in names})

    both = [patient(("t1c",), found), patient(("t1c", "t2f"), nothing)]
    answers, _ = examined(bright_voxels().train(), GLIOMA, both, "fp32")
    scores = over_patients(answers)
    assert set(scores) == {"t1c", "t2f", "t1c+t2f"}
    assert scores["t1c"] == {"WT": 0.5, "TC": 0.5, "ET": 1.0}
    assert scores["t2f"] == {"WT": 0.0, "TC": 0.0, "ET": 1.0}


def test_the_cost_of_missing_sequences_is_of_patients_who_have_them_all() -> None:
    whole = {"t1c": {"WT": 0.4, "TC": 0.6}, "t2f": {"WT": 0.1, "TC": 0.3}, "t1c+t2f": {"WT": 0.8, "TC": 0.6}}
    poor = {"t1c": {"WT": 0.0, "TC": 0.0}}
    expected = pytest.approx({"full": 0.7, "missing": 0.35, "cost": 0.35})
    assert full_and_missing([whole], "t1c+t2f") == expected
    assert full_and_missing([poor, whole, poor], "t1c+t2f") == expected
    assert full_and_missing([poor], "t1c+t2f") == {}
    assert full_and_missing([{"t1c": {"WT": 0.4}}], "t1c") == {"full": 0.4}  # of one sequence, none can be missing


def test_the_learning_rate_starts_anew_with_every_stage() -> None:
    recipe, half = TrainConfig(steps=100, warmup_steps=10, lr=1.0), TrainConfig(steps=50, warmup_steps=10, lr=1.0)
    rates = [learning_rate(recipe, step, stages=(0.5,)) for step in range(100)]
    assert rates[:50] == rates[50:] == [learning_rate(half, step) for step in range(50)]
    odd = [learning_rate(TrainConfig(steps=5, warmup_steps=1, lr=1.0), step, stages=(0.5,)) for step in range(5)]
    assert odd[3] == 1.0  # the first step whose share is a half or more
    assert odd[2] < 1
