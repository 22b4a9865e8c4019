from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up_network import made_up_prepared, tiny_network
from made_up_training import THREE, Interrupted, config, interrupt_at, patients, quick_and_exact, rows
from torch import Tensor

from medmap.config import AlignConfig, ModelConfig
from medmap.core.box import Box, Boxed
from medmap.core.case import Prepared
from medmap.core.gaussian import Gaussian
from medmap.core.labels import SCHEMES
from medmap.core.modality import ModalitySet
from medmap.core.spread import modality_gap
from medmap.diagnosis import FALLS, Latents, latent_spread, means, moments, over_alignment, overheard, watched
from medmap.inference import answer_subsets, encode_alone
from medmap.models import BACKBONES
from medmap.predict import answerable
from medmap.train import examined, fit

GLIOMA = SCHEMES["brats2023"]
NAMES = ModalitySet(tuple(THREE))
BOX = Box((8, 8, 8), (40, 40, 40))


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    with quick_and_exact():
        yield


# ---- of a batch --------------------------------------------------------------------------------------------------


def in_a_batch(z: Tensor) -> Tensor:
    """[N C] as [1 1 C N 1 1]."""
    return z.T[None, None, :, :, None, None]


def test_the_effective_rank_is_1_on_a_line_and_C_where_no_direction_is_preferred() -> None:
    generator, seen = torch.Generator().manual_seed(0), torch.ones(1, 1, dtype=torch.bool)
    line = torch.randn(500, 1, generator=generator) * torch.tensor([[1.0, -2.0, 0.0, 5.0]]) + 3
    found = latent_spread(in_a_batch(line), seen)
    assert found["rank"] == pytest.approx(1, abs=1e-3)
    assert found["std"] == pytest.approx(float(line.std(dim=0, correction=0).mean()), rel=1e-5)
    round_cloud = latent_spread(in_a_batch(2 * torch.randn(20000, 6, generator=generator)), seen)
    assert round_cloud["rank"] == pytest.approx(6, abs=0.02)
    assert round_cloud["std"] == pytest.approx(2, rel=0.02)
    # eigenvalues 3/4 and 1/4: the exponential of their entropy
    two = torch.tensor([[3.0, 0], [-3, 0], [0, math.sqrt(3)], [0, -math.sqrt(3)]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert latent_spread(in_a_batch(two), seen)["rank"] == pytest.approx(math.exp(entropy), rel=1e-5)


def test_collapse_is_seen_and_one_channel_has_rank_1() -> None:
    seen = torch.ones(2, 3, dtype=torch.bool)
    assert latent_spread(torch.full((2, 3, 4, 2, 2, 2), 7.0), seen) == {"std": 0.0, "std_min": 0.0, "rank": 1.0}
    single = torch.randn(2, 3, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    assert latent_spread(single, seen)["rank"] == pytest.approx(1)


def test_latents_that_do_not_exist_are_not_watched() -> None:
    z = torch.randn(2, 3, 4, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    seen = torch.tensor([[True, False, True], [False, True, True]])
    expected = latent_spread(z, seen)
    spoilt = z.masked_fill(~seen[:, :, None, None, None, None], 1e6)
    assert latent_spread(spoilt, seen) == expected
    assert latent_spread(spoilt, torch.ones_like(seen)) != expected


# ---- of validation -----------------------------------------------------------------------------------------------


def patient(names: tuple[str, ...], seed: int = 0) -> Prepared:
    """Noise with a tumour of one class, and a box of its own for each sequence."""
    made = made_up_prepared(dict.fromkeys(names, BOX), shape=(48, 48, 48), seed=seed)
    labels = np.zeros((48, 48, 48), np.uint8)
    labels[16:24, 16:24, 16:24] = 1
    return replace(made, labels=Boxed.tight(labels))


def networks() -> Iterator[Any]:
    for name in BACKBONES:
        yield pytest.param(ModelConfig(name=name, size="tiny"), AlignConfig(anchor="none"), id=name)
    deep = AlignConfig(anchor="uniform", levels=("stem", "x2"), fill="kept")
    yield pytest.param(ModelConfig(size="tiny", stem="joint"), deep, id="joint stem")
    yield pytest.param(ModelConfig(size="tiny", stem="non_shared"), deep, id="private stems, filled")


@pytest.mark.parametrize(("model", "align"), list(networks()))
def test_validation_hears_every_sequence_once_and_answers_as_before(model: ModelConfig, align: AlignConfig) -> None:
    network = tiny_network(model, align, NAMES)
    case = patient(("t1c", "t2f"))
    subsets = answerable([network], case.images)
    before = [answer.probabilities for answer in answer_subsets(network, case, subsets)]
    encoded = counted_encodings(network)
    with overheard(network) as heard:
        after = [answer.probabilities for answer in answer_subsets(network, case, subsets)]
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))
    assert len(encoded) == (2 if network.separable else len(subsets))  # nothing for the watch alone
    assert list(heard) == list(watched(network)) == list(align.levels or [list(network.backbone.strides)[-1]])
    for level, found in heard.items():
        assert set(found) == {"t1c", "t2f"}
        for name, own in found.items():
            z = means(network, level, encoded_fully(network, case, level)[name], dim=1)[0]
            assert own.n == z[0].numel()
            np.testing.assert_allclose(own.mean, z.mean(dim=(1, 2, 3)), rtol=1e-4, atol=1e-5)
    assert "encode" not in vars(network)


def counted_encodings(network: Any) -> list[Tensor]:
    encode, calls = network.backbone.encode, []

    def counting(images: Mapping[str, Tensor], seen: Tensor) -> Any:
        calls.append(seen)
        return encode(images, seen)

    network.backbone.encode = counting
    return calls


@torch.no_grad()
def encoded_fully(network: Any, case: Prepared, level: str) -> Mapping[str, Tensor]:
    """The latents of a level, of all sequences that the patient has."""
    if network.separable:
        return {name: encode_alone(network, case, name).levels[level] for name in case.images}
    images = {n: torch.from_numpy(image.window(BOX).astype(np.float32))[None, None] for n, image in case.images.items()}
    seen = torch.tensor([[name in case.images for name in network.modalities]])
    found: Mapping[str, Tensor] = network.encode(images, seen).levels[level]
    return found


def test_of_gaussian_latents_the_means_are_watched() -> None:
    network = tiny_network(ModelConfig(name="uhved", size="tiny"), None, NAMES)
    z = torch.randn(2, 3, 6, 2, 2, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(means(network, "x4", z, dim=2), Gaussian.split(z, dim=2).mean)
    assert torch.equal(means(network, "stem", z, dim=2), z)
    assert torch.equal(means(tiny_network(), "x4", z, dim=2), z)


def test_a_large_latent_is_counted_on_a_lattice() -> None:
    z = (
        torch.randn(3, 90, 80, 70, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1.0, 2, 3])[:, None, None, None]
    )
    own = moments(z)
    assert 2**15 < own.n < 2**17
    np.testing.assert_allclose(np.diag(own.scatter) / own.n, [1, 4, 9], rtol=0.03)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # in which validation answers
        assert np.array_equal(moments(z).scatter, own.scatter)


def test_measures_are_of_all_patients_whichever_sequences_they_have() -> None:
    network = tiny_network(None, AlignConfig(anchor="uniform", levels=("x3", "x4")), NAMES)
    cases = [patient(tuple(THREE), 1), patient(("t1c", "t2f"), 2), patient(("t2w",), 3)]
    _, found = examined(network, GLIOMA, cases, "fp32")
    assert list(found) == ["x3", "x4"]
    for level, row in found.items():
        latents = {
            (i, n): encoded_fully(network, case, level)[n][0] for i, case in enumerate(cases) for n in case.images
        }
        pooled = np.array([z.mean(dim=(1, 2, 3)).numpy() for z in latents.values()])
        assert row["gap"] == pytest.approx(modality_gap(pooled, [name for _, name in latents]), rel=1e-4)
        assert row["chance"] == 2 / 5
        own = {m: torch.cat([z.flatten(1) for (_, n), z in latents.items() if n == m], dim=1) for m in NAMES}
        centred = torch.cat([z - z.mean(dim=1, keepdim=True) for z in own.values()], dim=1).double()
        std = centred.square().mean(dim=1).sqrt()
        assert row["std"] == pytest.approx(float(std.mean()), rel=1e-4)
        assert row["std_min"] == pytest.approx(float(std.min()), rel=1e-4)
        assert 1 <= row["rank"] <= len(std)


def test_of_one_patient_there_is_no_gap_to_tell() -> None:
    _, found = examined(tiny_network(modalities=NAMES), GLIOMA, [patient(tuple(THREE))], "fp32")
    assert {level: set(row) for level, row in found.items()} == {"x4": {"std", "std_min", "rank"}}


def test_parts_of_the_patients_make_the_whole() -> None:
    draws = np.random.default_rng(0)
    heard = [{"x4": {n: moments(torch.from_numpy(draws.normal(size=(4, 3, 3, 3)))) for n in "ab"}} for _ in range(4)]
    whole, one, two = Latents(), Latents(), Latents()
    for i, each in enumerate(heard):
        whole.add(i, each)
        (one, two)[i % 2].add(i, each)
    assert one.joined(two).measures()["x4"] == pytest.approx(whole.measures()["x4"], rel=1e-9)
    assert Latents().joined(one).measures() == one.measures()


# ---- when to warn ------------------------------------------------------------------------------------------------


def trained(steps: range, std: Any = 0.4, rank: Any = 20.0, loss: Any = 0.1) -> list[dict[str, Any]]:
    """Rows of training; a number or a function of the step each."""
    of = {
        name: value if callable(value) else (lambda _, v=value: v)
        for name, value in {"std": std, "rank": rank, "loss": loss}.items()
    }
    return [
        {
            "kind": "train",
            "step": s,
            "terms": {"dice_ce": 1.0, "align/x4": of["loss"](s)},
            "latents": {"x4": {"std": of["std"](s), "rank": of["rank"](s)}},
        }
        for s in steps
    ]


def validated(step: int, std: float = 0.4, rank: float = 20.0, **more: float) -> dict[str, Any]:
    return {"kind": "val", "step": step, "latents": {"x4": {"std": std, "rank": rank}}, **more}


def signs(log: list[dict[str, Any]], alpha: float = 0.1, levels: tuple[str, ...] = ("x4",)) -> list[str]:
    return [row["sign"] for row in over_alignment(log, alpha, levels)]


HALVED = [*trained(range(10, 250, 10), std=lambda s: 0.4 * 0.9 ** (s / 10)), validated(250)]
ON_A_LINE = [*trained(range(10, 250, 10), rank=lambda s: max(1.8, 40 - s / 5)), validated(250)]
COLLAPSED_LATER = [validated(100), validated(200, std=0.3), validated(300, std=0.19)]


@pytest.mark.parametrize("log", [HALVED, ON_A_LINE, COLLAPSED_LATER, [validated(100, rank=40), validated(200, rank=2)]])
def test_a_collapse_is_named_with_level_and_alpha(log: list[dict[str, Any]]) -> None:
    (row,) = over_alignment(log, 0.1, ("x4",))
    assert (row["kind"], row["step"], row["sign"], row["level"]) == ("warning", log[-1]["step"], "collapse", "x4")
    assert (row["alpha"], row["try"]) == (0.1, 0.01)
    assert row["text"].startswith("over-alignment: latents collapse at x4 (")
    assert row["text"].endswith("); try align.alpha=0.01 (now 0.1)")


SOUND = {
    "nothing changes": [*trained(range(10, 250, 10)), validated(250)],
    "spread grows": [*trained(range(10, 250, 10), std=lambda s: 0.4 + s), validated(250, std=99)],
    "spread falls a little": [*trained(range(10, 250, 10), std=lambda s: 0.4 - s / 1500), validated(250)],
    "noise becomes features": [*trained(range(10, 250, 10), rank=lambda s: max(5, 80 - s)), validated(250, rank=5)],
    "a level that never had more": [validated(100, rank=2.5), validated(200, rank=1.5)],
    "one row of training is odd": [
        *trained(range(10, 250, 10), std=lambda s: 0.1 if s == 240 else 0.4),
        validated(250),
    ],
    "nothing measured": [{"kind": "val", "step": 100, "mean": 0.5, "full": 0.6}],
    "nothing at all": [],
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_latents_are_left_alone(name: str) -> None:
    assert signs(SOUND[name]) == []


def test_nothing_is_said_of_what_is_not_aligned() -> None:
    assert signs(HALVED) == ["collapse"]
    assert signs(HALVED, alpha=0) == []
    assert signs(HALVED, levels=()) == []
    assert signs(HALVED, levels=("x3",)) == []


def falling(full: list[float], loss: list[float]) -> list[dict[str, Any]]:
    log: list[dict[str, Any]] = []
    for i, (dice, term) in enumerate(zip(full, loss, strict=True)):
        log += [*trained(range(100 * i + 10, 100 * i + 100, 10), loss=term), validated(100 * i + 100, full=dice)]
    return log


def test_dice_that_falls_with_the_alignment_loss_is_named() -> None:
    log = falling([0.5, 0.8, 0.78, 0.76, 0.74], [0.5, 0.4, 0.3, 0.2, 0.1])
    (row,) = over_alignment(log, 0.3, ("x3", "x4"))
    assert (row["sign"], row["level"], row["try"]) == ("fall", "x3, x4", 0.1)
    assert row["text"] == (
        "over-alignment: Dice with all sequences fell from 80.0 to 74.0 in 3 validations, and so did the alignment "
        "loss at x3, x4; try align.alpha=0.1 (now 0.3)"
    )


@pytest.mark.parametrize(
    ("full", "loss"),
    [
        ([0.80, 0.78, 0.76, 0.74], [0.1, 0.2, 0.3, 0.4]),  # the alignment loss rises: not its doing
        ([0.80, 0.79, 0.78, 0.76], [0.4, 0.3, 0.2, 0.1]),  # less than what Dice scatters by
        ([0.80, 0.70, 0.75, 0.74], [0.4, 0.3, 0.2, 0.1]),  # not every time
        ([0.80, 0.78, 0.74], [0.4, 0.3, 0.2]),  # not often enough
        ([0.80, 0.70, 0.60, 0.50, 0.55], [0.4, 0.3, 0.2, 0.1, 0.1]),  # it has recovered
    ],
)
def test_other_falls_are_not(full: list[float], loss: list[float]) -> None:
    assert signs(falling(full, loss)) == []
    assert FALLS == 3


def test_validations_without_complete_patients_or_loss_say_nothing() -> None:
    log = falling([0.8, 0.7, 0.6, 0.5], [0.4, 0.3, 0.2, 0.1])
    assert signs(log) == ["fall"]
    assert signs([{k: v for k, v in row.items() if k != "full"} for row in log]) == []
    assert signs([row for row in log if row["kind"] == "val"]) == []


def test_each_sign_is_named_once_a_level() -> None:
    both = [validated(100), validated(200, std=0.1)]
    first = over_alignment(both, 1.0, ("x4",))
    later = [*both, *first, validated(300, std=0.05)]
    assert signs(later, 1.0) == []
    for row in later:
        if row["kind"] == "val":
            row["latents"]["x3"] = {"std": 30 / row["step"], "rank": 20.0}
    assert [row["level"] for row in over_alignment(later, 1.0, ("x3", "x4"))] == ["x3"]
    assert over_alignment([*both, *over_alignment(both, 1.0, ("x4",))], 1.0, ("x4",)) == []
    fall = falling([0.8, 0.7, 0.6, 0.5, 0.4], [0.5, 0.4, 0.3, 0.2, 0.1])
    assert signs([*fall[:-10], *over_alignment(fall[:-10], 1.0, ("x4",)), *fall[-10:]]) == []


# ---- in a run ----------------------------------------------------------------------------------------------------


def test_a_run_warns_of_an_alpha_that_is_far_too_large_and_of_no_other(tmp_path: Path) -> None:
    store = patients(tmp_path, 5, seed=5)
    schedule = {"steps": 40, "lr": 5e-3, "validate_every": 20, "checkpoint_every": 20, "log_every": 2}
    recipe = {f"train__{key}": value for key, value in schedule.items()}
    aligned = {"anchor": "pstar", "levels": ["x3", "x4"]}
    strong, mild = (config(align={**aligned, "alpha": alpha}, **recipe) for alpha in (100, 0.1))
    fit(mild, store, tmp_path / "mild", device="cpu")
    assert rows(tmp_path / "mild", "warning") == []
    with pytest.raises(Interrupted):
        fit(strong, store, tmp_path / "strong", device="cpu", on_row=interrupt_at("warning", 40))
    assert len(rows(tmp_path / "strong", "warning")) == 1
    fit(strong, store, tmp_path / "strong", device="cpu", resume=True)  # once more, from step 20
    *_, val, warning = rows(tmp_path / "strong")
    assert (val["kind"], val["step"]) == ("val", 40)
    assert val["latents"]["x3"]["rank"] < 3 < rows(tmp_path / "mild", "val")[-1]["latents"]["x3"]["rank"]
    assert "latents collapse at x3 (effective rank 2." in warning.pop("text")
    told = {"kind": "warning", "step": 40, "sign": "collapse", "level": "x3", "alpha": 100.0, "try": 10.0}
    assert warning == told
    assert rows(tmp_path / "strong", "warning")[0].items() >= told.items()
    assert len(rows(tmp_path / "strong", "warning")) == 1
    with (tmp_path / "strong" / "metrics.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert table[-1]["text"].startswith("over-alignment: latents collapse at x3")
    assert float(table[-2]["latents/x4/std_min"]) == val["latents"]["x4"]["std_min"]
