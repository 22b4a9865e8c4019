"""A head with a glioma: fractions fill the mask and nothing else, labels nest and say what the tissues are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from medmap.core.tissues import TISSUES
from medmap.phantom.anatomy import Anatomy
from medmap.phantom.brain import BRAIN, Brain, build_brain, draw_agent, draw_brain
from medmap.phantom.organ import Body
from medmap.phantom.patient import stream
from medmap.phantom.simulate import PLAIN, grid_of

LATTICE = grid_of(replace(PLAIN, spacing_mm=4.0))
VOXEL_ML = 4.0**3 / 1000
SEEDS = (0, 1, 2)
TISSUE = {name: row for row, name in enumerate(BRAIN.tissues)}


def _streams(seed: int, parts: tuple[str, ...]) -> dict[str, np.random.Generator]:
    return {part: stream(seed, part) for part in parts}


def _drawn(seed: int, operated: bool = False) -> Brain:
    return draw_brain(_streams(seed, BRAIN.drawn), operated)


def _built(brains: list[Brain], seeds: tuple[int, ...] = SEEDS) -> Body:
    return build_brain(brains, LATTICE, [_streams(seed, BRAIN.built) for seed in seeds])


@pytest.fixture(scope="module")
def brains() -> list[Brain]:
    """The last one was operated on; the second has no enhancement."""
    first, second, third = (_drawn(seed, operated=seed == 2) for seed in SEEDS)
    return [first, replace(second, tumour=replace(second.tumour, et_ml=0.0)), third]


@pytest.fixture(scope="module")
def body(brains: list[Brain]) -> Body:
    return _built(brains)


def test_the_organ_says_what_it_is() -> None:
    assert set(BRAIN.tissues.values()) <= set(TISSUES)
    assert set(BRAIN.sick) | set(BRAIN.reference) <= set(BRAIN.tissues)
    assert set(BRAIN.usual) <= set(BRAIN.sequences)


def test_fractions_sum_to_one_inside_the_brain_and_to_nothing_outside_the_mask(brains: list[Brain], body: Body) -> None:
    assert body.fractions.shape == (3, len(BRAIN.tissues), *LATTICE.shape)
    assert body.fractions.min() >= -1e-5
    total = body.fractions.sum(dim=1)
    assert total.max() < 1 + 1e-4
    assert not total[~body.mask].any()
    for brain, share, mask, seed in zip(brains, total, body.mask, SEEDS, strict=True):
        depth = Anatomy([brain.head], [stream(seed, "anatomy")]).at(LATTICE)["depth"][0, 0]
        inner = mask & (depth > 12)  # the tumour moves the surface by less
        torch.testing.assert_close(share[inner], torch.ones_like(share[inner]), atol=1e-4, rtol=0)
        # bone and air are left out only of what skull-stripping left round the brain
        assert (share[mask] < 0.9).float().mean() < 0.05
    assert body.mask.flatten(1).any(dim=1).all()


def test_labels_nest_inside_the_mask(body: Body) -> None:
    assert body.labels.dtype == torch.uint8
    assert body.mask[body.labels > 0].all()
    assert [sorted(labels.unique().tolist()) for labels in body.labels] == [[0, 1, 2, 3], [0, 1, 2], [0, 1, 2, 3, 4]]
    for labels in body.labels:
        classes = BRAIN.scheme.encode(labels.numpy())
        whole, core, rim = (BRAIN.scheme.region_mask(classes, region) for region in ("WT", "TC", "ET"))
        assert (rim <= core).all()
        assert (core <= whole).all()


def test_volumes_are_the_drawn_ones(body: Body, brains: list[Brain]) -> None:
    for labels, brain in zip(body.labels, brains, strict=True):
        tumour = brain.tumour
        ml = {code: (labels == code).sum().item() * VOXEL_ML for code in range(5)}
        core = ml[1] + ml[3] + ml[4]
        assert core + ml[2] == pytest.approx(tumour.wt_ml, rel=0.06)
        assert core == pytest.approx(tumour.tc_ml, rel=0.1)
        assert ml[3] == pytest.approx(tumour.et_ml, rel=0.15)
        assert ml[4] == pytest.approx(tumour.cavity_ml, rel=0.1)


def test_labels_say_what_the_tissues_are(body: Body) -> None:
    def share(name: str, row: int, code: int) -> float:
        return body.fractions[row, TISSUE[name]][body.labels[row] == code].mean().item()

    assert share("enhancing", 0, 3) > 0.5
    assert share("enhancing", 0, 2) < 0.15
    assert share("necrosis", 0, 1) + share("solid", 0, 1) + share("haemorrhage", 0, 1) > 0.6
    assert share("oedema", 0, 2) > 3 * share("oedema", 0, 0)
    assert share("cavity", 2, 4) > 0.6
    assert body.fractions[:2, TISSUE["cavity"]].max() == 0
    assert body.fractions[1, TISSUE["enhancing"]].max() == 0
    far = body.fractions[0, TISSUE["solid"]][body.labels[0] == 0]
    assert far.mean() < 0.01


def test_there_are_vessels_but_not_many(body: Body) -> None:
    blood = body.fractions[:, TISSUE["blood"]].sum(dim=(1, 2, 3)) / body.mask.sum(dim=(1, 2, 3))
    assert blood.min() > 0.001
    assert blood.max() < 0.06


def test_a_body_does_not_depend_on_who_else_is_in_the_batch(body: Body, brains: list[Brain]) -> None:
    for row in (0, 2):
        alone = _built([brains[row]], (SEEDS[row],))
        assert (alone.mask[0] != body.mask[row]).float().mean() < 1e-4
        assert (alone.labels[0] != body.labels[row]).float().mean() < 1e-3
        assert (alone.fractions[0] - body.fractions[row]).abs().mean() < 1e-4


def test_the_agent_goes_where_the_barrier_is_open() -> None:
    for seed in range(50):
        late = draw_agent(stream(seed, "agent"))["late"]
        assert set(late) <= set(BRAIN.tissues)
        assert 0.119 <= late["enhancing"] <= 0.601
        assert min(late.values()) >= 0
        assert max(late[name] for name in ("oedema", "solid", "necrosis")) < late["enhancing"]
