"""Codes in files, classes of a network, regions of a table."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmap.core.labels import SCHEMES, LabelScheme, scheme_named
from medmap.errors import InputError

MADE_UP = LabelScheme(
    "made up", ("background", "organ", "cyst"), {"organ": 10, "cyst": 255}, {"all": ("organ", "cyst")}
)


@pytest.mark.parametrize(
    ("scheme", "wt", "tc", "et"),
    [
        ("brats2021", {1, 2, 4}, {1, 4}, {4}),
        ("brats2023", {1, 2, 3}, {1, 3}, {3}),
        ("brats2024", {1, 2, 3}, {1, 3}, {3}),
        ("msd", {1, 2, 3}, {2, 3}, {3}),
    ],
)
def test_regions_of_each_family_in_file_codes(scheme: str, wt: set[int], tc: set[int], et: set[int]) -> None:
    s = SCHEMES[scheme]
    codes = {
        region: {int(s.decode(np.array([index]))[0]) for index in s.members(region)} for region in ("WT", "TC", "ET")
    }
    assert codes == {"WT": wt, "TC": tc, "ET": et}


def test_a_lesion_belongs_to_the_liver() -> None:
    liver = SCHEMES["liver"]
    classes = liver.encode(np.array([0, 1, 2]))
    assert liver.region_mask(classes, "LIVER").tolist() == [False, True, True]
    assert liver.region_mask(classes, "LESION").tolist() == [False, False, True]


def test_four_is_enhancing_tumour_in_2021_and_a_cavity_apart_in_2024() -> None:
    four = np.array([4])
    assert SCHEMES["brats2021"].classes[SCHEMES["brats2021"].encode(four)[0]] == "et"
    later = SCHEMES["brats2024"]
    assert later.classes[later.encode(four)[0]] == "rc"
    assert not later.region_mask(later.encode(four), "WT").any()
    assert later.region_mask(later.encode(four), "RC").all()


@pytest.mark.parametrize("scheme", [*SCHEMES.values(), MADE_UP], ids=lambda s: s.name)
def test_regions_are_nested_and_codes_return(scheme: LabelScheme) -> None:
    codes = np.array([[0, *scheme.codes.values()]], np.int16)
    classes = scheme.encode(codes)
    assert classes.dtype == np.uint8
    assert classes.shape == codes.shape
    assert scheme.decode(classes).tolist() == codes.tolist()
    assert LabelScheme.from_dict(scheme.to_dict()) == scheme
    if "ET" in scheme.regions:
        wt, tc, et = (scheme.region_mask(classes, r) for r in ("WT", "TC", "ET"))
        assert (wt >= tc).all()
        assert (tc >= et).all()
        assert et.any()


@given(st.sampled_from(sorted(SCHEMES)), st.lists(st.integers(-300, 300), min_size=1, max_size=20))
def test_every_code_is_either_known_or_named_in_the_error(name: str, codes: list[int]) -> None:
    scheme = SCHEMES[name]
    unknown = sorted(set(codes) - {0, *scheme.codes.values()})
    if unknown:
        with pytest.raises(InputError, match=rf"case 7: found label {unknown[0]}\b"):
            scheme.encode(np.array(codes), "case 7")
    else:
        assert scheme.decode(scheme.encode(np.array(codes))).tolist() == codes


def test_the_error_says_what_the_scheme_knows_and_how_to_name_another() -> None:
    with pytest.raises(InputError, match=r"scheme brats2021 knows 1 = ncr, 2 = ed, 4 = et.*--labels \(brats2021, "):
        SCHEMES["brats2021"].encode(np.array([0, 3]), "seg.nii.gz")


@pytest.mark.parametrize("value", [0.5, np.nan, 3.7])
def test_a_code_that_is_no_whole_number_is_refused(value: float) -> None:
    with pytest.raises(InputError, match=rf"found label {value:g}"):
        SCHEMES["brats2023"].encode(np.array([0.0, 1.0, value]))


def test_whole_numbers_may_be_stored_as_floats() -> None:
    assert SCHEMES["brats2021"].encode(np.array([0.0, 4.0])).tolist() == [0, 3]


def test_schemes_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(InputError, match="give each class one code"):
        LabelScheme("x", ("background", "a", "b"), {"a": 1})
    with pytest.raises(InputError, match="codes must be distinct"):
        LabelScheme("x", ("background", "a", "b"), {"a": 1, "b": 1})
    with pytest.raises(InputError, match="within 1…255"):
        LabelScheme("x", ("background", "a"), {"a": 0})
    with pytest.raises(InputError, match="region WT is made of"):
        LabelScheme("x", ("background", "a"), {"a": 1}, {"WT": ("a", "c")})
    with pytest.raises(InputError, match="region WT is made of"):
        LabelScheme("x", ("background", "a"), {"a": 1}, {"WT": ()})


def test_same_classes_may_have_other_codes() -> None:
    assert SCHEMES["brats2021"].same_classes(SCHEMES["brats2023"])
    assert not SCHEMES["brats2021"].same_classes(SCHEMES["brats2024"])


def test_a_scheme_that_does_not_exist() -> None:
    assert scheme_named("msd") is SCHEMES["msd"]
    with pytest.raises(InputError, match="label scheme 'brats2022' is not known; expected one of brats2021"):
        scheme_named("brats2022")


def test_any_regions_may_be_left_out_and_those_told_stay_as_they_are() -> None:
    classes = np.arange(5)
    scheme = SCHEMES["brats2024"]
    for count in range(len(scheme.regions) + 1):
        for left_out in combinations(scheme.regions, count):
            table, meaning = scheme.without(left_out)
            for region in set(scheme.regions) - set(left_out):
                np.testing.assert_array_equal(
                    scheme.region_mask(table[classes], region), scheme.region_mask(classes, region)
                )
            told = set(scheme.regions) - set(left_out)
            assert set(meaning.values()) <= told
            patterns = {tuple(c in scheme.regions[r] for r in sorted(told)) for c in scheme.classes[1:]}
            assert len(set(table[1:]) - {0}) == len(
                patterns - {(False,) * len(told)}
            )  # what nothing tells apart is one


def test_what_nobody_tells_is_background() -> None:
    table, meaning = SCHEMES["brats2023"].without({"WT"})
    assert (table.tolist(), meaning) == ([0, 1, 0, 3], {})
    assert SCHEMES["brats2023"].without({"TC"})[1] == {"ed": "WT"}
