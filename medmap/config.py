"""One YAML file describes one run: frozen models, every key checked, the nearest match named when a key is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from medmap.errors import ConfigError

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class DataConfig(_Section):
    """Which patients, and how they are divided.

    source:       store: prepared patients; phantom: simulated ones (section ``phantom``)
    store:        folder that ``medmap prepare`` wrote
    modalities:   sequences to train on; all of the store's where null
    split:        ``kfold``, the name of a published list (brats2018-list1, brats2020, brats2021, …), or a JSON file of
                  one's own with lists of case ids: train, val, test
    folds, fold:  k, and which of the k folds is the test fold of this run
    split_seed:   seed of the k-fold draw
    val_fraction: share of the training patients kept for validation (k-fold only; published lists bring their own)
    """

    source: Literal["store", "phantom"] = "store"
    store: str = ""
    modalities: tuple[str, ...] | None = None
    split: str = "kfold"
    folds: Annotated[int, Field(ge=2)] = 3
    fold: Annotated[int, Field(ge=0)] = 0
    split_seed: int = 0
    val_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2

    @model_validator(mode="after")
    def _fold_exists(self) -> DataConfig:
        if self.split == "kfold" and self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} of {self.folds} folds: expected 0 … {self.folds - 1}")
        return self


class PhantomConfig(_Section):
    """How phantoms are made that training draws as it goes (``data.source: phantom``).

    organ, spacing_mm, noise, noise_correlation, bias_correlation, operated, grown: as `medmap simulate` takes them
    randomised: weight of the randomised mode: share of scans with random contrast; gamma: how far these are bent
    val:        patients kept for validation
    patients:   how many to train on; they stay in memory (3 MB each at 2 mm). A new one for every patch where null
    workers:    processes that simulate ahead; one fewer than there are cores where null; 0: none but the training's
    """

    organ: str = "brain"
    spacing_mm: Positive = 2.0
    noise: Annotated[float, Field(ge=0)] = 0.015
    noise_correlation: Fraction = 0.0
    bias_correlation: Fraction = 0.0
    randomised: Fraction = 0.3
    gamma: Annotated[float, Field(ge=0, le=2)] = 0.3
    operated: Fraction = 0.0
    grown: Fraction = 1.0
    val: Count = 8
    patients: Count | None = None
    workers: Annotated[int, Field(ge=0)] | None = None


class ModelConfig(_Section):
    """Which network.

    name:         backbone, a key of ``medmap.models.BACKBONES``
    size:         the backbone's named size; where none is named base for a U-Net, the published one for any other
    students:     of pmkl: the subsets, as t1c+t2f, that each have a student; each one sequence where none is named
    stem:         encoder T in front of the backbone: none, joint, non_shared, enhanced; leaking: joint, and in training
                  it sees what is dropped, as in the published first form. Never for use
    stem_published: the stem's blocks end in BatchNorm and ReLU, as in the published fragment
    loss_weights: weights of the backbone's own loss terms by name (1 where not named, 0 switches off)
    """

    name: str = "unet"
    size: str = "base"
    students: tuple[str, ...] = ()
    stem: Literal["none", "joint", "non_shared", "enhanced", "leaking"] = "none"
    stem_published: bool = False
    loss_weights: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _usual_size(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("name", "unet") != "unet" and values.get("size") is None:
            return {**values, "size": "faithful"}
        return values


FILLING = ("pstar", "pk", "uniform", "precision", "gated")
"""Anchors that can stand in for an absent latent. Moments have no voxels, and LCKD's teacher is another one later."""


class AlignConfig(_Section):
    """MedMAP: which latents are pulled to which anchor, and how hard.

    anchor:        none, which no other was seen to beat (docs/results.md); pstar (learned mixture P*); pk (fixed
                   modality P^k); pn (standard normal P^N); uniform; precision (Gaussian latents weighted by their
                   precision); moments (of channels, not voxels); ema (moments remembered over the training); gated
                   (a mixture by the case); lckd (L1 to the modality that is best on validation)
    fixed:         the modality k of ``pk``
    levels:        names of the latents that are aligned, as the backbone offers them (and ``stem``); the deepest where
                   none is named
    alpha:         weight α of the alignment loss
    fill:          absent latents are replaced by the anchor: none; kept (over what this pass may look at);
                   seen (the published form: at training also over what was dropped, a leak)
    weights:       softmax, or ratio: the published w / Σw from N(0, 0.1²)
    detach:        latents feel no pull from the anchor that is made of them (the published first form); its weights do
    scale_at_test: the published form: at test, features are also multiplied by their weight
    """

    anchor: Literal["none", "pstar", "pk", "pn", "uniform", "precision", "moments", "ema", "gated", "lckd"] = "none"
    fixed: str | None = None
    levels: tuple[str, ...] = ()
    alpha: Annotated[float, Field(ge=0)] = 0.1
    fill: Literal["none", "kept", "seen"] = "none"
    weights: Literal["softmax", "ratio"] = "softmax"
    detach: bool = False
    scale_at_test: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> AlignConfig:
        if (self.anchor == "pk") != (self.fixed is not None):
            raise ValueError("anchor pk needs `fixed: MODALITY`, and only pk takes it")
        if self.fill != "none" and self.anchor not in FILLING:
            raise ValueError(
                f"fill: {self.fill} needs an anchor made of the modalities with a value for every element; found "
                f"anchor: {self.anchor}, take {', '.join(FILLING)}"
            )
        if self.detach and self.anchor not in ("pstar", "uniform", "precision", "gated"):
            raise ValueError(f"detach is of anchors that latents are mixed into; found anchor: {self.anchor}")
        if self.scale_at_test and self.anchor in ("precision", "moments", "ema", "gated", "lckd"):
            raise ValueError(f"scale_at_test is of the published anchors; {self.anchor} has no weights to scale by")
        if self.model_fields_set and "anchor" not in self.model_fields_set:
            found = ", ".join(sorted(self.model_fields_set))
            raise ValueError(f"{found} of no anchor: nothing would be aligned; name one, such as anchor: pstar")
        return self


SUBSETS = ("uniform", "counts", "bernoulli", "full")
"""Ways to draw what a training pass may look at."""


def _drawn_or_named(value: str) -> str:
    near = get_close_matches(value, SUBSETS, n=1)
    if value not in SUBSETS and (near or not re.fullmatch(r"\w+([+,]\w+)*", value)):
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"{hint}expected {', '.join(SUBSETS)}, or a subset such as t1c+t2f")
    return value


class SamplingConfig(_Section):
    """Which sequences a training pass may look at.

    subsets:          uniform over the non-empty subsets of what is seen; counts: first how many, then which;
                      bernoulli: each kept with ``keep_probability``, at least one; full: everything seen; or one
                      subset for all, as t1c+t2f: a model for a clinic that has these
    keep_probability: of ``bernoulli``
    per:              sample: one mask each; batch: the published form, sample 0's mask for all
    """

    subsets: Annotated[str, AfterValidator(_drawn_or_named)] = "uniform"
    keep_probability: Annotated[float, Field(gt=0, le=1)] = 0.5
    per: Literal["sample", "batch"] = "sample"


class AugmentConfig(_Section):
    """How training patches are changed; the defaults are nnU-Net v2's, and the bias field is ours.

    Probabilities are per sample for the spatial changes (one head: all sequences move together) and per image for the
    others (one scan each). Where nnU-Net draws a change per sample and then per channel (blur 0.2 × 0.5, low
    resolution 0.25 × 0.5) the product stands here. Ranges are uniform; where a range of factors holds 1, the sides
    below and above 1 are equally likely. ``p_… : 0`` switches a change off, ``enabled: false`` all of them.

    p_rotation, rotation_deg:       about each of the three axes, drawn independently, in degrees
    p_scaling, scale:               one factor for all axes; above 1 the anatomy grows
    p_flip, flip_axes:              each named axis (0 = left-right, 1 = front-back, 2 = bottom-top) on its own
    p_bias, bias_log_amplitude:     receive-coil field, at most exp(± this) within the patch
    p_noise, noise_sd:              Gaussian, in units of the z-scored image
    p_blur, blur_sigma_voxels:      Gaussian, each axis its own width
    p_brightness, brightness:       factor on the z-scored image
    p_contrast, contrast:           factor about the brain's mean, clipped to the brain's range
    p_low_resolution, low_resolution: grid coarsened to this fraction of the voxels per axis and brought back
    p_gamma, p_gamma_inverted, gamma: exponent on the image, and on its negative; mean and deviation are kept
    """

    enabled: bool = True
    p_rotation: Fraction = 0.2
    rotation_deg: tuple[float, float] = (-30.0, 30.0)
    p_scaling: Fraction = 0.2
    scale: tuple[Positive, Positive] = (0.7, 1.4)
    p_flip: Fraction = 0.5
    flip_axes: tuple[Annotated[int, Field(ge=0, le=2)], ...] = (0, 1, 2)
    p_bias: Fraction = 0.15
    bias_log_amplitude: tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(le=2)]] = (0.0, 0.3)
    p_noise: Fraction = 0.1
    noise_sd: tuple[Annotated[float, Field(ge=0)], float] = (0.0, 0.1)
    p_blur: Fraction = 0.1
    blur_sigma_voxels: tuple[Positive, Positive] = (0.5, 1.0)
    p_brightness: Fraction = 0.15
    brightness: tuple[Positive, Positive] = (0.75, 1.25)
    p_contrast: Fraction = 0.15
    contrast: tuple[Positive, Positive] = (0.75, 1.25)
    p_low_resolution: Fraction = 0.125
    low_resolution: tuple[Positive, Annotated[float, Field(le=1)]] = (0.5, 1.0)
    p_gamma: Fraction = 0.3
    p_gamma_inverted: Fraction = 0.1
    gamma: tuple[Positive, Positive] = (0.7, 1.5)

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> AugmentConfig:
        for name, value in self:
            if isinstance(value, tuple) and name != "flip_axes" and not -inf < value[0] <= value[1] < inf:
                raise ValueError(f"{name}: found {list(value)}; expected [low, high], low ≤ high, both finite")
        if not -180 <= self.rotation_deg[0] <= self.rotation_deg[1] <= 180:
            raise ValueError(f"rotation_deg: found {list(self.rotation_deg)}; expected degrees within -180 … 180")
        return self


class TrainConfig(_Section):
    """The recipe.

    steps, batch_size, patch: optimiser steps; samples a step; crop in voxels
    foreground:  share of crops that are centred on a tumour voxel
    optimizer:   adamw; adam, whose weight decay is part of the gradient; or sgd with Nesterov momentum
    amsgrad:     Adam's steps never grow because a gradient was large long ago
    schedule:    of the learning rate after ``warmup_steps``: poly (power 0.9), cosine, constant
    ema:         decay of the moving average of weights that is validated and shipped; 0 switches it off
    precision:   auto takes bf16 autocast where the machine computes faster in it, else fp32
    validate_every, checkpoint_every, log_every: in steps
    """

    steps: Count = 2000
    batch_size: Count = 2
    patch: tuple[Count, Count, Count] = (64, 64, 64)
    foreground: Fraction = 0.5
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    amsgrad: bool = False
    lr: Positive = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.99
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    clip_norm: Positive = 12.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.99
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    validate_every: Count = 250
    checkpoint_every: Count = 250
    log_every: Count = 10


class PredictConfig(_Section):
    """How masks are made.

    mirror:  axes (0 = left-right, 1 = front-back, 2 = bottom-top) whose flips are averaged at test time
    memory_gb: what one pass over a patient may take, by estimate; beyond it, windows of ``train.patch`` voxels
    et_min_ml: enhancing tumour below this volume is reported as none in the post-processed masks
    """

    mirror: tuple[Annotated[int, Field(ge=0, le=2)], ...] = ()
    memory_gb: Positive = 4.0
    et_min_ml: Annotated[float, Field(ge=0)] = 0.5


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _anchored(value: Any) -> Any:
    return {"anchor": value} if isinstance(value, str) else value


class Config(_Section):
    """One run. ``model: unet`` is short for ``model: {name: unet}``, ``align: none`` for ``align: {anchor: none}``."""

    name: str = "run"
    seed: Annotated[int, Field(ge=0)] = 0
    data: DataConfig = DataConfig()
    phantom: PhantomConfig = PhantomConfig()
    model: Annotated[ModelConfig, BeforeValidator(_named)] = ModelConfig()
    align: Annotated[AlignConfig, BeforeValidator(_anchored)] = AlignConfig()
    sampling: SamplingConfig = SamplingConfig()
    augment: AugmentConfig = AugmentConfig()
    train: TrainConfig = TrainConfig()
    predict: PredictConfig = PredictConfig()

    def to_yaml(self) -> str:
        """Every key, resolved."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: Path | None, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file (all defaults where None) and apply ``section.key=value`` overrides.

    Raises ConfigError for a file that cannot be read or is not YAML, and for every wrong key or value, with the
    nearest key that exists.

    >>> load_config(None, ["train.steps=10", "model=unet", "align=pstar"]).train.steps
    10
    """
    tree: dict[str, Any] = {}
    where = "defaults"
    if path is not None:
        where = str(path)
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected a YAML file") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not valid YAML: {error}") from error
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: found a {type(tree).__name__}; expected sections such as data:, model:, train:")
    for override in overrides:
        _apply(tree, override)
    return parse_config(tree, where)


def parse_config(tree: dict[str, Any], where: str = "configuration") -> Config:
    """Check a tree of plain values. Raises ConfigError, one line a fault."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(tree, dict(fault)) for fault in error.errors()]
        raise ConfigError(f"{where}: " + "\n".join(lines)) from error


def _apply(tree: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key.strip():
        raise ConfigError(f"--set {override!r}: expected KEY=VALUE, such as train.steps=500")
    *parents, last = key.strip().split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if isinstance(child, str):
            # `model: unet` in the file and model.size on the command line
            child = _anchored(child) if parent == "align" else _named(child)
        if not isinstance(child, dict):
            child = {}
        node[parent] = child
        node = child
    try:
        value = yaml.safe_load(text) if text else None
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {error}") from error
    if isinstance(value, str):
        with suppress(ValueError):  # YAML 1.1 reads 1e-3 as a string
            value = float(value)
    if isinstance(value, str) and isinstance(node.get(last), dict):
        value = {**node[last], **(_anchored(value) if last == "align" else _named(value))}
    node[last] = value


def _explain(tree: dict[str, Any], fault: dict[str, Any]) -> str:
    location = [part for part in fault["loc"] if isinstance(part, str) and not part.startswith("function-")]
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        section: Any = Config
        for part in location[:-1]:
            annotation = section.model_fields[part].annotation
            section = annotation
        fields = list(section.model_fields)
        near = get_close_matches(location[-1], fields, n=1, cutoff=0.4)
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])}? " if near else ""
        return f"unknown key {key}; {hint}expected one of {', '.join(fields)}"
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"{key or 'configuration'}: {message} (found {fault['input']!r})"
