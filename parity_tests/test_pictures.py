"""Pictures of an inspection: what is drawn, and that it can be read."""

import itertools
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation, Text

from flaxgpt.errors import InputError
from flaxgpt.generation.processors import keep_top_k, keep_top_p
from flaxgpt.interpret import plots
from flaxgpt.interpret.inspection import Inspection, Lens

TOY = ["closer", "every", "effort", "forward", "inches", "moves", "pizza", "toward", "you"]
TOY_LOGITS = np.array([4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79], np.float32)
HOSTILE = (r"$\nonsense$", "$x_1", "x^2$", "_hidden", "東京", "\U0001f9d9", "\u202e", "\u0301", "", "␣" * 128, r"\n", "%", "{}", "<&>")


def inspection(T=6, L=2, N=3, labels=HOSTILE, seed=0):
    rng = np.random.default_rng(seed)
    V, M, K = len(labels), L + 1, 2
    weights_LNTS = np.tril(rng.uniform(size=(L, N, T, T)))
    lens = Lens(
        rng.integers(V, size=(M, T, K), dtype=np.int32),
        np.log(rng.uniform(size=(M, T, K))).astype(np.float32),
        np.log(rng.uniform(size=(M, T))).astype(np.float32),
        rng.integers(1, 3, size=(M, T), dtype=np.int32),
    )
    logits_TV = rng.normal(size=(T, V)).astype(np.float32)
    ids_T = rng.integers(V, size=T, dtype=np.int32)
    return Inspection(ids_T, tuple(labels), logits_TV, lens, (weights_LNTS / weights_LNTS.sum(-1, keepdims=True)).astype(np.float32))


def bars(axes):
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def names(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def overlapping(texts):
    """Pairs of texts that are drawn over each other (an annotation's own extent has its arrow in it)."""
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in texts if text.get_visible() and text.get_text()]
    return [(a, b) for (a, box), (b, other) in itertools.combinations(boxes, 2) if box.padded(-1).overlaps(other.padded(-1))]


def test_each_picture_is_written_in_two_formats_without_a_warning_whatever_tokens_are_called(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = plots.save_plots(inspection(), tmp_path / "new" / "folder", position=2)
    stems = ("logits", "softmax", "temperatures", "filters", "surprise", "lens", "attention", "attention-00", "attention-01")
    assert [path.name for path in paths] == [f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")]
    assert sorted(paths) == sorted((tmp_path / "new" / "folder").iterdir())
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<?xml"), path


def test_only_what_there_is_data_for_is_drawn(tmp_path):
    whole = inspection(T=1)
    bare = Inspection(whole.ids_T, whole.labels_V, whole.logits_TV)
    paths = plots.save_plots(bare, tmp_path, top_k=None, top_p=None)
    assert {path.stem for path in paths} == {"logits", "softmax", "temperatures"}
    assert "surprise" not in {path.stem for path in plots.save_plots(whole, tmp_path)}  # nothing predicts the only token


def test_labels_are_drawn_as_they_are_and_escaped_where_the_font_lacks_a_character():
    axes = plots.plot_softmax(np.arange(len(HOSTILE), 0, -1, dtype=np.float32), HOSTILE).axes[0]
    shown = names(axes.yaxis)
    assert shown[:4] == list(HOSTILE[:4])
    assert shown[4:7] == [r"\u6771\u4eac", r"\U0001f9d9", r"\u202e"]
    assert shown[9] == "␣" * 15 + "…"
    assert not any(label.get_parse_math() for label in axes.yaxis.get_ticklabels())


def test_a_large_vocabulary_is_a_small_file_and_its_likeliest_tokens_can_be_read(tmp_path):
    rng = np.random.default_rng(0)
    logits_V = rng.normal(size=50257).astype(np.float32)
    labels = [f"␣token{i}" for i in range(50257)]
    figure = plots.plot_logits(logits_V, labels, target_id=777)
    FigureCanvasAgg(figure).draw()
    annotations = [child for child in figure.axes[0].get_children() if isinstance(child, Annotation)]
    expected = [*np.argsort(-logits_V)[:8], 777]
    assert [text.get_text().split("  ")[1] for text in annotations] == [labels[i] for i in expected]
    assert [text.xy[1] for text in annotations] == [logits_V[i] for i in expected]
    assert overlapping(annotations) == []
    paths = plots.save_figures([("logits", figure)], tmp_path)
    assert max(path.stat().st_size for path in paths) < 500_000


def test_probabilities_are_those_of_the_toy_vocabulary():
    figure = plots.plot_softmax(TOY_LOGITS, TOY, target_id=6)
    logit, softmax, log_softmax = figure.axes
    assert names(logit.yaxis)[:3] == ["forward", "toward", "closer"]
    probs = [bar.get_width() for bar in bars(softmax)]
    np.testing.assert_allclose(probs[:3], [0.5721, 0.3576, 0.0609], atol=5e-5)
    assert sum(probs) == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(logit.collections[0].get_offsets()[:3, 0], [6.75, 6.28, 4.51], rtol=1e-6)
    np.testing.assert_allclose(log_softmax.collections[0].get_offsets()[:, 0], np.log(probs), rtol=1e-5)
    marked = [name for name, bar in zip(names(logit.yaxis), bars(softmax), strict=True) if bar.get_facecolor() == to_rgba(plots.MARKED)]
    assert marked == ["pizza"]


def test_bars_of_a_temperature_are_the_softmax_of_the_divided_logits():
    axes = plots.plot_temperatures(TOY_LOGITS, TOY, (0.1, 1, 5)).axes[0]
    order = np.argsort(-TOY_LOGITS)
    assert names(axes.xaxis) == [TOY[i] for i in order]
    for temperature, container in zip((0.1, 1, 5), axes.containers, strict=True):
        exponentials = np.exp(TOY_LOGITS[order].astype(np.float64) / temperature)
        np.testing.assert_allclose([bar.get_height() for bar in container], exponentials / exponentials.sum(), rtol=1e-4)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["0.1", "1", "5"]


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 0.01), (2, 0.3), (3, 0.5), (4, 0.93), (8, 0.999), (50, 1.0)])
@pytest.mark.parametrize("logits_V", [TOY_LOGITS, np.array([1, 3, 2, 3, 1, 2, 1, 0, 0], np.float32)], ids=["toy", "ties"])
def test_what_is_drawn_as_kept_is_what_generation_keeps(logits_V, top_k, top_p):
    figure = plots.plot_filters(logits_V, TOY, top_k, top_p)
    expected = keep_top_k(jnp.asarray(logits_V)[None], top_k)[0], keep_top_p(jnp.asarray(logits_V)[None], top_p)[0]
    for axes, processed_V in zip(figure.axes, expected, strict=True):
        stays = {TOY[i] for i in np.flatnonzero(np.isfinite(processed_V))}
        rows = zip(names(figure.axes[0].yaxis), bars(axes), strict=True)
        assert {name for name, bar in rows if bar.get_facecolor() == to_rgba(plots.PLAIN)} == stays
        assert f"keeps {len(stays)} of 9" in axes.get_title()


@pytest.mark.parametrize("T", [5, 33, 200])
def test_surprise_of_a_long_text_is_wrapped_into_rows_that_can_be_read(T):
    labels = [f"␣token{i}" for i in range(50)]
    text = inspection(T, labels=labels)
    figure = plots.plot_surprise(text.ids_T, text.surprises_T, labels, start=100)
    assert len(figure.axes) == -(-T // 32)
    heights = [bar.get_height() for axes in figure.axes for bar in bars(axes)]
    np.testing.assert_allclose(heights, [0, *text.surprises_T[1:]])
    assert [name for axes in figure.axes for name in names(axes.xaxis)] == [labels[i] for i in text.ids_T]
    assert [axes.get_ylabel() for axes in figure.axes] == [f"position {100 + 32 * row} on" for row in range(len(figure.axes))]
    FigureCanvasAgg(figure).draw()
    assert overlapping([label for axes in figure.axes for label in axes.get_xticklabels()]) == []
    assert all(axes.get_ylim() == figure.axes[0].get_ylim() for axes in figure.axes)


def test_the_lens_names_each_cell_and_frames_the_true_next_token():
    labels = [f"␣a{i}" for i in range(30)]
    text = inspection(T=40, labels=labels)
    figure = plots.plot_lens(text.ids_T, text.lens, labels)
    shown, framed = {}, set()
    panels = [axes for axes in figure.axes if axes.images]
    for row, axes in enumerate(panels):
        for cell in axes.texts:
            column, layer = cell.get_position()
            shown[layer, 32 * row + column] = cell.get_text()
            framed |= {(layer, 32 * row + column)} if cell.get_bbox_patch() else set()
    assert shown == {(m, t): labels[i] for (m, t), i in np.ndenumerate(text.lens.top_ids_MTK[..., 0])}
    assert framed == {(m, t) for (m, t), rank in np.ndenumerate(text.lens.next_ranks_MT) if rank == 1}
    colors = np.concatenate([axes.images[0].get_array() for axes in panels], axis=1)
    np.testing.assert_allclose(colors, np.exp(text.lens.top_log_probs_MTK[..., 0]), rtol=1e-6)
    assert names(panels[0].yaxis) == ["embedding", "layer 0", "layer 1"]
    FigureCanvasAgg(figure).draw()
    assert overlapping([cell for axes in panels for cell in axes.texts]) == []


def test_attention_maps_are_the_weights_and_white_after_the_query():
    text = inspection(T=7, L=2, N=5)
    tokens = [text.labels_V[i] for i in text.ids_T]
    figure = plots.plot_attention(text.weights_LNTS[1], tokens, "Layer 1")
    maps = [axes for axes in figure.axes if axes.images and axes.get_title().startswith("head")]
    assert [axes.get_title() for axes in maps] == [f"head {head}" for head in range(5)]
    for weights_TS, axes in zip(text.weights_LNTS[1], maps, strict=True):
        drawn = np.ma.filled(axes.images[0].get_array(), np.nan)
        np.testing.assert_array_equal(drawn[np.tril_indices(7)], weights_TS[np.tril_indices(7)])
        assert np.isnan(drawn[np.triu_indices(7, 1)]).all()
    FigureCanvasAgg(figure).draw()
    below = [[label.get_text() for label in axes.get_xticklabels() if label.get_visible()] for axes in maps]
    assert below == [[], [], *([[plots._shown(token) for token in tokens]] * 3)]  # two lines of three, the last place empty


@pytest.mark.parametrize("T", [5, 200])
def test_the_overview_has_a_map_for_each_layer_and_head_in_its_place(T):
    text = inspection(T, L=3, N=2)
    image = plots.plot_attention_overview(text.weights_LNTS).axes[0].images[0]
    grid = np.ma.filled(image.get_array(), np.nan)
    side = min(T, plots.THUMBNAIL)
    pitch = (grid.shape[1] + (grid.shape[1] - 2 * side)) // 2
    for layer, head in itertools.product(range(3), range(2)):
        thumbnail = grid[layer * pitch :, head * pitch :][:side, :side]
        # what a group of queries gives to all keys is 1; where a group is one position, nothing is changed
        if T == side:
            np.testing.assert_array_equal(thumbnail[np.tril_indices(T)], text.weights_LNTS[layer, head][np.tril_indices(T)])
        else:
            np.testing.assert_allclose(np.nansum(thumbnail, axis=1), 1, atol=1e-5)
        assert np.isnan(thumbnail[np.triu_indices(side, 1)]).all()


def test_of_a_long_text_the_part_is_drawn_that_ends_at_the_position(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "WINDOW", 4)
    drawn = {}
    monkeypatch.setattr(plots, "save_figures", lambda figures, folder: drawn.update(figures) or [])
    text = inspection(T=10, labels=[f"t{i}" for i in range(30)])
    for position, first in ((-1, 6), (7, 4), (1, 0)):
        plots.save_plots(text, tmp_path, position=position)
        expected = [text.labels_V[i] for i in text.ids_T[first : first + 4]]
        for name in ("surprise", "lens"):
            assert names(drawn[name].axes[0].xaxis) == expected, (name, position)
            assert drawn[name].axes[0].get_ylabel() == f"position {first} on"


def test_the_target_is_the_true_next_token_unless_another_is_named(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "save_figures", lambda figures, folder: drawn.update(figures) or [])
    text = inspection(labels=[f"t{i}" for i in range(30)])
    for position, target_id, expected in ((1, None, f"t{text.ids_T[2]}"), (1, 5, "t5"), (-1, 7, "t7")):
        plots.save_plots(text, tmp_path, position=position, target_id=target_id)
        assert drawn["logits"].axes[0].get_title().endswith(f"target, {expected})")
    plots.save_plots(text, tmp_path)  # nothing follows the last position
    assert "target" not in drawn["logits"].axes[0].get_title()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"position": 6}, "position 6 is beyond the text"),
        ({"position": -7}, "expected -6 to 5"),
        ({"target_id": 14}, "target token 14 is not in the vocabulary"),
        ({"target_id": -1}, "expected 0 to 13"),
        ({"temperatures": (1, 0)}, "numbers above 0"),
        ({"temperatures": (float("nan"),)}, "numbers above 0"),
        ({"temperatures": ()}, "one or more"),
        ({"top_k": 0, "top_p": None}, "top_k of at least 1"),
        ({"top_p": 0.0}, "top_p above 0"),
        ({"top_p": 1.5}, "at most 1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, wrong, says):
    with pytest.raises(InputError, match=says):
        plots.save_plots(inspection(), tmp_path / "folder", **wrong)
    assert not (tmp_path / "folder").exists()
