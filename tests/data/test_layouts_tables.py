"""CSV tables: every cell belongs to the column above it, whatever the columns are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from medmap.data.layouts import recognise
from medmap.errors import InputError


def read(tmp_path: Path, text: str) -> dict[str, dict[str, str]]:
    """{case: {sequence: file}} of a table."""
    (tmp_path / "cases.csv").write_text(text, encoding="utf-8")
    return {
        case.id: {name: ref.path.name for name, ref in case.files.items()}
        for case in recognise(tmp_path / "cases.csv").cases
    }


FIVE = {"t1n": "n", "t1c": "c", "t2w": "w", "t2f": "f", "seg": "s"}


@pytest.mark.parametrize(
    "text",
    [
        "case,,,t1n,t1c,t2w,t2f,seg\nA,x,y,n,c,w,f,s\n",
        "case,,,t1n,t1c,t2w,t2f,seg\nA,,,n,c,w,f,s\n",
        ",case,t1n,t1c, ,t2w,t2f,seg,\n0,A,n,c,x,w,f,s,y\n",  # the first is a table's own index
        "case,T1,t1ce,T2,FLAIR,dseg\nA,n,c,w,f,s\n",
    ],
)
def test_columns_without_a_name_move_no_other(text: str, tmp_path: Path) -> None:
    assert read(tmp_path, text) == {"A": FIVE}


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ("case,t1n,t1n,t1c", r"columns 2 \(t1n\) and 3 \(t1n\) both mean t1n"),
        ("case,t1,t2f,T1N", r"columns 2 \(t1\) and 4 \(t1n\) both mean t1n"),
        ("case,t1n,ADC,adc ", r"columns 3 \(adc\) and 4 \(adc\) both mean adc"),
        ("case,t1n,seg,dseg", r"columns 3 \(seg\) and 4 \(dseg\) both mean seg"),
        ("case,t1n,,Case", r"columns 1 \(case\) and 4 \(case\) both mean case"),
    ],
)
def test_two_columns_of_one_meaning_are_named(columns: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"cases\.csv: {told}; expected one column of each; leave one out"):
        read(tmp_path, f"{columns}\nA,a,b,c\n")


def test_other_tables_may_have_any_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("age,age\n61,61\n")
    (tmp_path / "b.csv").write_text("case,t1n\nA,n\n")
    assert [case.id for case in recognise(tmp_path).cases] == ["A"]


def test_rows_of_another_length(tmp_path: Path) -> None:
    assert read(tmp_path, "t1n,t2f,seg,case\n\nn,f,s,A,,\n") == {"A": {"t1n": "n", "t2f": "f", "seg": "s"}}
    assert read(tmp_path, "case,t1n,t2f,seg\nA,n\n") == {"A": {"t1n": "n"}}
    with pytest.raises(InputError, match=r"cases\.csv, line 4: found 4 cells, expected 3, .* in double quotes"):
        read(tmp_path, "case,t1n,t2f\nA,n,f\n\nB,Doe, Jane/n,f\n")
    assert read(tmp_path, 'case,t1n,t2f\nB,"Doe, Jane/n",f\n') == {"B": {"t1n": "n", "t2f": "f"}}
    with pytest.raises(InputError, match=r"line 2: the cell `case` is empty"):
        read(tmp_path, "t1n,t2f,case\nn,f\n")
