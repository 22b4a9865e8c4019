"""No patient on two sides, every case tested once, and published lists that are what they were."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmap.data import splits
from medmap.data.splits import Split, begun_split, kfold, own_split, published, published_names, sha256_of
from medmap.errors import InputError

COUNTS = {
    "brats2018-list1": (199, 29, 57),
    "brats2018-list2": (199, 29, 57),
    "brats2018-list3": (199, 29, 57),
    "brats2020": (219, 50, 100),
    "brats2021": (876, 125, 250),
    "brats2023-gli": (875, 125, 251),
}


def all_ids(name: str) -> list[str]:
    listing = splits._read(name)
    return [case for part in splits.PARTS for case in listing[part]]


@st.composite
def rosters(draw):
    """Patients with one to three cases each, from up to three groups or none."""
    patients = draw(st.integers(6, 30))
    return [
        (f"p{p:02}-{scan}", f"p{p:02}", group)
        for p in range(patients)
        for group in [draw(st.sampled_from(["HGG", "LGG", "", None]))]
        for scan in range(draw(st.integers(1, 3)))
    ]


@settings(max_examples=60, deadline=None)
@given(rosters(), st.integers(2, 5), st.integers(0, 9), st.sampled_from([0.0, 0.2, 0.5]), st.randoms())
def test_every_case_is_tested_once_and_no_patient_stands_on_two_sides(cases, folds, seed, val_fraction, random):
    patient_of = {case: patient for case, patient, _ in cases}
    draws = [kfold(cases, folds, fold, seed, val_fraction) for fold in range(folds)]
    assert sorted(case for split in draws for case in split.test) == sorted(patient_of)
    sizes = [len({patient_of[case] for case in split.test}) for split in draws]
    assert max(sizes) - min(sizes) <= 1
    for fold, split in enumerate(draws):
        assert sorted(split.train + split.val + split.test) == sorted(patient_of)
        sides = [{patient_of[case] for case in part} for part in (split.train, split.val, split.test)]
        assert sum(map(len, sides)) == len(set(patient_of.values()))
        others = len(sides[0]) + len(sides[1])
        assert len(sides[1]) == (max(1, round(val_fraction * others)) if val_fraction else 0)
        assert split.sha256 == sha256_of(split.train, split.val, split.test)
        # an unsorted list of files must not decide who is tested
        shuffled = random.sample(cases, len(cases))
        assert kfold(shuffled, folds, fold, seed, val_fraction) == split


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 20), st.integers(3, 20), st.integers(2, 4), st.integers(0, 9))
def test_folds_are_stratified(high, low, folds, seed):
    cases = [(f"h{i}", f"h{i}", "HGG") for i in range(high)] + [(f"l{i}", f"l{i}", "LGG") for i in range(low)]
    tests = [kfold(cases, folds, fold, seed).test for fold in range(folds)]
    for grade in "hl":
        counts = [sum(case.startswith(grade) for case in test) for test in tests]
        assert max(counts) - min(counts) <= 1


def test_the_draw_is_what_it_was():
    """Pinned: another order of the same patients would silently compare runs on different folds."""
    cases = [(f"case{i}", f"case{i}", None) for i in range(6)]
    assert kfold(cases, 3, 0, seed=0).test == ("case0", "case1")
    assert kfold(cases, 3, 0, seed=0) != kfold(cases, 3, 0, seed=1)


def test_a_patient_who_was_segmented_twice_stays_on_one_side():
    cases = [(f"BraTS-SSA-{n:05}-000", f"BraTS-SSA-{n:05}", "BraTS-SSA") for n in range(100, 121)]
    cases.append(("BraTS-SSA-00121-000", "BraTS-SSA-00115", "BraTS-SSA"))
    for seed in range(20):
        for fold in range(3):
            split = kfold(cases, 3, fold, seed)
            for part in (split.train, split.val, split.test):
                assert ("BraTS-SSA-00115-000" in part) == ("BraTS-SSA-00121-000" in part)


@pytest.mark.parametrize(
    ("folds", "fold", "val_fraction", "message"),
    [
        (1, 0, 0.2, "expected at least 2 folds"),
        (3, 3, 0.2, "fold 3 of 3 folds"),
        (3, 0, 1.0, "val_fraction 1.0"),
        (5, 0, 0.2, "4 patients cannot be divided into 5 folds"),
    ],
)
def test_impossible_draws_are_refused(folds, fold, val_fraction, message):
    with pytest.raises(InputError, match=message):
        kfold([(c, c, None) for c in "abcd"], folds, fold, 0, val_fraction)


def test_too_few_patients_for_a_validation_part_and_a_case_named_twice_are_refused():
    with pytest.raises(InputError, match="with a training and a validation part"):
        kfold([("a", "a", None), ("b", "b", None)], 2, 0, 0, 0.2)
    with pytest.raises(InputError, match="case a is named twice"):
        kfold([("a", "a", None), ("a", "b", None), ("c", "c", None)], 2, 0, 0)


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_published_lists_are_whole(name):
    assert published_names() == sorted(COUNTS)
    split = published(name, all_ids(name))
    assert (len(split.train), len(split.val), len(split.test)) == COUNTS[name]
    assert len({*split.train, *split.val, *split.test}) == sum(COUNTS[name])
    assert split.sha256 == sha256_of(split.train, split.val, split.test)
    assert split.absent == split.unlisted == ()


def test_the_published_hash_is_the_hash_of_the_lines():
    split = published("brats2018-list1", all_ids("brats2018-list1"))
    assert split.sha256 == "2ef2eee170bb81d5a59ab91287bfcd04507d85cfb6057468164583eefb5bfc68"


def test_the_three_lists_of_2018_overlap_as_their_description_says():
    one, two, three = (set(splits._read(f"brats2018-list{i}")["test"]) for i in (1, 2, 3))
    assert (len(one & two), len(one & three), len(two & three), len(one | two | three)) == (14, 9, 14, 137)
    assert "14, 9 and 14 cases; union 137" in published.__doc__


def test_no_published_list_parts_the_time_points_of_a_patient():
    listing = splits._read("brats2023-gli")
    sides = [{case.rsplit("-", 1)[0] for case in listing[part]} for part in splits.PARTS]
    assert sum(map(len, sides)) == len(set.union(*sides))


def test_absent_and_unlisted_cases_are_named():
    ids = all_ids("brats2020")
    split = published("brats2020", [*ids[1:], "hospital-7"])
    assert split.absent == (ids[0],)
    assert split.unlisted == ("hospital-7",)
    assert ids[0] not in split.train
    assert split.sha256 == splits._read("brats2020")["sha256_of_lines"]
    assert split.to_dict()["absent"] == [ids[0]]


def test_a_list_that_does_not_fit_the_data_is_refused_with_examples():
    message = r"brats2021: none of its 876 train cases \(BraTS2021_00002, .*data, which hold BraTS-SSA-1"
    with pytest.raises(InputError, match=message):
        published("brats2021", ["BraTS-SSA-1"])


def test_an_unknown_list_gives_the_nearest_name():
    with pytest.raises(InputError, match="did you mean brats2018-list2"):
        published("brats2018_list2", [])


def test_an_altered_list_is_noticed(tmp_path, monkeypatch):
    text = (splits._folder() / "brats2020.json").read_text(encoding="utf-8")
    (tmp_path / "brats2020.json").write_text(text.replace("BraTS20_Training_002", "BraTS20_Training_999"))
    monkeypatch.setattr(splits, "_folder", lambda: tmp_path)
    with pytest.raises(InputError, match="the packaged list was altered"):
        published("brats2020", [])


# ---- a list of one's own -----------------------------------------------------------------------------------------

ROSTER = [("a", "A", None), ("b1", "B", None), ("b2", "B", None), ("c", "C", None), ("d", "D", None)]


def test_a_list_of_ones_own_is_taken_as_it_stands(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"train": ["b1", "b2"], "test": ["a"]}))
    split = own_split(file, ROSTER)
    assert (split.name, split.train, split.val, split.test) == ("mine", ("b1", "b2"), (), ("a",))
    assert split.unlisted == ("c", "d")
    assert split.sha256 == sha256_of(["b1", "b2"], [], ["a"])
    file.write_text(json.dumps(split.to_dict()))  # as a run folder keeps it
    assert own_split(file, ROSTER) == split


def test_a_run_keeps_its_own_division_whatever_it_came_from(tmp_path):
    """A published list keeps the hash of the whole list, and the cases of it that the data lack."""
    for split in (
        kfold(ROSTER, folds=2, fold=1, seed=0),
        Split("listed", ("a",), ("c",), ("d",), "0f" * 32, absent=("x",), unlisted=("b1", "b2")),
    ):
        (tmp_path / "splits.json").write_text(json.dumps(split.to_dict()))
        assert begun_split(tmp_path / "splits.json", ROSTER) == split
    with pytest.raises(InputError, match="names a, c, d, which the data do not hold"):
        begun_split(tmp_path / "splits.json", ROSTER[1:3])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "cannot be read"),
        ("{", "cannot be read"),
        ('{"test": ["a"]}', "no case to train on"),
        ('{"train": ["a"], "val": ["a"]}', "names a more than once"),
        ('{"train": ["a", "x"]}', "names x, which the data do not hold; they hold a, b1, b2"),
        ('{"train": ["b1"], "test": ["b2"]}', "b1 belong to patients who stand in another part"),
    ],
)
def test_a_list_that_cannot_be_used_says_why(tmp_path, text, message):
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(InputError, match=message):
        own_split(tmp_path / "mine.json", ROSTER)
    with pytest.raises(InputError, match="cannot be read"):
        own_split(tmp_path / "absent.json", ROSTER)
