"""Pictures: each draws where it is told, names its axes, keeps to the palette and inside its figure, and says what it cannot draw."""

import io
import warnings
from itertools import pairwise

import matplotlib

matplotlib.use("agg")  # no display is needed

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex, to_rgb
from matplotlib.image import imread

from oneshot_steering import plot
from oneshot_steering.evaluate import UNSTEERED
from oneshot_steering.geometry import Classifier
from oneshot_steering.optimize import Fit
from oneshot_steering.plot import COLORS, DIVERGING, PAPER_FLIPS, SEQUENTIAL, _ink, new_axes
from oneshot_steering.steering import Steering
from oneshot_steering.surprisal import Surprisal

nan = float("nan")
pieces = ["The", " sky", ",", " un", "believ", "ably", " blue", ":", " $", "5", "_", "x", "\n", "  ", "no", "\ufffd"]
plain = Surprisal([torch.linspace(0, 9, len(pieces)), torch.tensor([])], [pieces, []])
steered = Surprisal([torch.linspace(4, 2, len(pieces)), torch.tensor([])], [pieces, []])
losses = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
fit = Fit(Steering(torch.ones(4), 1), losses, ["a", "b", "c"], [None, 0.1, None], [1.0, 2, 3, 3, 3], "steps", 4, 1.0)
flips = pd.DataFrame([dict(vector=v, sign=sign, prompts=prompts, rate=r, low=r / 2, high=(1 + r) / 2)
                      for v in (5, 10) for (sign, prompts), r in PAPER_FLIPS.items()])
swept = pd.DataFrame({"share": [0.1, 0.2, 0.9], "share low": [0, 0.1, 0.5], "share high": [0.3, 0.5, 1.0]},
                     pd.MultiIndex.from_tuples([(UNSTEERED, 0.0), ("v", -1.0), ("v", 1.0)], names=["vector", "strength"]))
texts = pd.DataFrame(dict(switched=[0, 0.5], readable=[0, 0.4], low=[0, 0.2], high=[0.3, 0.6], perplexity=[5.0, 40]), pd.Index([0.0, 1.0]))
layers = pd.DataFrame(dict(layer=[2, 2, 4, 4], loss=[3.0, 4, 1, 2], kind=list("abab")))
success = pd.DataFrame(dict(success=[0.0, 0.5, 1.0], kind=[*["promotion of a beginning"] * 2, "suppression of a beginning"]))
square = pd.DataFrame([[nan, -1.0], [2.0, 0.5]], ["one", "two"], ["one", "two"])
graded = pd.DataFrame(dict(vector=["v", "v", "w"], aligned=[10.0, 90, None], coherent=[90.0, 20, 80]))
bits = pd.DataFrame({"median": [3.0, 5], "low": [2, 4], "high": [4, 7]}, ["real", "made up"])

refused = pd.DataFrame([dict(prompts=kind, strength=strength, refuses=i < 2 * strength, right=nan if kind == "bad" else i > 0)
                        for kind in ("bad", "everyday") for strength in (0.0, 1.0) for i in range(3)])
claims = pd.DataFrame(dict(claim=["it acts", "it is rare", "it has no number"], holds=["holds", "does not hold", "holds"],
                           value=[0.9, 0.2, nan], low=[0.8, nan, nan], high=[1.0, nan, nan], reported=[0.95, 0.0, nan]))

CASES = {  # name -> (what is drawn first, further arguments)
    "plot_fit": (fit, {}),
    "plot_flips": (flips, {}),
    "plot_strengths": (swept, dict(value="share", chosen=0.5, bound=0.8)),
    "plot_text": (texts, dict(bound=30.0, chosen=1.0)),
    "plot_layers": (layers, dict(value="loss", by="kind")),
    "plot_success": (success, dict(value="success", by="kind", reported={"promotion of a beginning": [0.4]})),
    "plot_matrix": (square, dict(label="barrier (nats)")),
    "plot_roc": ({"v": Classifier([1, 2], [0, 1.5]), "w": Classifier([0, 2], [0, 3])}, {}),
    "plot_judged": (graded, {}),
    "plot_surprisal": ({"without": bits, "behind examples": bits}, dict(reported=dict(real=2.0))),
    "plot_claims": (claims, {}),
    "plot_refusals": (refused, dict(chosen=1.0)),
    "plot_tokens": (plain, dict(after=steered, title="Why is it $5_x?")),
}
TABLES = {name: case for name, case in CASES.items() if isinstance(case[0], pd.DataFrame)}
each = pytest.mark.parametrize("name", CASES)
each_table = pytest.mark.parametrize("name", TABLES)


def draw(name, *first, **more):
    "The axes that a case drew on."
    given, further = CASES[name]
    drawn = getattr(plot, name)(*(first or (given,)), **further | more)
    return drawn if isinstance(drawn, tuple) else (drawn,)


@pytest.fixture(autouse=True)
def no_figure_stays():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    plt.close("all")


def test_every_picture_has_a_case():
    assert CASES.keys() == {name for name in plot.__all__ if name.startswith("plot_")}


@each
def test_it_draws_on_the_given_axes_and_on_no_others(name):
    _, axes = plt.subplots(2, layout="constrained")
    argument = dict(axes=tuple(axes)) if name == "plot_text" else dict(ax=axes[0])
    drawn = draw(name, **argument)
    assert drawn == tuple(axes[:len(drawn)]) and plt.get_fignums() == [1]
    assert all(ax.has_data() or ax.texts for ax in drawn)
    assert name == "plot_text" or not axes[1].has_data()


@each
def test_axes_are_named(name):
    axes = draw(name)
    figure = axes[0].figure
    if name == "plot_tokens":  # it has no axes, but a colour bar
        assert "bits" in figure.axes[-1].get_xlabel()
        return
    assert all(ax.get_ylabel() for ax in axes) and axes[-1].get_xlabel()
    assert all(ax.get_ylabel() for ax in figure.axes), "a second axis or a colour bar has no name"


def shades(ax):
    "Every colour that lines, areas and texts of some axes have."
    for line in ax.lines:
        yield from [line.get_color()] * (line.get_linestyle() != "None") + [line.get_markeredgecolor()] * (line.get_marker() != "None")
    for patch in [*ax.patches, *ax.collections]:
        yield from np.atleast_2d(patch.get_color() if isinstance(patch, LineCollection) else patch.get_facecolor())
    yield from (text.get_color() for text in ax.texts)


def on_a_map(shade):
    return min(np.abs(scale(np.linspace(0, 1, 256))[:, :3] - to_rgb(shade)).max(1).min() for scale in (DIVERGING, SEQUENTIAL)) < 0.01


@each
def test_colours_are_of_the_palette_or_grey(name):
    for ax in draw(name):
        found = {to_hex(shade) for shade in shades(ax) if not isinstance(shade, str) or shade not in ("none", "auto")}
        strange = {shade for shade in found if shade.upper() not in COLORS.values() and len({*to_rgb(shade)}) > 1}
        assert all(map(on_a_map, strange)) if name == "plot_tokens" else not strange
        assert all(image.get_cmap() in (DIVERGING, SEQUENTIAL) for image in ax.images)


@each
def test_nothing_leaves_the_figure(name):
    figure = draw(name)[0].figure
    figure.canvas.draw()
    drawn, whole = figure.get_tightbbox(), figure.bbox_inches
    assert drawn.x0 >= -0.01 and drawn.y0 >= -0.01 and drawn.x1 <= whole.x1 + 0.01 and drawn.y1 <= whole.y1 + 0.01


@each
def test_figures_are_white_and_opaque_and_stay_open(name):
    figure, file = draw(name)[0].figure, io.BytesIO()
    figure.savefig(file, format="png")
    file.seek(0)
    assert imread(file)[0, 0].tolist() == [1, 1, 1, 1] and plt.get_fignums() == [figure.number]


@each_table
def test_an_empty_table_and_a_missing_column_are_refused(name):
    table = TABLES[name][0]
    with pytest.raises(ValueError, match="nothing to draw"):
        draw(name, table.head(0))
    if name != "plot_matrix":
        with pytest.raises(ValueError, match=r"no column .*; it has "):
            draw(name, table.rename(columns=lambda c: f"another {c}").rename_axis(index=lambda c: f"another {c}"))
    assert plt.get_fignums() == []


@each_table
@pytest.mark.parametrize("rows", [1, 2])
def test_a_row_and_what_is_missing_are_drawn(name, rows):
    table = TABLES[name][0]
    draw(name, table.head(rows))
    numbers = table.select_dtypes("number").columns.difference(["layer", "vector", "strength"])
    draw(name, table.assign(**dict.fromkeys(numbers, nan)))[0].figure.canvas.draw()


def test_other_ways_of_giving_nothing_are_refused():
    with pytest.raises(ValueError, match="at least one classifier"):
        plot.plot_roc({})
    with pytest.raises(ValueError, match="at least one summary"):
        plot.plot_surprisal({})
    with pytest.raises(ValueError, match="has no tokens"):
        plot.plot_tokens(plain, steered, 1)
    with pytest.raises(ValueError, match="different tokens"):
        plot.plot_tokens(plain, Surprisal([torch.ones(1)], [["The"]]))


@pytest.mark.parametrize("scale", [DIVERGING, SEQUENTIAL])
def test_labels_can_be_read_on_every_tint(scale):
    def light(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722))) + 0.05

    for tint in [*scale(np.linspace(0, 1, 256)), scale(nan)]:
        pair = sorted((light(tint), light(_ink(tint))))
        assert pair[1] / pair[0] >= 4.5  # WCAG AA


def test_lines_differ_in_more_than_colour():
    assert len({(plot._look(i)["marker"], plot._look(i)["ls"]) for i in range(18)}) == 18


def test_the_unsteered_model_is_strength_zero_of_every_vector():
    (ax,) = draw("plot_strengths", pd.concat([swept, swept[1:].rename(index=dict(v="w"))]))
    assert [line.get_xdata().tolist() for line in (c[0] for c in ax.containers)] == [[-1, 0, 1]] * 2
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["v", "w"]


@pytest.mark.parametrize("table, limits, expected", [
    (square, None, (-2, 2)), (square.abs(), None, (0, 2)), (square, (-1, 1), (-1, 1)), (square.abs(), (0, 4), (0, 4)),
    (-square.abs(), None, (-2, 2)), (square * nan, None, (0, 1))])
def test_zero_is_white(table, limits, expected):
    (ax,) = draw("plot_matrix", table, limits=limits)
    assert ax.images[0].get_clim() == expected
    assert ax.images[0].to_rgba(0)[:3] == pytest.approx((1, 1, 1), abs=0.01)
    assert len(ax.texts) == table.notna().to_numpy().sum()


def test_large_tables_show_no_numbers_and_small_negatives_no_minus_zero():
    assert not draw("plot_matrix", pd.DataFrame(np.ones((13, 13))))[0].texts
    assert [text.get_text() for text in draw("plot_matrix", pd.DataFrame([[-0.001, 1.0]]))[0].texts] == ["0.00", "1.00"]


def test_names_that_are_numbers_are_short():
    (ax,) = draw("plot_matrix", pd.DataFrame(np.eye(2), [0.5, 30.0], [2.0, "a"]))
    assert [label.get_text() for label in (*ax.get_xticklabels(), *ax.get_yticklabels())] == ["2", "a", "0.5", "30"]


def test_the_names_of_many_columns_do_not_overlap():
    names = [f"suppression {i}" for i in range(35)]
    (ax,) = draw("plot_matrix", pd.DataFrame(np.eye(35), names, names))
    ax.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    assert len(boxes) == 35 and all(a.x1 <= b.x0 for a, b in pairwise(boxes))


@pytest.mark.parametrize("inches", [2.5, 4, 8])
def test_tokens_wrap_inside_the_axes_and_do_not_overlap(inches):
    many = Surprisal([plain.bits[0].repeat(5)], [pieces * 5])
    ax = plot.plot_tokens(many, Surprisal([steered.bits[0].repeat(5)], [pieces * 5]), width=inches)
    ax.figure.canvas.draw()
    boxes, inside = [patch.get_window_extent() for patch in ax.patches], ax.figure.bbox
    assert all(box.x0 >= inside.x0 and box.x1 <= inside.x1 and box.y0 >= inside.y0 for box in boxes) and len(boxes) == 5 * len(pieces)
    assert all(a.x1 <= b.x0 + 1e-6 or a.y0 > b.y1 for a, b in pairwise(boxes))
    words = [text.get_window_extent() for text in ax.texts if text.get_text()]
    assert all(any(box.padded(1).contains(w.x0, w.y0) and box.padded(1).contains(w.x1, w.y1) for box in boxes) for w in words)


def test_tokens_fit_into_a_part_of_a_figure():
    figure = plt.figure(layout="constrained", figsize=(8, 3))
    left, _ = figure.subfigures(1, 2)
    ax = draw("plot_tokens", ax=left.subplots())[0]
    figure.canvas.draw()
    assert all(left.bbox.x1 >= patch.get_window_extent().x1 for patch in ax.patches)


def test_a_nan_leaves_a_token_without_a_number():
    ax = plot.plot_tokens(Surprisal([torch.tensor([1.0, nan])], [["a", " b"]]), Surprisal([torch.tensor([1.0, 2])], [["a", " b"]]))
    assert [text.get_text() for text in ax.texts] == ["a", "+0.0", "b", ""]


def test_given_axes_get_the_style():
    ax = plt.subplots()[1]
    assert new_axes(ax) is ax and not ax.spines["top"].get_visible()
