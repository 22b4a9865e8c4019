"""What docs/theory.md says beyond closed forms, and that the tests it names exist."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_up_network import tiny_network

from medmap.anchors import Uniform, alignment_loss
from medmap.config import AlignConfig, ModelConfig
from medmap.core.joint import FullGaussian, full_kl, split_kl, total_correlation

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "theory.md"


# ---- the bound --------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000))
def test_the_divergence_of_the_bound_is_information_dependence_and_distance_from_the_anchor(seed: int) -> None:
    """E_X KL(q(Z|X) ‖ Π P) = I(X; Z) + TC(q(Z)) + Σ_j KL(q(Z_j) ‖ P), for Z = A X + noise, P fixed."""
    rng = np.random.default_rng(seed)
    blocks, images = [2, 1, 2], 3
    size = sum(blocks)
    a, noise = rng.normal(size=(size, images)), np.diag(rng.uniform(0.3, 2, size))
    anchors = [FullGaussian(rng.normal(size=d), np.eye(d) * rng.uniform(0.5, 2)) for d in blocks]
    aggregate = FullGaussian(np.zeros(size), a @ a.T + noise)
    # X ~ N(0, I): the mean of KL over X is that at X = 0, plus ½ E (A X)ᵀ P⁻¹ (A X)
    given_zero = split_kl(FullGaussian(np.zeros(size), noise), blocks, anchors)
    precision = np.concatenate([np.full(len(p.mean), 1 / p.covariance[0, 0]) for p in anchors])
    left = given_zero.joint + 0.5 * float((precision * (a @ a.T).diagonal()).sum())
    information = 0.5 * (np.linalg.slogdet(aggregate.covariance)[1] - np.linalg.slogdet(noise)[1])
    right = split_kl(aggregate, blocks, anchors)
    assert left == pytest.approx(information + right.dependence + sum(right.each), rel=1e-9)
    assert given_zero.dependence == pytest.approx(0, abs=1e-12)  # noise of each sequence on its own


def test_without_the_total_correlation_the_bound_can_pass_the_evidence() -> None:
    """log p(Y | Z) = −(Z_1 − Z_2)²/2, prior N(0, 1) each; q has these marginals and correlation r."""
    evidence = -0.5 * math.log(1 + 2)  # log E exp(−d²/2), d ~ N(0, 2)
    anchor = FullGaussian(np.zeros(1), np.eye(1))
    for r in np.linspace(-0.99, 0.99, 67):
        q = FullGaussian(np.zeros(2), np.array([[1.0, r], [r, 1.0]]))
        split, fit = split_kl(q, [1, 1], [anchor, anchor]), -(1 - r)
        assert fit - split.joint <= evidence
    assert fit - sum(split.each) == pytest.approx(-0.01)  # r = 0.99
    assert fit - sum(split.each) > evidence + 0.5


@given(st.floats(-3, 3), st.floats(-3, 3))
def test_a_prior_that_follows_the_images_can_always_be_met(z: float, w: float) -> None:
    """With P_mix made of this patient's latents, latents that agree cost 0 wherever they are: I(X; Z) is not paid."""
    latents = torch.tensor([z, z, w, w]).reshape(2, 2, 1, 1, 1, 1)
    assert float(alignment_loss(latents, Uniform(2), torch.ones(2, 2, dtype=torch.bool))) == pytest.approx(0, abs=1e-9)
    fixed = FullGaussian(np.zeros(1), np.eye(1))
    assert full_kl(FullGaussian(np.array([z]), np.eye(1)), fixed) == pytest.approx(z * z / 2)


# ---- collapse ---------------------------------------------------------------------------------------------------


def test_smaller_latents_are_cheaper_and_decode_to_the_same() -> None:
    """What is decoded is normalised first, so that a tenth of the latents costs a hundredth and changes no answer."""
    network = tiny_network(ModelConfig(size="tiny"), AlignConfig(anchor="pstar", levels=("x4",)))
    for fusion in network.backbone.fusions.values():
        for score in fusion.scores.values():
            torch.nn.init.zeros_(score.weight)  # as they begin
    images = {name: torch.randn(1, 1, 32, 32, 32) * 3 for name in network.modalities}
    seen = torch.ones(1, 4, dtype=torch.bool)
    with torch.inference_mode():
        whole = network.backbone.encode(images, seen)
        small = replace(whole, levels={v: {n: 0.1 * z for n, z in each.items()} for v, each in whole.levels.items()})
        answers = [network.backbone.decode(encoded, seen).logits for encoded in (whole, small)]
        costs = [
            float(alignment_loss(torch.stack(list(encoded.levels["x4"].values()), 1), Uniform(4), seen))
            for encoded in (whole, small)
        ]
    assert costs[1] == pytest.approx(costs[0] / 100, rel=1e-4)
    spread = float(answers[0].std())
    assert float((answers[0] - answers[1]).abs().max()) < 0.01 * spread


def test_scalars_with_one_cause_depend_on_each_other_as_much_as_is_said() -> None:
    """M latents that are one brain plus own noise of the same variance: TC = −½ log det of their correlation."""
    correlation = np.full((4, 4), 0.5) + 0.5 * np.eye(4)
    assert total_correlation(correlation, [1] * 4) == pytest.approx(-0.5 * math.log(0.5**3 * 2.5))


# ---- the page ---------------------------------------------------------------------------------------------------


def test_every_test_that_the_page_names_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 10
    for file, test in named:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not test or re.search(rf"^def {test}\(", source, re.MULTILINE), f"{file}::{test}"
