"""The tissue table against physics that holds for all tissues, against its sources, and against how tissues look."""

from __future__ import annotations

from dataclasses import astuple

import pytest

from medmap.core.signal import (
    diffusion,
    enhanced_t1,
    inversion_recovery,
    null_inversion_time,
    spin_echo,
    spoiled_gradient_echo,
)
from medmap.core.tissues import GADOLINIUM, TISSUES, Spread, Tissue, relaxivity, tissue
from medmap.errors import InputError

FIELDS = (1.5, 3.0)
# T1 of these was measured at both fields; the rest is a choice of ours or does not depend on the field
MEASURED_AT_BOTH = ("white", "grey", "deep_grey", "blood", "liver", "spleen", "kidney", "muscle", "fat")


ALL = [(f"{name} at {field} T", properties) for name, at in TISSUES.items() for field, properties in at.items()]


@pytest.mark.parametrize("properties", [properties for _, properties in ALL], ids=[name for name, _ in ALL])
def test_relaxation_times_are_in_order(properties: Tissue) -> None:
    assert 0 < properties.t2star_s.mean <= properties.t2_s.mean <= properties.t1_s.mean
    assert 0 < properties.pd.mean <= 1
    assert 0 < properties.adc_mm2_s.mean <= 3.2e-3  # free water at body temperature and its measurement error


@pytest.mark.parametrize("properties", [properties for _, properties in ALL], ids=[name for name, _ in ALL])
def test_spreads_leave_every_property_positive(properties: Tissue) -> None:
    for mean, sd in astuple(properties):
        assert 0 < sd < mean / 2


def test_every_tissue_is_known_at_both_fields() -> None:
    assert len(TISSUES) == 16
    assert {tuple(fields) for fields in TISSUES.values()} == {FIELDS}
    assert tuple(GADOLINIUM) == FIELDS


@pytest.mark.parametrize("name", TISSUES)
def test_longitudinal_relaxation_slows_with_the_field(name: str) -> None:
    low, high = (tissue(name, field).t1_s.mean for field in FIELDS)
    assert low < high if name in MEASURED_AT_BOTH else low <= high


@pytest.mark.parametrize("name", TISSUES)
def test_decay_without_refocusing_hastens_with_the_field(name: str) -> None:
    low, high = (tissue(name, field).t2star_s.mean for field in FIELDS)
    assert high < low


@pytest.mark.parametrize("name", TISSUES)
def test_water_and_diffusion_do_not_depend_on_the_field(name: str) -> None:
    low, high = (tissue(name, field) for field in FIELDS)
    assert (low.pd, low.adc_mm2_s) == (high.pd, high.adc_mm2_s)


@pytest.mark.parametrize("field", FIELDS)
def test_cerebrospinal_fluid_relaxes_slowest(field: float) -> None:
    assert max(TISSUES, key=lambda name: tissue(name, field).t1_s.mean) == "csf"
    assert max(TISSUES, key=lambda name: tissue(name, field).t2_s.mean) == "csf"


@pytest.mark.parametrize("field", FIELDS)
def test_water_moves_more_freely_where_there_are_fewer_cells(field: float) -> None:
    order = ("csf", "cavity", "necrosis", "oedema", "solid", "grey", "deep_grey", "white", "haemorrhage")
    diffusivities = [tissue(name, field).adc_mm2_s.mean for name in order]
    assert diffusivities == sorted(diffusivities, reverse=True)
    assert len(set(diffusivities)) == len(order)


@pytest.mark.parametrize(
    ("name", "field", "quantity", "expected"),
    [
        ("white", 1.5, "t1_s", Spread(0.646, 0.032)),  # Wright 2008
        ("grey", 3.0, "t1_s", Spread(1.607, 0.112)),
        ("white", 3.0, "t2_s", Spread(0.069, 0.003)),  # Stanisz 2005
        ("grey", 3.0, "t2_s", Spread(0.099, 0.007)),
        ("grey", 1.5, "adc_mm2_s", Spread(0.89e-3, 0.04e-3)),  # Helenius 2002
        ("white", 3.0, "pd", Spread(0.691, 0.017)),  # Oros-Peusquens 2019
        ("liver", 3.0, "t1_s", Spread(0.809, 0.071)),  # de Bazelaire 2004
        ("spleen", 3.0, "t2_s", Spread(0.061, 0.009)),
        ("fat", 3.0, "t1_s", Spread(0.382, 0.013)),
    ],
)
def test_published_values(name: str, field: float, quantity: str, expected: Spread) -> None:
    assert getattr(tissue(name, field), quantity) == expected


def test_means_of_two_published_values() -> None:
    # Wright 2008: putamen 1084 and 1332 ms, caudate head 1109 and 1395 ms; CSF at two places at 3 T
    assert tissue("deep_grey", 1.5).t1_s.mean == pytest.approx((1.084 + 1.109) / 2, abs=1e-3)
    assert tissue("deep_grey", 3.0).t1_s.mean == pytest.approx((1.332 + 1.395) / 2, abs=1e-3)
    assert tissue("csf", 3.0).t1_s.mean == pytest.approx((4.3087 + 4.4540) / 2, abs=2e-3)
    assert tissue("csf", 3.0).t2_s.mean == pytest.approx((1.8855 + 2.3729) / 2, abs=2e-3)
    # Obrzut 2020: R2* of 28.72 ± 2.69 1/s
    assert tissue("liver", 1.5).t2star_s.mean == pytest.approx(1 / 28.72, abs=1e-4)
    assert tissue("liver", 1.5).t2star_s.sd == pytest.approx(2.69 / 28.72**2, abs=1e-4)


def test_relaxivities_are_means_over_agents() -> None:
    # Rohrer 2005: gadopentetate, gadobutrol, gadoteridol, gadoterate, gadodiamide
    for field, r1, r2 in (
        (1.5, (4.1, 5.2, 4.1, 3.6, 4.3), (4.6, 6.1, 5.0, 4.3, 5.2)),
        (3.0, (3.7, 5.0, 3.7, 3.5, 4.0), (5.2, 7.1, 5.7, 4.9, 5.6)),
    ):
        assert relaxivity(field).r1.mean == pytest.approx(sum(r1) / 5, abs=0.05)
        assert relaxivity(field).r2.mean == pytest.approx(sum(r2) / 5, abs=0.05)
        assert relaxivity(field).r1.mean < relaxivity(field).r2.mean


def _flair(name: str, field: float) -> float:
    properties = tissue(name, field)
    ti_s = null_inversion_time(tissue("csf", field).t1_s.mean, 9.0)
    pd, t1_s, t2_s = properties.pd.mean, properties.t1_s.mean, properties.t2_s.mean
    return abs(inversion_recovery(pd, t1_s, t2_s, 9.0, 0.12, ti_s).item())


@pytest.mark.parametrize("field", FIELDS)
def test_flair_darkens_fluid_and_brightens_grey_matter_and_oedema(field: float) -> None:
    bright = {name: _flair(name, field) for name in TISSUES}
    assert bright["csf"] < 1e-6 < bright["cavity"] < bright["white"] < bright["grey"] < bright["oedema"]


@pytest.mark.parametrize("field", FIELDS)
def test_t1_weighting_orders_the_brain(field: float) -> None:
    def bright(name: str) -> float:
        properties = tissue(name, field)
        return spin_echo(properties.pd.mean, properties.t1_s.mean, properties.t2_s.mean, 0.5, 0.012).item()

    order = ("haemorrhage", "white", "deep_grey", "grey", "necrosis", "cavity", "csf")
    signals = [bright(name) for name in order]
    assert signals == sorted(signals, reverse=True)


def test_contrast_agent_takes_off_tumour_what_was_measured_in_glioblastoma() -> None:
    # 838 ± 210 ms in enhancing tumour at 3 T
    t1_s = tissue("solid", 3.0).t1_s.mean
    enhanced = enhanced_t1(t1_s, concentration_mmol_l=0.17, relaxivity_r1=relaxivity(3.0).r1.mean).item()
    assert t1_s - enhanced == pytest.approx(0.838, abs=0.02)
    assert enhanced < tissue("white", 3.0).t1_s.mean


@pytest.mark.parametrize("field", FIELDS)
def test_liver_lesion_is_dark_in_t1_and_bright_in_diffusion_weighting(field: float) -> None:
    def t1_weighted(name: str) -> float:
        p = tissue(name, field)
        return spoiled_gradient_echo(p.pd.mean, p.t1_s.mean, p.t2star_s.mean, 0.004, 0.002, 0.2).item()

    def diffusion_weighted(name: str) -> float:
        p = tissue(name, field)
        return diffusion(spin_echo(p.pd.mean, p.t1_s.mean, p.t2_s.mean, 4.0, 0.06), 800.0, p.adc_mm2_s.mean).item()

    assert t1_weighted("fat") > t1_weighted("liver") > t1_weighted("liver_lesion")
    assert diffusion_weighted("liver_lesion") > 2 * diffusion_weighted("liver")
    assert diffusion_weighted("spleen") > diffusion_weighted("liver")


def test_unknown_tissue_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"tissue 'bone': not in the table; expected one of white, grey, deep_grey"):
        tissue("bone", 3.0)


@pytest.mark.parametrize("field", [7.0, 0.0, float("nan")])
def test_unknown_field_is_refused(field: float) -> None:
    with pytest.raises(InputError, match=r"field: found .* T; expected 1\.5 or 3 T"):
        tissue("white", field)
    with pytest.raises(InputError, match=r"field: found .* T; expected 1\.5 or 3 T"):
        relaxivity(field)
