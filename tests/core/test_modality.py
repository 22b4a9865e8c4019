"""Names, aliases, subsets and masks."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmap.core.modality import ALIASES, GLIOMA_MRI, ModalitySet, canonical
from medmap.errors import InputError

# No alias can be spelt with these letters.
name_lists = st.lists(st.text("abcdeghij", min_size=1, max_size=4), min_size=1, max_size=6, unique=True)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("T1", "t1n"), ("t1w", "t1n"), ("native", "t1n"),
        ("T1ce", "t1c"), ("t1gd", "t1c"), ("ce-gadolinium_T1w", "t1c"),
        ("T2", "t2w"), ("T2w", "t2w"),
        ("FLAIR", "t2f"), ("fla", "t2f"), (" Flair ", "t2f"),
        ("ADC", "adc"), ("portal venous", "portal venous"),
    ],
)  # fmt: skip
def test_aliases_in_any_case(alias: str, name: str) -> None:
    assert canonical(alias) == name


def test_canonical_names_stand_for_themselves() -> None:
    assert all(canonical(name) == name for name in ALIASES.values())


@given(name_lists)
def test_there_are_two_to_the_m_minus_one_subsets(drawn: list[str]) -> None:
    names = ModalitySet(tuple(drawn))
    subsets = names.subsets()
    assert len(subsets) == len(set(subsets)) == 2 ** len(names) - 1
    assert subsets[-1] == names
    assert [len(s) for s in subsets] == sorted(len(s) for s in subsets)


@given(name_lists)
def test_a_mask_and_a_text_both_lead_back_to_the_subset(drawn: list[str]) -> None:
    names = ModalitySet(tuple(drawn))
    for subset in names.subsets():
        mask = subset.mask(names)
        assert mask.dtype == bool
        assert tuple(n for n, there in zip(names, mask, strict=True) if there) == subset.names
        assert names.parse(str(subset)) == subset


def test_four_sequences() -> None:
    assert GLIOMA_MRI.names == ("t1n", "t1c", "t2w", "t2f")
    assert GLIOMA_MRI.parse("flair, T1ce").names == ("t1c", "t2f")
    assert "FLAIR" in GLIOMA_MRI
    assert "adc" not in GLIOMA_MRI
    assert 3 not in GLIOMA_MRI


def test_a_set_is_frozen_and_equal_under_aliases() -> None:
    assert ModalitySet(("T1ce", "FLAIR")) == ModalitySet(("t1c", "t2f"))
    with pytest.raises(dataclasses.FrozenInstanceError, match="names"):
        GLIOMA_MRI.names = ("t1n",)  # type: ignore[misc]


@pytest.mark.parametrize("names", [(), ("",), ("t1n", " ")])
def test_an_empty_set_or_name_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="needs at least one name"):
        ModalitySet(names)


def test_a_name_twice_is_refused_under_an_alias_too() -> None:
    with pytest.raises(InputError, match=r"flair, t2f: a name appears twice"):
        ModalitySet(("flair", "t2f"))


def test_an_unknown_name_is_told_with_the_ones_there_are() -> None:
    with pytest.raises(InputError, match=r"modality adc is not one of t1n, t1c, t2w, t2f"):
        GLIOMA_MRI.parse("t1c+adc")
    with pytest.raises(InputError, match="modality t2w, t2f is not one of t1n, t1c"):
        GLIOMA_MRI.mask(ModalitySet(("t1n", "t1c")))


def test_an_empty_text_names_no_subset() -> None:
    with pytest.raises(InputError, match="needs at least one name"):
        GLIOMA_MRI.parse(" + ")
