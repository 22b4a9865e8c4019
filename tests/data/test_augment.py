"""Augmentation: twins against closed forms and other libraries, laws over what may be drawn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from medmap.config import AugmentConfig, parse_config
from medmap.data.augment import (
    Draw,
    Placement,
    apply_draw,
    augment,
    bias_field,
    blur,
    brightness,
    contrast,
    draw,
    gamma,
    gamma_inverted,
    largest_source_size,
    low_resolution,
    noise,
    place,
    source_size,
)
from medmap.errors import ConfigError, InputError

CHANCES = [name for name in AugmentConfig.model_fields if name.startswith("p_")]
NOTHING = AugmentConfig(**dict.fromkeys(CHANCES, 0.0))
EVERYTHING = AugmentConfig(**dict.fromkeys(CHANCES, 1.0))
BIAS = (0.3, *np.linspace(-1, 1, 19).tolist())
TWINS: dict[str, Callable[[Tensor], Tensor]] = {
    "bias_field": lambda x: bias_field(x, *BIAS),
    "noise": lambda x: noise(x, 0.1, 7),
    "blur": lambda x: blur(x, 0.5, 0.8, 1.0),
    "brightness": lambda x: brightness(x, 1.2),
    "contrast": lambda x: contrast(x, 0.8),
    "low_resolution": lambda x: low_resolution(x, 0.6),
    "gamma": lambda x: gamma(x, 1.4),
    "gamma_inverted": lambda x: gamma_inverted(x, 0.7),
}
angles = st.tuples(*[st.floats(-30, 30)] * 3)
scales = st.floats(0.7, 1.4)
flips = st.tuples(*[st.booleans()] * 3)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def radius(n: int) -> Tensor:
    """Distance in voxels from the centre of an n³ cube."""
    axis = torch.arange(n) - (n - 1) / 2
    return (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt()


def brain_image(n: int = 20, seed: int = 0) -> Tensor:
    """Noise over a gradient in a ball, 0 around it."""
    values = torch.randn(n, n, n, generator=seeded(seed)) + torch.linspace(-2, 2, n)
    return torch.where(radius(n) < 0.4 * n, values, 0.0)


def batch(n: int = 20, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two samples of three images; labels 1, 3 and 5 in nested balls; one image of the second sample is not seen."""
    images = torch.stack([torch.stack([brain_image(n, seed + 3 * b + m) for m in range(3)]) for b in range(2)])
    r = radius(n)
    target = (r < 0.3 * n).long() + 2 * (r < 0.2 * n) + 2 * (r < 0.1 * n)
    return images, torch.stack([target, target.roll(2, 0)]), torch.tensor([[True] * 3, [True, False, True]])


# --- nothing drawn, nothing changed ------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [AugmentConfig(enabled=False), NOTHING], ids=["disabled", "all probabilities 0"])
@pytest.mark.parametrize("size", [None, (20, 20, 20), (15, 12, 7)])
def test_without_a_draw_the_patch_is_the_centre_crop_bit_for_bit(config, size):
    images, target, _ = batch()
    new, labels = augment(images, target, torch.ones(2, 3, dtype=torch.bool), config, seeded(0), size)
    x, y, z = size or (20, 20, 20)
    cut = (..., slice((20 - x) // 2, (20 + x) // 2), slice((20 - y) // 2, (20 + y) // 2), slice((20 - z) // 2, None))
    assert torch.equal(new, images[cut][..., :z])
    assert torch.equal(labels, target[cut][..., :z])


def test_the_input_is_left_alone_and_the_result_is_no_view_of_it():
    images, target, seen = batch()
    before = images.clone(), target.clone()
    for config in (NOTHING, EVERYTHING):
        new, labels = augment(images, target, seen, config, seeded(0))
        new.fill_(9), labels.fill_(9)
    assert torch.equal(images, before[0])
    assert torch.equal(target, before[1])


# --- background, unseen images, foreign content --------------------------------------------------------------------


@pytest.mark.parametrize("name", TWINS)
def test_background_stays_exactly_zero(name):
    image = brain_image()
    changed = TWINS[name](image)
    assert changed[image == 0].abs().max() == 0
    assert not torch.signbit(changed[image == 0]).any()
    assert (changed != image).sum() > 0.9 * (image != 0).sum()


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("value", [0.0, 1.5])
def test_empty_and_constant_images_stay_finite(name, value):
    image = value * (brain_image() != 0)
    changed = TWINS[name](image)
    assert changed.isfinite().all()
    if value == 0 or name not in ("noise", "brightness", "bias_field"):
        torch.testing.assert_close(changed, image)


@given(seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_with_everything_on_corners_and_unseen_images_are_zero(seed):
    images, target, seen = batch()
    config = EVERYTHING.model_copy(update={"scale": (0.7, 1.0)})  # so that the ball stays a ball inside the patch
    new, labels = augment(images, target, seen, config, seeded(seed))
    assert new.isfinite().all()
    assert new[1, 1].abs().max() == 0
    assert new[..., radius(20) > 0.4 * 20 + 2].abs().max() == 0
    assert (new[seen] != 0).flatten(1).any(1).all()
    assert set(labels.unique().tolist()) <= {0, 1, 3, 5}


def test_unseen_voxels_and_other_samples_have_no_influence():
    images, target, seen = batch()
    new, labels = augment(images, target, seen, EVERYTHING, seeded(3))
    images[1, 1] = torch.nan  # not seen
    same, _ = augment(images, target, seen, EVERYTHING, seeded(3))
    assert torch.equal(new, same)
    images[0], target[0], seen[0, 0] = 7 * brain_image(seed=99), 1, False
    other, other_labels = augment(images, target, seen, EVERYTHING, seeded(3))
    assert torch.equal(new[1], other[1])
    assert torch.equal(labels[1], other_labels[1])
    assert not torch.equal(new[0], other[0])


# --- the stream of random numbers ----------------------------------------------------------------------------------


def test_same_seed_same_result_and_another_seed_another():
    first, second, third = (augment(*batch(), EVERYTHING, seeded(seed)) for seed in (5, 5, 6))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], third[0])


def test_the_numbers_taken_depend_on_nothing_but_the_shape():
    images, target, seen = batch()
    states = []
    for config in (EVERYTHING, NOTHING, AugmentConfig(), AugmentConfig(enabled=False)):
        for content in ((images, target, seen), (0 * images, 0 * target, torch.zeros_like(seen))):
            generator = seeded(1)
            augment(*content, config, generator)
            states.append(generator.get_state())
    assert all(torch.equal(states[0], state) for state in states)


def test_switching_one_change_off_leaves_the_others_as_drawn():
    everything, without = (draw(c, 4, 3, seeded(2)) for c in (EVERYTHING, EVERYTHING.model_copy(update={"p_blur": 0})))
    assert everything.placements == without.placements
    for full, less in zip(sum(everything.scans, ()), sum(without.scans, ()), strict=True):
        assert tuple(step for step in full if step[0] is not blur) == less


def test_draws_come_as_often_and_as_wide_as_configured():
    config, n = AugmentConfig(), 1500
    drawn = draw(config, n, 4, seeded(0))
    rates: dict[str, float] = {
        "p_rotation": sum(any(p.rotation_deg) for p in drawn.placements) / n,
        "p_scaling": sum(p.scale != 1 for p in drawn.placements) / n,
        "p_flip": sum(sum(p.flip) for p in drawn.placements) / (3 * n),
    }
    steps = [step for sample in drawn.scans for scan in sample for step in scan]
    for change in (bias_field, noise, blur, brightness, contrast, low_resolution, gamma, gamma_inverted):
        name = "p_bias" if change is bias_field else f"p_{change.__name__}"
        rates[name] = sum(step[0] is change for step in steps) / (4 * n)
    for name in CHANCES:
        p = getattr(config, name)
        assert abs(rates[name] - p) < 4 * (p * (1 - p) / n) ** 0.5, name
    exponents = torch.tensor([step[1][0] for step in steps if step[0] is gamma])
    assert (exponents < 1).float().mean().item() == pytest.approx(0.5, abs=0.06)
    assert exponents[exponents < 1].mean().item() == pytest.approx(0.85, abs=0.01)
    assert exponents[exponents > 1].mean().item() == pytest.approx(1.25, abs=0.03)
    assert 0.7 <= exponents.min() < 0.72
    assert 1.48 < exponents.max() <= 1.5
    turns = torch.tensor([p.rotation_deg for p in drawn.placements])
    assert 29 < turns.abs().max() <= 30  # degrees


@pytest.mark.parametrize("name", CHANCES)
def test_each_probability_governs_its_own_change(name):
    drawn = draw(NOTHING.model_copy(update={name: 1.0}), 5, 2, seeded(0))
    steps = {step[0] for sample in drawn.scans for scan in sample for step in scan}
    happened = {
        "p_rotation": all(any(p.rotation_deg) for p in drawn.placements),
        "p_scaling": all(p.scale != 1 for p in drawn.placements),
        "p_flip": all(all(p.flip) for p in drawn.placements),
        "p_bias": bias_field in steps,
        **{f"p_{f.__name__}": f in steps for f in (noise, blur, brightness, contrast, low_resolution)},
        **{f"p_{f.__name__}": f in steps for f in (gamma, gamma_inverted)},
    }
    assert [key for key, value in happened.items() if value] == [name]


def test_images_of_one_sample_are_placed_together_and_coloured_apart():
    image = brain_image()
    images, target = image.expand(1, 3, -1, -1, -1), torch.zeros(1, 20, 20, 20, dtype=torch.long)
    seen = torch.ones(1, 3, dtype=torch.bool)
    drawn = draw(EVERYTHING, 1, 3, seeded(0))
    placed, _ = apply_draw(images, target, seen, Draw(drawn.placements, (((),) * 3,)))
    assert torch.equal(placed[0, 0], placed[0, 1])
    coloured, _ = apply_draw(images, target, seen, drawn)
    assert not torch.equal(coloured[0, 0], coloured[0, 1])
    assert torch.equal(coloured[0, 0] != 0, coloured[0, 1] != 0)


# --- position --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("axis", "dims"), [(0, (1, 2)), (1, (2, 0)), (2, (0, 1))])
@pytest.mark.parametrize("quarter", [1, -1, 2])
@pytest.mark.parametrize("n", [9, 12])
def test_quarter_turns_are_rot90(axis, dims, quarter, n):
    images = torch.randn(2, n, n, n, generator=seeded(0))
    target = torch.randint(0, 4, (n, n, n), generator=seeded(1))
    turn = [0.0, 0.0, 0.0]
    turn[axis] = 90.0 * quarter
    new, labels = place(images, target, Placement(rotation_deg=tuple(turn)), (n, n, n))
    torch.testing.assert_close(new, torch.rot90(images, quarter, [d + 1 for d in dims]), atol=1e-4, rtol=0)
    assert torch.equal(labels, torch.rot90(target, quarter, dims))


def test_turns_about_several_axes_come_in_order():
    images, target = torch.randn(1, 9, 9, 9, generator=seeded(0)), torch.zeros(9, 9, 9, dtype=torch.long)
    new, _ = place(images, target, Placement(rotation_deg=(90, 90, 90), flip=(True, False, False)), (9, 9, 9))
    expected = images.rot90(1, (2, 3)).rot90(1, (3, 1)).rot90(1, (1, 2)).flip(1)
    torch.testing.assert_close(new, expected, atol=1e-4, rtol=0)


@given(flip=flips)
@settings(deadline=None)
def test_flips_are_exact(flip):
    images, target, _ = batch()
    axes = [axis for axis in range(3) if flip[axis]]
    new, labels = place(images[0], target[1], Placement(flip=flip), (20, 16, 20))
    assert torch.equal(new, images[0, :, :, 2:18].flip([a + 1 for a in axes]))
    assert torch.equal(labels, target[1][:, 2:18].flip(axes))


@pytest.mark.parametrize("scale", [0.7, 0.85, 1.2, 1.4])
def test_a_ball_grows_with_the_cube_of_the_scale(scale):
    n, r = 48, 14.0
    target = (radius(n) < r).long()
    image, labels = place(target[None].float(), target, Placement(scale=scale), (n, n, n))
    ball = 4 / 3 * np.pi * (scale * r) ** 3
    assert labels.sum().item() == pytest.approx(ball, rel=0.02)
    assert image.sum().item() == pytest.approx(ball, rel=0.02)


@given(turn=angles, scale=scales, flip=flips, seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_labels_move_with_images_and_no_label_is_invented(turn, scale, flip, seed):
    codes = torch.tensor([0, 0, 1, 4])
    target = codes[torch.randint(0, 4, (14, 14, 14), generator=seeded(seed))]
    shares = torch.stack([(target == 1).float(), (target == 4).float()])
    new, labels = place(shares, target, Placement(turn, scale, flip), (12, 12, 12))
    assert set(labels.unique().tolist()) <= {0, 1, 4}
    rest = 1 - new.sum(0)
    clear = (torch.stack([rest, *new]).sort(0).values.diff(dim=0)[-1]).abs() > 1e-4  # no tie
    assert torch.equal(labels[clear], torch.tensor([0, 1, 4])[torch.stack([rest, *new]).argmax(0)][clear])
    assert clear.float().mean() > 0.9


@pytest.mark.parametrize("turn", [(45.0, 0.0, 0.0), (0.0, 30.0, 0.0), (20.0, -30.0, 10.0)])
@pytest.mark.parametrize("spacing_mm", [(4.0, 4.0, 8.0), (1.0, 3.0, 2.0)])
def test_anatomy_is_turned_in_mm_and_not_in_voxels(turn, spacing_mm):
    """A ball is round however it is turned, and however flat the voxels are."""
    radius_mm = 12 * max(spacing_mm)
    shape = [int(2 * radius_mm / mm) + 5 for mm in spacing_mm]
    axes = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, spacing_mm, strict=True)]
    ball = sum(x**2 for x in np.meshgrid(*axes, indexing="ij")) <= radius_mm**2
    target = torch.from_numpy(ball.astype(np.int64))
    _, turned = place(target[None].float(), target, Placement(turn, spacing_mm=spacing_mm), tuple(shape))
    assert (turned != target).sum() < 0.05 * target.sum()  # of its surface, half a voxel
    _, distorted = place(target[None].float(), target, Placement(turn), tuple(shape))
    assert (distorted != target).sum() > 0.3 * target.sum()


def test_cubes_are_turned_as_they_are_whatever_their_size():
    turn = (20.0, -30.0, 10.0)
    for edge in (0.7, 1.2, 3.0):
        cubes = Placement(turn, 1.3, spacing_mm=(edge, edge * 1.0000001, edge))
        assert torch.equal(cubes.to_source(), Placement(turn, 1.3).to_source())


def test_outside_the_crop_lies_background():
    images, target = torch.ones(1, 16, 16, 16), torch.ones(16, 16, 16, dtype=torch.long)
    new, labels = place(images, target, Placement(scale=0.5), (16, 16, 16))
    inside = torch.zeros(16, 16, 16, dtype=torch.bool)
    inside[4:12, 4:12, 4:12] = True
    assert torch.equal(labels, inside.long())
    assert new[0][inside].min() > 0
    assert new[0][~inside & (radius(16) > 8)].abs().max() == 0


@given(
    turn=angles,
    scale=scales,
    size=st.tuples(*[st.integers(1, 14)] * 3),
    spacing_mm=st.sampled_from([(1.0, 1.0, 1.0), (1.0, 1.0, 2.5), (0.8, 2.0, 1.0)]),
)
@settings(max_examples=25, deadline=None)
def test_a_crop_of_source_size_leaves_no_empty_corner(turn, scale, size, spacing_mm):
    placement = Placement(turn, scale, spacing_mm=spacing_mm)
    source = source_size(size, [placement])
    assert all((full - x) % 2 == 0 and full >= x for full, x in zip(source, size, strict=True))
    image, labels = place(torch.ones(1, *source), torch.ones(source, dtype=torch.long), placement, size)
    assert image.min() > 1 - 1e-4
    assert labels.min() == 1


@given(seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_the_largest_source_holds_whatever_is_drawn(seed):
    size = (64, 48, 32)
    largest = largest_source_size(size, AugmentConfig())
    needed = source_size(size, draw(EVERYTHING, 50, 1, seeded(seed)).placements)
    assert all(a <= b for a, b in zip(needed, largest, strict=True))
    assert largest_source_size(size, NOTHING) == size


def test_a_patch_larger_than_its_crop_is_named():
    with pytest.raises(InputError, match=r"patch of \[20, 21, 20\] voxels.*crop of \[20, 20, 20\].*train.patch"):
        augment(*batch(), NOTHING, seeded(0), size=(20, 21, 20))


# --- intensity -------------------------------------------------------------------------------------------------------


def line(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None]


def test_brightness_and_contrast_by_hand():
    image = line(1, 2, 0, 3, 6)  # brain mean 3
    assert brightness(image, 1.5).flatten().tolist() == [1.5, 3, 0, 4.5, 9]
    assert contrast(image, 0.5).flatten().tolist() == [2, 2.5, 0, 3, 4.5]
    assert contrast(image, 2.0).flatten().tolist() == [1, 1, 0, 3, 6]  # −1 and 9 are clipped to the range


@pytest.mark.parametrize("exponent", [0.7, 1.0, 1.5])
def test_gamma_against_the_formula(exponent):
    image = brain_image()
    x = image[image != 0].double().numpy()
    curve = ((x - x.min()) / (x.max() - x.min())) ** exponent
    expected = (curve - curve.mean()) / curve.std() * x.std() + x.mean()
    np.testing.assert_allclose(gamma(image, exponent)[image != 0].numpy(), expected, atol=1e-4)
    curve = 1 - ((x.max() - x) / (x.max() - x.min())) ** exponent
    expected = (curve - curve.mean()) / curve.std() * x.std() + x.mean()
    np.testing.assert_allclose(gamma_inverted(image, exponent)[image != 0].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["gamma", "gamma_inverted", "bias_field"])
def test_mean_and_deviation_of_the_brain_are_kept(name):
    image = 3 * brain_image() + 2 * (brain_image() != 0)
    before, after = image[image != 0], TWINS[name](image)[image != 0]
    assert after.mean().item() == pytest.approx(before.mean().item(), abs=1e-3)
    assert after.std().item() == pytest.approx(before.std().item(), rel=1e-3)


def test_contrast_keeps_the_range_and_nearly_the_mean():
    image = brain_image()
    brain = image[image != 0]
    for factor in (0.75, 1.25):
        changed = contrast(image, factor)[image != 0]
        assert brain.min() <= changed.min() <= changed.max() <= brain.max()
        assert changed.mean().item() == pytest.approx(brain.mean().item(), abs=0.02)
    assert changed.std() > brain.std()


def test_noise_has_the_sd_it_was_given_and_its_own_seed():
    image = torch.ones(40, 40, 40)
    added = noise(image, 0.1, 1) - 1
    assert added.std().item() == pytest.approx(0.1, rel=0.02)
    assert added.mean().item() == pytest.approx(0, abs=2e-3)
    assert torch.equal(noise(image, 0.1, 1), noise(image, 0.1, 1))
    assert not torch.equal(noise(image, 0.1, 1), noise(image, 0.1, 2))


def test_blur_against_scipy():
    image = brain_image()
    sigma = (0.5, 0.75, 1.0)
    smooth, share = (
        ndimage.gaussian_filter(v, sigma, mode="constant", truncate=4.0)
        for v in (image.double().numpy(), (image != 0).double().numpy())
    )
    brain = (image != 0).numpy()
    np.testing.assert_allclose(blur(image, *sigma).numpy()[brain], (smooth / share.clip(1e-9))[brain], atol=2e-3)


def test_low_resolution_by_hand():
    # 4 voxels → voxels 1 and 3 → linear between their centres
    assert low_resolution(line(1, 2, 3, 4), 0.5).flatten().tolist() == [2, 2.5, 3.5, 4]
    image = brain_image()
    torch.testing.assert_close(low_resolution(image, 1.0), image)


def test_bias_field_is_smooth_and_as_strong_as_asked():
    image = torch.ones(11, 5, 5)
    image[5, 2, 2] = -1.0  # stands for signal 0
    along_x = [0.0] * 19
    along_x[9] = 1.0  # the 19 exponents in order: (1, 0, 0) follows the nine with i = 0
    changed = bias_field(image, 0.3, *along_x)
    profile = changed[:, 0, 0] - changed[5, 2, 2]
    expected = 0.3 * torch.linspace(-1, 1, 11)
    torch.testing.assert_close((profile / profile[5]).log(), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(changed[:, 0, 0], changed[:, 4, 1])
    torch.testing.assert_close(bias_field(image, 0.0, *along_x), image)


# --- configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("p_blur", 1.2, "p_blur"),
        ("p_flip", -0.1, "p_flip"),
        ("gamma", [1.5, 0.7], r"gamma: found \[1.5, 0.7\]; expected \[low, high\]"),
        ("brightness", [0.0, 1.0], "brightness"),
        ("noise_sd", [0.0, float("inf")], "noise_sd"),
        ("low_resolution", [0.5, 1.5], "low_resolution"),
        ("rotation_deg", [-30, 200], "rotation_deg"),
        ("flip_axes", [3], "flip_axes"),
        ("p_blurr", 0.1, "p_blur"),
    ],
)
def test_wrong_settings_are_named(key, value, message):
    with pytest.raises(ConfigError, match=message):
        parse_config({"augment": {key: value}})


def test_flip_axes_limits_the_flips():
    config = EVERYTHING.model_copy(update={"flip_axes": (0,)})
    assert all(p.flip == (True, False, False) for p in draw(config, 5, 1, seeded(0)).placements)
