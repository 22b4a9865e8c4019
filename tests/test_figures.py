from __future__ import annotations

import doctest
import io
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_run import GLIOMA, REGIONS, examples, latents, log_records, made_up_summary
from matplotlib.figure import Figure

from medmap import figures
from medmap.figures import style, subsets
from medmap.figures.examples import example_overlays
from medmap.figures.latents import _principal
from medmap.figures.style import REGION_HUES
from medmap.figures.subsets import columns

CASES = ("a", "b", "c", "d")
NAMES = ("adc", "t1c", "pet", "t2f")


def svg(figure: Figure | None) -> str:
    """Drawn in full: layout warnings are errors here."""
    assert figure is not None
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg")
    return buffer.getvalue()


def words(figure: Figure) -> list[str]:
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(mpl.text.Text) if text.get_text()]


def two_sequences() -> dict[str, Any]:
    """Dice of {a}, {b}, {a, b}: 0.2, 0.5, 0.6, so a is worth 0.1 and b 0.4."""
    means = {"a": 0.2, "b": 0.5, "a+b": 0.6}
    rows = [{"subset": s, "region": "WT", "metric": "dice", "mean": m, "low": m, "high": m} for s, m in means.items()]
    return {"modalities": ["a", "b"], "regions": ["WT"], "rows": rows, "groups": []}


def mapped(found: dict[str, Any]) -> dict[str, Any]:
    """Made-up latents as `latent_numbers` would put them on a plane; scikit-learn is not needed to draw them."""
    said = {"share": 0.5, "accuracy": 0.5, "chance": 0.25}
    one = dict.fromkeys(("gap", "probe", "retrieval"), said)
    times = {
        when: one
        | {"map": {"pca": found[when][:, :2], "share": [0.5, 0.2], "tsne": found[when][:, 2:4], "perplexity": 5.0}}
        for when in ("before", "after")
    }
    return {"rows": {"modality": list(found["modality"]), "case": list(found["case"])}, "levels": {"x5": times}}


DRAWN = {
    "subset_heatmap": lambda m, r: figures.subset_heatmap(made_up_summary(m, r)),
    "present": lambda m, r: figures.subset_heatmap(made_up_summary(m, r), rows="present"),
    "distances": lambda m, r: figures.subset_heatmap(made_up_summary(m, r), metric="hd95_mm"),
    "cost_of_losing": lambda m, r: figures.cost_of_losing(made_up_summary(m, r)),
    "learning_curves": lambda m, r: figures.learning_curves({"run": log_records(m, 500)}),
    "alignment_effect": lambda m, r: figures.alignment_effect({"run": log_records(m, 500)}),
    "anchor_weights": lambda m, r: figures.anchor_weights({"run": log_records(m, 500)}),
    "latent_pca": lambda m, r: figures.latent_pca(latents(m, CASES)),
    "latent_map": lambda m, r: figures.latent_map(mapped(latents(m, CASES))),
}


@pytest.mark.parametrize("regions", [("liver",), REGIONS], ids=["1 region", "3 regions"])
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_draws_for_any_names_and_labels_its_axes(name: str, count: int, regions: tuple[str, ...]) -> None:
    figure = DRAWN[name](NAMES[:count], regions)
    assert "adc" in svg(figure) or name in ("learning_curves", "alignment_effect")
    for ax in figure.axes:
        assert ax.get_ylabel() or ax.get_xlabel()
        if ax.get_title(loc="left"):  # a chart proper: both axes speak
            assert ax.get_xlabel()
            assert ax.get_ylabel()


@pytest.mark.parametrize("count", [2, 3, 4])
def test_examples_draw_for_any_number_of_sequences(count: int) -> None:
    drawn = svg(figures.example_overlays(examples(GLIOMA[:count], count=2)))
    assert "All sequences" in drawn
    assert "T1n only" in drawn


def test_every_figure_of_the_table_is_tried_here() -> None:
    assert set(figures.FIGURES) - set(DRAWN) == {"example_overlays", "explanation", "reliability_diagram"}


@pytest.mark.parametrize("module", [style, subsets])
def test_examples_in_docstrings_run(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


# ------------------------------------------------------------------------------------------------ subset × region


def test_rows_stand_in_the_order_of_the_fields_table() -> None:
    rows = ["+".join(sorted(subset)) for subset in figures.order_subsets(GLIOMA)]
    assert rows[:4] == ["t2w", "t1c", "t1n", "t2f"]
    assert rows[4:10] == ["t1c+t2w", "t1c+t1n", "t1n+t2f", "t1n+t2w", "t2f+t2w", "t1c+t2f"]
    assert rows[10:] == ["t1c+t1n+t2f", "t1n+t2f+t2w", "t1c+t2f+t2w", "t1c+t1n+t2w", "t1c+t1n+t2f+t2w"]


@given(st.integers(1, 8))
def test_every_subset_has_one_row(count: int) -> None:
    rows = figures.order_subsets([f"m{j}" for j in range(count)])
    assert len(set(rows)) == len(rows) == 2**count - 1


def test_heat_map_shows_mean_and_interval_of_every_cell_and_group() -> None:
    summary = made_up_summary()
    shown = words(figures.subset_heatmap(summary))
    for row in [*summary["rows"], *summary["groups"]]:
        if row["metric"] == "dice":
            assert f"{row['mean']:.2f}" in shown
            assert f"{row['low']:.2f}–{row['high']:.2f}" in shown
    assert {"all subsets", "with T1c", "without T1c", "T1n", "FLAIR", "mean Dice"} <= set(shown)


def test_an_undefined_cell_is_a_dash() -> None:
    summary = two_sequences()
    summary["rows"][0] |= {"mean": None, "low": None, "high": None}
    assert "–" in words(figures.subset_heatmap(summary))


def test_post_processed_region_stands_beside_the_raw_one() -> None:
    summary = made_up_summary()
    summary["rows"] += [{**row, "region": "ET-pp"} for row in summary["rows"] if row["region"] == "ET"]
    assert columns(summary) == ["WT", "TC", "ET", "ET-pp"]


def test_many_sequences_are_drawn_without_numbers() -> None:
    numbers = [
        text for text in words(figures.subset_heatmap(made_up_summary("abcdef"))) if "0." in text and "–" in text
    ]
    assert len(numbers) == 3  # the mean over all subsets, per region


@given(st.floats(0, 1))
def test_ink_is_legible_on_every_colour(mean: float) -> None:
    fill = subsets._luminance(subsets._scale("dice", [mean]).to_rgba(mean))
    ink = 1.0 if fill < 0.2 else subsets._luminance(mpl.colors.to_rgb(style.INK))
    assert (max(fill, ink) + 0.05) / (min(fill, ink) + 0.05) > 4  # WCAG asks 3 of large text


def test_cost_of_losing_by_hand() -> None:
    summary = two_sequences()
    assert figures.mean_loss(summary, "a", "WT") == pytest.approx(0.1)
    assert figures.mean_loss(summary, "b", "WT") == pytest.approx(0.4)
    bars = [patch.get_height() for patch in figures.cost_of_losing(summary).axes[0].patches]
    assert bars == pytest.approx([0.4, 0.1])  # the dearest first


# ------------------------------------------------------------------------------------------------ training


def test_learning_curves_mark_the_best_validation_of_every_fold() -> None:
    logs = {
        "fold0": [{"kind": "val", "step": s, "mean": m, "full": 0.9} for s, m in ((10, 0.3), (20, 0.7), (30, 0.5))],
        "fold1": [{"kind": "val", "step": 10, "mean": None}],
        "fold2": [{"kind": "val", "step": s, "mean": m, "best": b} for s, m, b in ((10, 0.4, True), (20, 0.6, False))],
    }
    right = figures.learning_curves(logs).axes[1]
    stars = [line.get_xydata().tolist() for line in right.lines if line.get_marker() == "*"]
    assert stars == [[[20.0, 0.7]], [[10.0, 0.4]]]


def validations(**latents: Sequence[float | None]) -> list[dict[str, Any]]:
    """Validations 10 steps apart of one level, x4."""
    columns = [dict(zip(latents, values, strict=True)) for values in zip(*latents.values(), strict=True)]
    return [{"kind": "val", "step": 10 * i, "latents": {"x4": row}} for i, row in enumerate(columns, start=1)]


def test_alignment_effect_draws_every_fold_and_level_and_where_it_was_warned() -> None:
    one = validations(gap=(0.9, 0.5), chance=(0.2, 0.2), std=(0.4, 0.1), std_min=(0.3, 0.05), rank=(20.0, 5.0))
    two = validations(std=(0.4, 0.3), std_min=(0.2, 0.2), rank=(9.0, 8.0))  # one patient: nothing to say of the gap
    for row, full, missing in zip(one, (0.5, 0.7), (0.4, 0.3), strict=True):
        row |= {"full": full, "missing": missing}
    logs = {
        "fold0": [
            {"kind": "train", "step": 1, "latents": {"x4": {"std": 0.5, "rank": 40.0}}},
            *one,
            {"kind": "warning", "step": 20},
        ],
        "fold1": two,
    }
    figure = figures.alignment_effect(logs)
    assert figure is not None
    drawn = [[line.get_xydata().tolist() for line in ax.lines] for ax in figure.axes]
    gap, std, rank, dice = drawn
    assert [[10.0, 0.9], [20.0, 0.5]] in gap
    assert [[10.0, 0.2], [20.0, 0.2]] in gap
    for curve in ([[1.0, 0.5]], [[10.0, 0.4], [20.0, 0.1]], [[10.0, 0.3], [20.0, 0.05]], [[10.0, 0.2], [20.0, 0.2]]):
        assert curve in std
    assert [[1.0, 40.0]] in rank
    assert [[10.0, 20.0], [20.0, 5.0]] in rank
    assert [[10.0, 9.0], [20.0, 8.0]] in rank
    assert [[10.0, 0.5], [20.0, 0.7]] in dice
    assert [[10.0, 0.4], [20.0, 0.3]] in dice
    assert all([[20.0, 0.0], [20.0, 1.0]] in lines for lines in drawn)
    assert {"level x4", "over-alignment was named", "some missing (mean)"} <= set(words(figure) + legend(figure))


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_alignment_effect_without_complete_patients_says_so_and_without_latents_is_none() -> None:
    bare = figures.alignment_effect({"run": validations(std=(0.4, 0.3), std_min=(0.2, 0.2), rank=(9.0, 8.0))})
    assert bare is not None
    assert "no validation patient\nhas every sequence" in words(bare)
    assert not {"over-alignment was named"} & set(legend(bare))
    assert figures.alignment_effect({"run": [{"kind": "val", "step": 10, "mean": 0.3}]}) is None


def test_anchor_weights_show_the_uniform_line_and_stay_within_view() -> None:
    records = [{"kind": "train", "step": s, "weights": {"x5": {"a": w, "b": 1 - w}}} for s, w in ((0, 0.5), (9, 0.95))]
    ax = figures.anchor_weights({"run": records}).axes[0]
    assert any(list(line.get_ydata()) == [0.5, 0.5] and not line.get_marker().strip("None") for line in ax.lines)
    low, high = ax.get_ylim()
    assert low < 0.05 < 0.95 < high


def test_no_anchor_weights_no_figure() -> None:
    assert figures.anchor_weights({"run": [{"kind": "train", "step": 1, "loss": 1.0}]}) is None


# ------------------------------------------------------------------------------------------------ latents


def test_two_components_keep_the_distances_of_planar_latents() -> None:
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(10, 2))
    points, share = _principal(plane @ np.linalg.qr(rng.normal(size=(5, 5)))[0][:2])
    assert share.sum() == pytest.approx(1)
    assert np.linalg.norm(points[0] - points[1]) == pytest.approx(np.linalg.norm(plane[0] - plane[1]))


def test_collapsed_latents_still_draw() -> None:
    flat = latents(("a", "b"), CASES) | {"after": np.ones((8, 12), np.float32)}
    assert "gap – (chance 0.14)" in " ".join(words(figures.latent_pca(flat)))


def test_levels_get_a_row_of_panels_each() -> None:
    two = latents(("a", "b"), CASES) | {"level": np.repeat(["x1", "x5"], 4)}
    assert len(figures.latent_pca(two).axes) == 4


# ------------------------------------------------------------------------------------------------ examples


def test_a_mask_is_painted_in_radiological_view_inner_regions_on_top() -> None:
    grid = (9, 7)
    one = examples(("t1n", "t2f"), count=1)
    image, truth = np.ones((1, 2, *grid), np.float32), np.zeros((1, *grid), np.uint8)
    truth[0, 8, 6], truth[0, 7, 6] = 3, 2  # the patient's front right: enhancing, and oedema beside it
    one |= {"images": image, "truth": truth, "predictions": np.repeat(truth[:, None], len(one["subsets"]), 1)}
    shown = example_overlays(one).axes[0].images[0]
    assert shown.origin == "lower"
    picture = np.asarray(shown.get_array())
    enhancing, oedema = picture[-1, 0], picture[-1, 1]  # top left of the screen
    assert np.argmax([np.dot(enhancing, mpl.colors.to_rgb(hue)) for hue in REGION_HUES[:3]]) == 2
    np.testing.assert_allclose(oedema - enhancing, 0.55 * (_rgb(0) - _rgb(2)), atol=1e-6)


def _rgb(index: int) -> np.ndarray:
    return np.array(mpl.colors.to_rgb(REGION_HUES[index]))


def test_a_mask_lies_over_a_sequence_that_was_given() -> None:
    shown = words(example_overlays(examples(GLIOMA, count=1)))
    assert [text for text in shown if text.startswith("on ")] == [
        "on FLAIR",
        "on FLAIR",
        "on FLAIR",
        "on FLAIR",
        "on T1n",
    ]


def test_the_scale_bar_is_five_centimetres_long() -> None:
    first = example_overlays(examples(GLIOMA, count=1)).axes[0]
    x = first.lines[0].get_xdata()
    assert (x[1] - x[0]) * 2.0 == pytest.approx(50)


def test_empty_slice_and_empty_mask_draw() -> None:
    empty = examples(("t1n", "t2f"), count=1)
    empty |= {key: np.zeros_like(empty[key]) for key in ("images", "truth", "predictions")}
    assert "Expert" in svg(example_overlays(empty))


# ------------------------------------------------------------------------------------------------------ reliability


def test_reliability_shows_shares_of_bins_with_enough_voxels() -> None:
    bins = [
        [[900.0, 3.0, 100.0], [90.0, 1.5, 90.0], [300.0, 2.0, 80.0]],
        [[800.0, 0.0, 200.0], [80.0, 0, 150], [80, 0, 150]],
    ]
    row = {"error_where_doubtful": [0.243, 0.011], "bins": bins}
    told = {"left_out": {"regions": {"WT": row, "lesion": row}}}
    figure = figures.reliability_diagram(told)
    shown = words(figure)
    assert {"WT, whole tumour", "lesion", "ECE 24.3 → 1.1 %", "as the network gives them", "tempered"} <= set(shown)
    assert "probability of the region" in shown
    line, before, after = figure.axes[0].lines
    assert line.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert before.get_xydata().tolist() == [[0.1, pytest.approx(1 / 3)], [0.9, 0.8]]  # three voxels are no share
    assert after.get_xydata().tolist() == [[0.1, 0.1], [0.75, 0.75]]
    assert (before.get_marker(), before.get_linestyle()) != (after.get_marker(), after.get_linestyle())
