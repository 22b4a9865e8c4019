"""One YAML file, checked key by key; each error has the key in it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from medmap.config import AlignConfig, Config, load_config, parse_config
from medmap.errors import ConfigError


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_sound_and_none_of_the_published_faults() -> None:
    align = load_config(None).align
    assert (align.fill, align.weights, align.scale_at_test) == ("none", "softmax", False)
    assert align.alpha == 0.1
    assert load_config(None).sampling.per == "sample"
    assert load_config(None).model.stem_published is False


def test_a_file_and_overrides_in_this_order(tmp_path: Path) -> None:
    path = written(tmp_path, "name: a\ntrain: {steps: 5, lr: 1e-2}\nalign: {anchor: pk, fixed: t1ce}\n")
    config = load_config(path, ["train.steps=7", "align.levels=[stem, x1]", "align.alpha=1e-3"])
    assert (config.name, config.train.steps, config.train.lr) == ("a", 7, 0.01)
    assert (config.align.anchor, config.align.fixed, config.align.levels) == ("pk", "t1ce", ("stem", "x1"))
    assert config.align.alpha == 1e-3


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "")) == Config() == load_config(None)


@pytest.mark.parametrize(
    "overrides",
    [["model=unet"], ["model=unet", "model.size=tiny"], ["model.size=tiny", "model=unet"]],
)
def test_model_in_short(overrides: list[str]) -> None:
    model = load_config(None, overrides).model
    assert model.name == "unet"
    assert model.size == ("tiny" if len(overrides) > 1 else "base")


def test_align_in_short(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, "align: none")).align == AlignConfig(anchor="none")
    assert load_config(written(tmp_path, "align: uniform"), ["align.alpha=1"]).align.anchor == "uniform"
    assert load_config(None, ["align.alpha=1", "align=pn"]).align == AlignConfig(anchor="pn", alpha=1)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"trian": {}}, r"unknown key trian; did you mean train\? expected one of name, seed, data"),
        ({"train": {"step": 5}}, r"unknown key train\.step; did you mean train\.steps\?"),
        ({"align": {"aplha": 1}}, r"unknown key align\.aplha; did you mean align\.alpha\?"),
        ({"model": {"siez": "tiny"}}, r"unknown key model\.siez; did you mean model\.size\?"),
        ({"data": {"qqqq": 1}}, r"unknown key data\.qqqq; expected one of source, store, modalities"),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest(tree: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(tree)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"train": {"steps": 0}}, r"train\.steps: .*greater than or equal to 1 \(found 0\)"),
        ({"train": {"lr": "fast"}}, r"train\.lr: .*number.*\(found 'fast'\)"),
        ({"train": {"patch": [64, 64]}}, r"train\.patch\.2: "),
        ({"train": {"optimizer": "lion"}}, r"train\.optimizer: .*'adamw', 'adam' or 'sgd'.*\(found 'lion'\)"),
        ({"align": {"anchor": "pstar", "alpha": -1}}, r"align\.alpha: .*\(found -1\)"),
        ({"align": {"anchor": "p"}}, r"align\.anchor: .*'pstar'"),
        ({"align": {"anchor": "pk"}}, r"align: anchor pk needs `fixed: MODALITY`"),
        ({"align": {"fixed": "t1c"}}, r"align: anchor pk needs .*only pk takes it"),
        ({"align": {"anchor": "pn", "fill": "kept"}}, r"align: fill: kept needs an anchor made of the modalities"),
        ({"align": {"anchor": "none", "fill": "seen"}}, r"align: fill: seen needs an anchor"),
        ({"align": {"alpha": 1, "levels": ["x1"]}}, r"align: alpha, levels of no anchor: .* anchor: pstar"),
        ({"align": {"detach": True}}, r"align: detach is of anchors that latents are mixed into; found anchor: none"),
        ({"data": {"folds": 3, "fold": 3}}, r"data: fold 3 of 3 folds: expected 0 … 2"),
        ({"augment": {"scale": [1.4, 0.7]}}, r"augment: scale: .*1\.4, 0\.7\].*low ≤ high"),
        ({"model": {"stem": "shared"}}, r"model\.stem: .*'non_shared'"),
        ({"train": 3}, r"train: .*\(found 3\)"),
    ],
)
def test_a_wrong_value_is_told_with_its_key_and_what_was_found(tree: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(tree)


def test_every_fault_has_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, "train: {step: 5, lr: -1}\nmodle: unet\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: ") as caught:
        load_config(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    for key in ("train.step", "train.lr", "modle"):
        assert sum(key in line for line in lines) >= 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: [1, 2", r"run\.yaml: not valid YAML"),
        ("- a\n- b\n", r"run\.yaml: found a list; expected sections such as data:"),
        ("just words", r"run\.yaml: found a str; expected sections"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(written(tmp_path, text))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "weights.yaml"
    path.write_bytes(b"\xff\xfe\x80\x81")
    with pytest.raises(ConfigError, match=r"weights\.yaml: not valid YAML"):
        load_config(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read \(No such file"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", r"--set 'train\.steps': expected KEY=VALUE"),
        ("=5", r"--set '=5': expected KEY=VALUE"),
        ("train.patch=[1,", r"--set 'train\.patch=\[1,': the value is not valid YAML"),
        ("train.stesp=5", r"unknown key train\.stesp; did you mean train\.steps"),
        ("train.steps=", r"train\.steps: .*\(found None\)"),
        ("train.steps.deep=1", r"train\.steps: "),
    ],
)
def test_a_wrong_override(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, [override])


def test_frozen() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.train.lr = 1.0  # type: ignore[misc]


@given(
    steps=st.integers(1, 10**6),
    lr=st.floats(1e-8, 10),
    alpha=st.floats(0, 10),
    levels=st.lists(st.sampled_from(["stem", "x1", "x5"]), max_size=3),
    name=st.text("abc-äß 0123456789", min_size=1, max_size=12),
    modalities=st.none() | st.lists(st.sampled_from(["t1c", "adc"]), min_size=1, max_size=2),
)
def test_what_is_written_is_read_again(
    steps: int, lr: float, alpha: float, levels: list[str], name: str, modalities: list[str] | None
) -> None:
    config = parse_config(
        {
            "name": name,
            "train": {"steps": steps, "lr": lr},
            "align": {"anchor": "pstar", "alpha": alpha, "levels": levels},
            "data": {"modalities": modalities},
            "model": {"loss_weights": {"kd": 0.5}},
        }
    )
    assert parse_config(yaml.safe_load(config.to_yaml())) == config
