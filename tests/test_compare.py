from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from made_up_scores import GLIOMA, scored

from medmap.compare import Line, compare_arms
from medmap.core.modality import ModalitySet
from medmap.core.stats import holm, paired_difference
from medmap.errors import InputError
from medmap.scores import SUMMARY, Score, write_scores

TWO = ModalitySet(("t1c", "t2f"))
Values = Mapping[str, Mapping[str, float]]
FIRST: Values = {"a": {"t1c": 0.2, "t2f": 0.4, "t1c+t2f": 0.6}, "b": {"t1c": 0.6, "t2f": 0.4, "t1c+t2f": 0.8}}
BETTER: Values = {"a": {"t1c": 0.3, "t2f": 0.7, "t1c+t2f": 0.8}, "b": {"t1c": 0.9, "t2f": 0.6, "t1c+t2f": 0.9}}


def write_arm(folder: Path, values: Values, convention: str = "brats", region: str = "WT") -> Path:
    """A table with one region: Dice as given, HD95 of 100 mm for none of it."""
    rows: list[Score] = []
    for case, by_subset in values.items():
        for subset, dice in by_subset.items():
            rows += scored(
                case, subset, region, f"patient of {case[0]}", dice=dice, hd95_mm=100 * (1 - dice), truth_ml=1
            )
    write_scores(folder, rows, TWO, GLIOMA, convention, [], {"evaluated": "made-up"})
    return folder


def write_seeds(folder: Path, values: Values, offsets: Sequence[float], below: str = "") -> Path:
    for seed, offset in enumerate(offsets):
        moved = {case: {s: v + offset for s, v in row.items()} for case, row in values.items()}
        write_arm(folder / f"seed{seed}" / below, moved)
    return folder


def by_group(lines: Sequence[Line]) -> dict[str, float]:
    return {line.group: round(line.difference.mean, 6) for line in lines}


@pytest.fixture
def first(tmp_path: Path) -> Path:
    return write_arm(tmp_path / "first", FIRST)


@pytest.fixture
def better(tmp_path: Path) -> Path:
    return write_arm(tmp_path / "better", BETTER)


def test_differences_are_the_others_minus_the_first(first: Path, better: Path) -> None:
    found = compare_arms([first, better])
    # all: a (0.1 + 0.3 + 0.2)/3 = 0.2, b (0.3 + 0.2 + 0.1)/3 = 0.2; with t1c: 0.15, 0.2; without: 0.3, 0.2
    expected = {"all subsets": 0.2, "with t1c": 0.175, "without t1c": 0.25, "only t1c+t2f": 0.15}
    assert by_group(found.lines) == expected
    assert {(line.arm, line.baseline, line.region) for line in found.lines} == {("better", "first", "WT")}
    assert by_group(compare_arms([better, first]).lines) == {group: -value for group, value in expected.items()}
    assert found.patients == 2
    assert found.seeds == {"first": 1, "better": 1}


def test_every_arm_is_compared_with_the_first(first: Path, better: Path, tmp_path: Path) -> None:
    same = write_arm(tmp_path / "same", FIRST)
    lines = compare_arms([first, better, same]).lines
    assert {(line.arm, line.baseline) for line in lines} == {("better", "first"), ("same", "first")}
    assert {round(line.difference.mean, 6) for line in lines if line.arm == "same"} == {0}


def test_one_run_each_has_no_interval_and_says_so(first: Path, better: Path) -> None:
    found = compare_arms([first, better])
    for line in found.lines:
        assert np.isnan([line.difference.low, line.difference.high, line.difference.p, line.p_holm]).all()
        assert not line.difference.evidence
    head, *lines, last = found.text().splitlines()
    assert head == "dice, difference in points [95 % interval over patients × runs], 2 patients"
    assert lines[0] == "better − first  WT     all subsets   +20.00"
    assert len(lines) == 4
    assert last == "one run each: not evidence"


def test_three_runs_an_arm_have_an_interval_and_holm(tmp_path: Path) -> None:
    a = write_seeds(tmp_path / "a", FIRST, (0.0, 0.01, 0.02))
    b = write_seeds(tmp_path / "b", BETTER, (0.0, 0.01, 0.02))
    found = compare_arms([a, b])
    assert found.seeds == {"a": 3, "b": 3}
    assert by_group(found.lines)["all subsets"] == 0.2
    line = found.lines[0]
    seeds = np.array([[0.4, 0.41, 0.42], [0.6, 0.61, 0.62]])
    expected = paired_difference(seeds + 0.2, seeds, ["patient of a", "patient of b"])
    assert (line.difference.low, line.difference.high) == pytest.approx((expected.low, expected.high))
    assert line.difference.low < 0.2 < line.difference.high
    assert all(line.difference.evidence for line in found.lines)
    assert [line.p_holm for line in found.lines] == holm([line.difference.p for line in found.lines]).tolist()
    assert max(line.p_holm / line.difference.p for line in found.lines) == 4  # four differences are shown
    text = found.text()
    assert "not evidence" not in text
    assert (
        f"[{100 * line.difference.low:+.2f}, {100 * line.difference.high:+.2f}]  p = {line.p_holm:.3f} (Holm)" in text
    )


def test_two_scans_of_a_patient_are_one(tmp_path: Path) -> None:
    gains = {"a1": 0.3, "a2": 0.2, "b1": 0.0, "c1": 0.1}
    a = write_seeds(tmp_path / "a", {case: {"t2f": 0.5} for case in gains}, (0.0, 0.01, 0.02))
    b = write_seeds(tmp_path / "b", {case: {"t2f": 0.5 + gain} for case, gain in gains.items()}, (0.0, 0.01, 0.02))
    found = compare_arms([a, b])
    assert found.patients == 3
    seeds = np.full((4, 1), 0.5) + np.array([[0.0, 0.01, 0.02]])
    moved = seeds + np.array(list(gains.values()))[:, None]
    together, apart = (paired_difference(moved, seeds, names) for names in (["a", "a", "b", "c"], None))
    (line,) = found.lines
    assert (line.difference.low, line.difference.high) == pytest.approx((together.low, together.high))
    assert line.difference.low != pytest.approx(apart.low)


def test_arms_with_few_runs_are_named(tmp_path: Path, first: Path) -> None:
    a = write_seeds(tmp_path / "a", FIRST, (0.0, 0.01, 0.02))
    b = write_seeds(tmp_path / "b", BETTER, (0.0, 0.01))
    assert compare_arms([a, b]).text().splitlines()[-1] == "fewer than three runs (b): not evidence"
    assert np.isfinite(compare_arms([a, b]).lines[0].difference.p)
    assert compare_arms([first, a, b]).text().splitlines()[-1] == "fewer than three runs (first, b): not evidence"


def test_one_patient_is_no_evidence_however_many_runs(tmp_path: Path) -> None:
    arms = [write_seeds(tmp_path / name, {"a": FIRST["a"]}, (0.0, 0.01, 0.02)) for name in "xy"]
    assert compare_arms(arms).text().splitlines()[-1] == "without an interval: not evidence"


def test_tables_of_floors_and_of_other_data_are_no_seeds(tmp_path: Path, better: Path) -> None:
    a = write_seeds(tmp_path / "a", FIRST, (0.0, 0.01, 0.02))
    write_arm(a / "on-others", {"z": FIRST["a"]})
    write_arm(a / "baseline-flair-threshold", {"z": {"t2f": 0.1}})
    write_arm(a / "seed0" / "fold0", {"a": FIRST["a"]})  # its pooled table is one level above
    assert compare_arms([a, better]).seeds == {"a": 3, "better": 1}


def test_names_are_the_shortest_that_tell_apart(tmp_path: Path) -> None:
    paths = [write_arm(tmp_path / arm / "seed0", FIRST) for arm in ("none", "pstar")]
    assert list(compare_arms(paths).seeds) == ["none/seed0", "pstar/seed0"]
    with pytest.raises(InputError, match=r"seed0 is named twice; compare different folders"):
        compare_arms([paths[0], paths[1], paths[0]])


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"a": FIRST["a"], "c": FIRST["b"]}, "the same cases: they differ in b, c;"),
        ({case: {"t1c": 0.5, "t2f": 0.5} for case in "ab"}, r"the same subsets: they differ in t1c\+t2f;"),
    ],
)
def test_other_cases_or_subsets_are_refused(first: Path, tmp_path: Path, other: Values, named: str) -> None:
    write_arm(tmp_path / "other", other)
    with pytest.raises(InputError, match=f"other and first were not scored on {named} evaluate both on the same data"):
        compare_arms([first, tmp_path / "other"])


def test_seeds_of_one_arm_must_be_alike_too(first: Path, tmp_path: Path) -> None:
    arm = write_seeds(tmp_path / "arm", FIRST, (0.0,))
    write_arm(arm / "seed1", {"a": FIRST["a"]})
    with pytest.raises(InputError, match="arm and first were not scored on the same cases: they differ in b"):
        compare_arms([first, arm])


def test_scores_of_differently_prepared_data_are_marked(first: Path, better: Path) -> None:
    """Names of cases agree at any spacing; the summary beside a table knows the store."""
    for folder, digest in ((first, "a"), (better, "a")):
        summary = json.loads((folder / SUMMARY).read_text())
        (folder / SUMMARY).write_text(json.dumps({**summary, "store": {folder.name: digest}}))
    assert "differently prepared" not in compare_arms([first, better]).text()
    (better / SUMMARY).write_text(json.dumps({**summary, "store": {"better": "b"}}))
    found = compare_arms([first, better])
    assert "scored on differently prepared data" in found.text()
    assert found.to_dict()["one_store"] is False


def test_other_regions_and_conventions_are_refused(first: Path, tmp_path: Path) -> None:
    write_arm(tmp_path / "core", FIRST, region="TC")
    with pytest.raises(InputError, match="the same regions: they differ in TC, WT"):
        compare_arms([first, tmp_path / "core"])
    write_arm(tmp_path / "nan", FIRST, convention="nan")
    with pytest.raises(InputError, match=r"different conventions for empty regions \(.*first: brats, .*nan: nan\)"):
        compare_arms([first, tmp_path / "nan"])
    (tmp_path / "nan" / "summary.json").unlink()  # a table alone is believed
    assert compare_arms([first, tmp_path / "nan"]).patients == 2


def test_what_cannot_be_compared(first: Path, better: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two folders or more; found 1"):
        compare_arms([first])
    with pytest.raises(InputError, match="metric 'iou' is not known; expected one of dice"):
        compare_arms([first, better], "iou")
    with pytest.raises(InputError, match=r"better/subsets\.csv: holds no nsd"):
        compare_arms([better, first], "nsd")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no subsets\.csv in it or one level below; run `medmap evaluate .*empty`"):
        compare_arms([first, tmp_path / "empty"])


def test_a_metric_in_mm_keeps_its_unit(first: Path, better: Path) -> None:
    found = compare_arms([first, better], "hd95_mm")
    assert by_group(found.lines)["all subsets"] == -20
    head, line, *_ = found.text().splitlines()
    assert head.startswith("hd95_mm, difference in mm [")
    assert line.endswith(" -20.00")


def test_cases_without_a_sequence_are_left_out_and_counted(tmp_path: Path) -> None:
    lacking = {"c": {"t2f": 0.5}}
    a = write_arm(tmp_path / "a", {**FIRST, **lacking})
    b = write_arm(tmp_path / "b", {**BETTER, "c": {"t2f": 0.1}})
    found = compare_arms([a, b])
    assert by_group(found.lines)["all subsets"] == 0.2
    assert by_group(found.lines)["without t1c"] == round((0.3 + 0.2 - 0.4) / 3, 6)
    lines = found.text().splitlines()
    assert lines[1].endswith("+20.00  over 2 of 3 cases")
    assert lines[3].endswith("+3.33")


def test_one_subset_is_its_own_group(tmp_path: Path) -> None:
    arms = [write_arm(tmp_path / name, {"a": {"t2f": 0.5}, "b": {"t2f": 0.7}}) for name in "xy"]
    assert by_group(compare_arms(arms).lines) == {"all subsets": 0}


def test_plain_types(first: Path, better: Path) -> None:
    told = json.loads(json.dumps(compare_arms([first, better]).to_dict()))
    assert (told["metric"], told["patients"], told["seeds"]) == ("dice", 2, {"first": 1, "better": 1})
    assert told["lines"][0]["group"] == "all subsets"
    assert told["lines"][0]["difference"]["mean"] == pytest.approx(0.2)
