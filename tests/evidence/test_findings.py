"""From made-up results with known differences to the sentences that must follow, and to none that must not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from medmap.core.modality import GLIOMA_MRI
from medmap.errors import ConfigError, InputError
from medmap.evidence.findings import MEAN, Outcome, effects, groups, level, main_effects, page, table, verdict
from medmap.evidence.plan import ALL, FULL, MISSING, Arm, Patients, Phantoms, Study
from medmap.evidence.results import (
    DIVERGED,
    FINISHED,
    LEAK,
    Result,
    Results,
    Scored,
    read_result,
    read_results,
    write_result,
)
from medmap.evidence.tables import latex, markdown, subset_rows
from medmap.evidence.views import gain_at_ends

SUBSETS = [str(subset) for subset in GLIOMA_MRI.subsets()]
REGIONS = ("WT", "TC", "ET")
STUDY = Study(
    "made-up",
    "Does it?",
    "About it.",
    Phantoms("p", test=12),
    (Arm("none", ("align=none",)), Arm("P*", ("align=pstar",), "none")),
)


def rows(patients: int, rng: np.random.Generator, gain: float, own: Sequence[float]) -> tuple[Scored, ...]:
    """Patients with a level each, noise of half a point, and a gain for all."""
    return tuple(
        Scored(
            "test",
            f"c, {i}",
            f"p{i}",
            REGIONS if i else ("WT", "TC"),
            {(s, r): round(float(own[i] + gain + rng.normal(0, 0.5)), 1) for s in SUBSETS for r in REGIONS},
        )
        for i in range(patients)
    )


def results(gain: float, study: Study = STUDY, seed: int = 0) -> Results:
    rng = np.random.default_rng(seed)
    own = rng.uniform(40, 80, 12)
    found = {}
    for arm in study.arms:
        found[arm.name] = [
            [Result(t, FINISHED, rows(12, rng, gain if arm.against else 0.0, own)) for t in folds]
            for folds in study.trials(arm)
        ]
    return Results(study, found)


def test_a_gain_that_is_there_is_found_with_its_size() -> None:
    (found,) = effects(results(2.0), [Outcome("test", ALL, MEAN)])
    assert found.difference.low < 2.0 < found.difference.high
    assert found.difference.high - found.difference.low < 0.5
    sentence = verdict(found)
    assert sentence.startswith("P* raises the mean of all subsets by 2.0 points [")
    assert "over none (3 and 3 runs, 12 cases, Holm p = " in sentence
    assert "P* lowers the mean of all subsets by 2.0 points [1." in verdict(
        effects(results(-2.0), [Outcome("test", ALL, MEAN)])[0]
    )


def test_where_there_is_none_the_sentence_says_how_large_one_could_be() -> None:
    (found,) = effects(results(0.0), [Outcome("test", ALL, MEAN)])
    reach = max(abs(found.difference.low), abs(found.difference.high))
    assert f"no effect larger than ±{reach:.1f} points" in verdict(found)
    assert f"Holm p = {found.p_holm:.3f})" in verdict(found)


def test_one_run_each_and_two_are_not_evidence() -> None:
    one = results(2.0, Study("s", "?", "", STUDY.data, STUDY.arms, seeds=1))
    assert verdict(effects(one, [Outcome("test", ALL, MEAN)])[0]).endswith("without an interval: not evidence.")
    two = results(2.0, Study("s", "?", "", STUDY.data, STUDY.arms, seeds=2))
    assert verdict(effects(two, [Outcome("test", ALL, MEAN)])[0]).endswith("Fewer than three runs: not evidence.")


def test_folds_of_a_seed_are_one_run_over_all_their_patients() -> None:
    study = Study("s", "?", "", Patients("r", folds=2), STUDY.arms, seeds=3)
    rng, found = np.random.default_rng(0), {}
    for arm in study.arms:
        found[arm.name] = []
        for folds in study.trials(arm):
            parts = [rows(4, rng, 0.0, [50.0 + 10 * k] * 4) for k in range(2)]
            named = [
                tuple(Scored(r.set, f"{k}{r.case}", f"{k}{r.patient}", r.present, r.dice) for r in part)
                for k, part in enumerate(parts)
            ]
            found[arm.name].append([Result(t, FINISHED, n) for t, n in zip(folds, named, strict=True)])
    whole = Results(study, found)
    found_there = table(whole.finished("none"), Outcome("test", ALL, "WT"))
    assert found_there.values.shape == (8, 3)
    assert len(set(found_there.patients)) == 8
    assert abs(level(whole, study.arms[0], Outcome("test", ALL, "WT")).mean - 55) < 0.5
    found["none"][1][0] = None  # a fold is lacking: the seed does not count
    assert len(Results(study, found).finished("none")) == 2


def test_groups_and_those_who_have_the_region() -> None:
    there = results(0.0)
    found = groups(there.finished("none")[0][0].rows)
    assert len(found[ALL]) == 15
    assert found[FULL] == ["t1n+t1c+t2w+t2f"]
    assert len(found[MISSING]) == 14
    assert len(found["single ones"]) == 4
    assert (len(found["with t1c"]), len(found["without t1c"])) == (8, 7)
    assert level(there, STUDY.arms[0], Outcome("test", ALL, "ET"), having=True).n == 11


def test_a_result_is_read_as_it_was_written(tmp_path) -> None:
    (trial,) = STUDY.trials(STUDY.arms[0])[0]
    written = Result(trial, FINISHED, rows(3, np.random.default_rng(0), 0.0, [50] * 3), {"seconds": {"train": 1.0}})
    assert read_result(tmp_path, trial) is None
    write_result(tmp_path, written)
    read = read_result(tmp_path, trial)
    assert read is not None
    assert read.rows == written.rows
    assert read.facts["seconds"] == {"train": 1.0}
    assert (tmp_path / f"{trial.key}.csv").stat().st_size < 3 * 45 * 6 + 900


def test_a_run_that_diverged_is_counted_and_not_scored(tmp_path) -> None:
    for arm in STUDY.arms:
        for number, (trial,) in enumerate(STUDY.trials(arm)):
            diverged = arm.against and number == 1
            made = rows(12, np.random.default_rng(0), 0.0, [50] * 12)
            write_result(tmp_path / "runs", Result(trial, DIVERGED if diverged else FINISHED, () if diverged else made))
    read = read_results(STUDY, tmp_path)
    assert (read.count(), read.count(FINISHED), read.count(DIVERGED)) == (6, 5, 1)
    text = page(read, "medmap study made-up", [])
    assert "1 runs diverged" in text
    assert "(2 and 3 runs, 12 cases" in text
    assert "Fewer than three runs: not evidence." in text


def test_an_unfinished_study_says_so(tmp_path) -> None:
    (trial,) = STUDY.trials(STUDY.arms[0])[0]
    write_result(tmp_path / "runs", Result(trial, FINISHED, rows(3, np.random.default_rng(0), 0.0, [50] * 3)))
    text = page(read_results(STUDY, tmp_path), "medmap study made-up", [])
    assert "*Unfinished: 1 of 6 runs are done.*" in text
    assert "Simulated patients (p), 4 mm: 160 to learn from, 10 to choose checkpoints by, 12 to be tested on." in text


def test_the_table_of_papers_in_both_forms() -> None:
    head, cells = subset_rows(results(0.0), "test")
    assert head[:5] == ["t1n", "t1c", "t2w", "t2f", "WT none"]
    assert len(cells) == 16
    assert cells[0][:4] == ["○", "○", "●", "○"]  # the field's tables begin with T2 alone
    assert cells[4][:4] == ["○", "●", "●", "○"]
    assert cells[14][:4] == ["●"] * 4
    column = [float(line[4]) for line in cells]
    assert column[-1] == pytest.approx(np.mean(column[:-1]), abs=0.06)
    assert markdown(head, cells).count("\n") == 17
    text = latex(head, cells)
    assert text.startswith("\\begin{tabular}{ccccrrrrrr}")
    assert r"$\circ$ & $\circ$ & $\bullet$ & $\circ$ & " in text
    assert text.count(r"\\") == 17


def scored(case: str, patient: str, value: float, subsets: Sequence[str] = SUBSETS, name: str = "test") -> Scored:
    return Scored(name, case, patient, REGIONS, {(s, r): value for s in subsets for r in REGIONS})


def made(study: Study, values: dict[str, list[tuple[Scored, ...]]]) -> Results:
    """One result a seed and fold, of the rows given for each arm."""
    return Results(
        study,
        {
            arm.name: [
                [Result(t, FINISHED, rows) for t, rows in zip(folds, values[arm.name], strict=True)]
                for folds in study.trials(arm)
            ]
            for arm in study.arms
        },
    )


def test_a_case_that_several_folds_were_tested_on_has_their_mean() -> None:
    study = Study("s", "?", "", Patients("r", folds=2), STUDY.arms, seeds=1)
    folds = [(scored("c", "p", value, name="elsewhere"),) for value in (20.0, 80.0)]
    there = made(study, {"none": folds, "P*": folds})
    assert table(there.finished("none"), Outcome("elsewhere", ALL, MEAN)).values.tolist() == [[50.0]]


def test_arms_are_compared_case_by_case_whatever_the_order() -> None:
    study = Study("s", "?", "", Phantoms("p"), STUDY.arms, seeds=3)
    none = tuple(scored(f"c{i}", f"p{i // 2}", 10.0 * i) for i in range(6))  # two scans of each patient
    star = tuple(scored(f"c{i}", f"p{i // 2}", 10.0 * i + 2) for i in reversed(range(6)))
    (found,) = effects(made(study, {"none": [none], "P*": [star]}), [Outcome("test", ALL, MEAN)])
    assert found.difference.mean == pytest.approx(2.0)
    assert found.difference.high - found.difference.low < 1e-9
    assert found.difference.patients == 6


def test_a_set_that_only_some_arms_were_tested_on_is_told_of_them() -> None:
    both = Phantoms("q", others=(Phantoms("far"),))
    arms = (*STUDY.arms, Arm("far, none", ("align=none",), data=both), Arm("far, P*", (), "far, none", data=both))
    study = Study("s", "?", "", Phantoms("p"), arms, seeds=3)
    near = (scored("c", "p", 50.0), scored("d", "q", 60.0))
    far = tuple(scored(row.case, row.patient, 30.0, name="far") for row in near)
    there = made(study, {"none": [near], "P*": [near], "far, none": [far], "far, P*": [far]})
    assert [(e.arm, e.outcome.set) for e in main_effects(there)] == [("P*", "test"), ("far, P*", "far")]
    text = page(there, "medmap study s", [])
    assert "nan" not in text
    assert "Dice on far" in text


def test_a_network_of_few_subsets_is_marked() -> None:
    few = (scored("c", "p", 50.0, ["t1c", "t1n+t1c+t2w+t2f"]), scored("d", "q", 60.0, ["t1c", "t1n+t1c+t2w+t2f"]))
    whole = (scored("c", "p", 50.0), scored("d", "q", 60.0))
    there = made(Study("s", "?", "", Phantoms("p"), STUDY.arms, seeds=1), {"none": [whole], "P*": [few]})
    assert "| P* (2 of 15 subsets) | 1 |" in page(there, "medmap study s", [])
    _, cells = subset_rows(there, "test")
    assert cells[-1][5] == "–"
    assert "nan" not in markdown(*subset_rows(there, "test"))


def test_the_table_of_papers_has_the_rows_of_whoever_answers_most() -> None:
    few = (scored("c", "p", 50.0, ["t1c", "t1n+t1c+t2w+t2f"]), scored("d", "q", 60.0, ["t1c", "t1n+t1c+t2w+t2f"]))
    whole = (scored("c", "p", 50.0), scored("d", "q", 60.0))
    there = made(Study("s", "?", "", Phantoms("p"), STUDY.arms, seeds=1), {"none": [few], "P*": [whole]})
    _, cells = subset_rows(there, "test")
    assert len(cells) == 16
    assert [cells[-1][4], cells[-1][5]] == ["–", "55.0"]


def test_what_is_still_to_be_run_is_corrected_for() -> None:
    arms = (
        *STUDY.arms,
        *(Arm(f"P^{k}", ("align.anchor=pk", f"align.fixed={k}"), "none") for k in ("t1n", "t1c", "t2w")),
    )
    study = Study("s", "?", "", STUDY.data, arms)
    whole = results(0.5, study)
    cut = Results(
        study, {name: seeds if name in ("none", "P*") else [[None]] * 3 for name, seeds in whole.found.items()}
    )
    (found,) = main_effects(cut)
    assert found.p_holm == pytest.approx(min(1.0, 4 * found.difference.p))
    alone = Results(Study("s", "?", "", STUDY.data, STUDY.arms), {name: whole.found[name] for name in ("none", "P*")})
    assert main_effects(alone)[0].p_holm == found.difference.p


def test_sets_on_which_nobody_was_tested_yet_are_corrected_for() -> None:
    """Arms that are still to be run bring a test set of their own, for themselves and not for the others."""
    both = Phantoms("q", others=(Phantoms("far"),))
    far = (Arm("far, none", ("align=none",), data=both), Arm("far, P*", (), "far, none", data=both))
    whole = results(0.5, STUDY)
    study = Study("s", "?", "", STUDY.data, (*STUDY.arms, *far))
    found = {name: whole.found.get(name, [[None]] * 3) for name in (arm.name for arm in study.arms)}
    (one,) = main_effects(Results(study, found))
    assert one.p_holm == pytest.approx(min(1.0, 3 * one.difference.p))  # P*; far, P* on test; far, P* on far


def test_a_leak_is_never_compared() -> None:
    rows = (scored("c", "p", 50.0), scored("d", "q", 60.0))
    leaks = (*rows, *(scored(row.case, row.patient, 90.0, name=LEAK) for row in rows))
    there = made(Study("s", "?", "", Phantoms("p"), STUDY.arms), {"none": [leaks], "P*": [leaks]})
    assert {e.outcome.set for e in effects(there)} == {"test"}
    assert LEAK not in page(there, "medmap study s", [])


def test_arms_that_were_tested_on_different_cases_are_not_compared() -> None:
    there, other = ((scored(name, "p", 50.0), scored("d", "q", 60.0)) for name in ("c", "e"))
    study = Study("s", "?", "", Phantoms("p"), STUDY.arms)
    with pytest.raises(InputError, match=r"P\* and none were tested on different cases of test, such as c, e"):
        effects(made(study, {"none": [there], "P*": [other]}))


def test_a_damaged_table_is_named(tmp_path: Path) -> None:
    (trial,) = STUDY.trials(STUDY.arms[0])[0]
    write_result(tmp_path, Result(trial, FINISHED, (scored("c", "p", 50.0),)))
    table = tmp_path / f"{trial.key}.csv"
    table.write_text(table.read_text() + "<<<<<<< HEAD\n")
    with pytest.raises(InputError, match=rf"{trial.key}.json: damaged"):
        read_result(tmp_path, trial)


def test_a_cleaned_region_stands_beside_the_raw_one_and_has_no_part_in_the_mean() -> None:
    rows = tuple(
        Scored("test", f"c{i}", f"p{i}", ("WT",), {("t1c", "WT"): 40.0, ("t1c", "ET"): 0.0, ("t1c", "ET-pp"): 100.0})
        for i in range(2)
    )
    there = made(Study("s", "?", "", Phantoms("p"), STUDY.arms, seeds=1), {"none": [rows], "P*": [rows]})
    found = table(there.finished("none"), Outcome("test", ALL, MEAN))
    assert found.values.ravel().tolist() == [20.0, 20.0]
    assert "WT / ET / ET-pp" in page(there, "medmap study s", [])
    having = table(there.finished("none"), Outcome("test", ALL, "ET-pp"), having=True)
    assert np.isnan(having.values).all()  # nobody has an enhancing tumour


def test_further_pairs_of_arms_are_compared_too() -> None:
    arms = (Arm("none"), Arm("P*", ("align.anchor=pstar",), "none"), Arm("mean", ("align.anchor=uniform",), "none"))
    study = Study("s", "?", "", Phantoms("p"), arms, also=(("P*", "mean"),))
    there = results(1.0, study)
    assert [(e.arm, e.against) for e in main_effects(there)] == [("P*", "none"), ("mean", "none"), ("P*", "mean")]
    with pytest.raises(ConfigError, match="nobody"):
        Study("s", "?", "", Phantoms("p"), arms, also=(("P*", "nobody"),))


def test_a_case_that_lacks_a_sequence_is_written_and_read(tmp_path) -> None:
    (trial,) = STUDY.trials(STUDY.arms[0])[0]
    some = [subset for subset in SUBSETS if "t1c" not in subset.split("+")]
    made_rows = (scored("few", "p", 10.0, some), scored("all", "q", 20.0))
    write_result(tmp_path, Result(trial, FINISHED, made_rows, {}))
    read = read_result(tmp_path, trial)
    assert read is not None
    assert read.rows == made_rows


def test_whether_a_gain_depends_on_the_axis_is_one_difference_of_differences() -> None:
    arms = [Arm(f"{at}, α = 0", series="α = 0", at=at) for at in (0.0, 1.0)]
    arms += [Arm(f"{at}, P*", ("align=none",), f"{at}, α = 0", series="P*", at=at) for at in (0.0, 1.0)]
    study = Study("s", "?", "", Phantoms("p"), tuple(arms), seeds=3)
    rng = np.random.default_rng(1)
    own = rng.normal(60, 9, size=20)

    def run(gain: float) -> tuple[Scored, ...]:
        return tuple(scored(f"c{i}", f"p{i}", float(own[i] + gain + rng.normal(0, 0.1))) for i in rng.permutation(20))

    def said(first: float, last: float) -> str:
        gains = {"0.0, α = 0": 0.0, "1.0, α = 0": 0.0, "0.0, P*": first, "1.0, P*": last}
        rows = {
            arm.name: [[Result(t, FINISHED, run(gains[arm.name])) for t in folds] for folds in study.trials(arm)]
            for arm in arms
        }
        (sentence,) = gain_at_ends(Results(study, rows))
        return sentence

    assert said(1.0, 3.0).startswith("What P* brings at 1.0 less what it brings at 0.0: +2.0 points [")
    assert said(1.0, 3.0).endswith("it depends.")
    assert said(2.0, 2.0).endswith("no dependence was seen.")
