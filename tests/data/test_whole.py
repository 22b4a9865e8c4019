from __future__ import annotations

from pathlib import Path

import pytest

from medmap.data.whole import whole


def test_files_appear_together_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "b").write_text("earlier")
    with whole(tmp_path / "a", tmp_path / "b") as (a, b):
        a.write_text("1")
        b.write_text("2")
        assert (tmp_path / "b").read_text() == "earlier"
        assert (a.name, b.name) == ("a", "b")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "1", "b": "2"}


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
def test_an_error_or_an_interrupt_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "a").write_text("earlier")

    def half() -> None:
        with whole(tmp_path / "a", tmp_path / "b") as (a, _):
            a.write_text("half")
            raise error

    with pytest.raises(type(error)):
        half()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "earlier")]


def test_what_fails_on_the_way_to_its_place_keeps_those_after_it_away(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()

    def both() -> None:
        with whole(tmp_path / "a", tmp_path / "b") as fresh:
            for file in fresh:
                file.write_text("new")

    with pytest.raises(OSError, match="directory"):
        both()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
