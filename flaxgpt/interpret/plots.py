"""Pictures of an inspection: of the distribution at a position, of surprise along the text, of the lens and of attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from flaxgpt.errors import InputError
from flaxgpt.interpret.inspection import Inspection, Lens
from flaxgpt.interpret.scores import log_softmax, top_ids
from flaxgpt.run.plots import save_figure

PLAIN, MARKED, CUT = "C0", "C1", "0.8"
"""Colours of a token: of any, of the target, of one that can't be chosen."""
WINDOW = 256
"""Tokens of the text that the pictures of surprise and of the lens show, at most."""
THUMBNAIL = 64
"""Side of a map in the overview of attention, in pixels, at most."""
ATTENTION = {"cmap": "viridis", "norm": PowerNorm(0.5, 0, 1)}  # by the square root: most weights are small


def save_plots(
    inspection: Inspection,
    folder: Path,
    *,
    position: int = -1,
    target_id: int | None = None,
    temperatures: Sequence[float] = (0.1, 1, 5),
    top_k: int | None = 5,
    top_p: float | None = 0.9,
) -> list[Path]:
    """Draw what there is data for, each picture as a PNG and an SVG written atomically.

    They are logits, softmax, temperatures and filters (of one position), surprise, lens, attention (an overview of all layers and
    heads) and attention-00, -01, ... (one for each layer). Of a text longer than WINDOW, surprise and lens show the part that ends
    at the position.

    Args:
        inspection: what is drawn.
        folder: where to; made if need be.
        position: of the text; negative counts from the end. The distribution is that of the token after it.
        target_id: the token to be marked; without it, the one that follows in the text.
        temperatures: see `plot_temperatures`.
        top_k: see `plot_filters`.
        top_p: see `plot_filters`.

    Returns:
        The paths of the files.

    Raises:
        InputError: the position is beyond the text, or see `distribution_plots`.
    """
    length = len(inspection.ids_T)
    if not -length <= position < length:
        raise InputError(f"position {position} is beyond the text, which has {length} tokens: expected {-length} to {length - 1}")
    position %= length
    if target_id is None and position + 1 < length:
        target_id = int(inspection.ids_T[position + 1])
    distribution = distribution_plots(
        inspection.logits_TV[position], inspection.labels_V, target_id=target_id, temperatures=temperatures, top_k=top_k, top_p=top_p
    )
    return save_figures(distribution, folder) + save_figures(_text_plots(inspection, position), folder)


def save_figures(figures: Iterable[tuple[str, Figure]], folder: Path) -> list[Path]:
    """Write named figures, each as a PNG and an SVG; the paths of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures:
        for kind in ("png", "svg"):
            paths.append(folder / f"{name}.{kind}")
            save_figure(figure, paths[-1], kind)
            figure.set_layout_engine("none")  # it has been laid out, which takes as long as drawing
    return paths


def distribution_plots(
    logits_V: np.ndarray,
    labels: Sequence[str],
    *,
    target_id: int | None = None,
    temperatures: Sequence[float] = (0.1, 1, 5),
    top_k: int | None = 5,
    top_p: float | None = 0.9,
) -> list[tuple[str, Figure]]:
    """The pictures of one distribution, by name; that of filters only with top_k or top_p.

    Raises:
        InputError: a target that is not in the vocabulary, a temperature that is not above 0, or a top_k or top_p that is out of range.
    """
    if target_id is not None and not 0 <= target_id < len(labels):
        raise InputError(f"target token {target_id} is not in the vocabulary: expected 0 to {len(labels) - 1}")
    figures = [
        ("logits", plot_logits(logits_V, labels, target_id)),
        ("softmax", plot_softmax(logits_V, labels, target_id)),
        ("temperatures", plot_temperatures(logits_V, labels, temperatures)),
    ]
    if top_k is not None or top_p is not None:
        figures.append(("filters", plot_filters(logits_V, labels, top_k, top_p)))
    return figures


def plot_logits(logits_V: np.ndarray, labels: Sequence[str], target_id: int | None = None, top: int = 8) -> Figure:
    """The logits of the whole vocabulary by token id; the likeliest and the target by name."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    ids = _likeliest(logits_V, top, target_id)
    size = 2 if len(logits_V) > 1000 else 12
    axes.scatter(np.arange(len(logits_V)), logits_V, s=size, color=PLAIN, alpha=0.5, linewidths=0, rasterized=True)
    axes.scatter(ids, logits_V[ids], s=14, color=_colors(ids, target_id), zorder=3)
    axes.margins(0.03)
    low, high = axes.get_ylim()
    y = 1.06
    for token in ids:
        y = min(y - 0.06, (logits_V[token] - low) / (high - low))  # where the point is, or under the last label
        axes.annotate(
            f"{logits_V[token]:.2f}  {_shown(labels[token])}",
            (token, logits_V[token]),
            (1.02, y),
            textcoords="axes fraction",
            va="center",
            fontsize="small",
            color=MARKED if token == target_id else "k",
            parse_math=False,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "0.6", "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 2},
        )
    axes.set(xlabel="token id", ylabel="logit")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(_title("Logits of the vocabulary", labels, target_id), parse_math=False)
    axes.grid(alpha=0.3)
    return figure


def plot_softmax(logits_V: np.ndarray, labels: Sequence[str], target_id: int | None = None, top: int = 20) -> Figure:
    """The likeliest tokens' logits, probabilities and log-probabilities side by side, and the target's below them."""
    ids = _likeliest(logits_V, top, target_id)
    log_probs = log_softmax(logits_V)
    figure = Figure(figsize=(10, 1.4 + 0.22 * len(ids)), layout="constrained")
    all_axes = figure.subplots(1, 3, sharey=True)
    all_axes[1].barh(range(len(ids)), np.exp(log_probs)[ids], color=_colors(ids, target_id))
    for axes, values in zip(all_axes[::2], (logits_V, log_probs), strict=True):  # points, since 0 means nothing to a logit
        axes.scatter(values[ids], range(len(ids)), color=_colors(ids, target_id), zorder=3)
        axes.grid(axis="y", alpha=0.3)
    for axes, name in zip(all_axes, ("logit", "softmax: probability", "log-softmax: log-probability (nats)"), strict=True):
        axes.set_xlabel(name)
        axes.grid(axis="x", alpha=0.3)
    _name_bars(all_axes[0], ids, labels)
    figure.suptitle(_title("The likeliest tokens", labels, target_id), parse_math=False)
    return figure


def plot_temperatures(logits_V: np.ndarray, labels: Sequence[str], temperatures: Sequence[float] = (0.1, 1, 5), top: int = 10) -> Figure:
    """The likeliest tokens' probabilities after their logits are divided by each of the temperatures.

    Raises:
        InputError: a temperature is not above 0, or there is none.
    """
    if not temperatures or not all(0 < t < math.inf for t in temperatures):
        raise InputError(f"temperatures {tuple(temperatures)}: expected one or more numbers above 0")
    ids = _likeliest(logits_V, top)
    figure = Figure(figsize=(max(5, 0.9 * len(ids)), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(temperatures)
    colors = colormaps["viridis"](np.linspace(0.1, 0.85, len(temperatures)))
    for i, temperature in enumerate(temperatures):
        x = np.arange(len(ids)) + (i - (len(temperatures) - 1) / 2) * width
        axes.bar(x, np.exp(log_softmax(logits_V / temperature))[ids], width, color=colors[i], label=f"{temperature:g}")
    axes.set_xticks(range(len(ids)), [_shown(labels[i]) for i in ids], rotation=30, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set(ylabel="probability", title="The likeliest tokens at several temperatures")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(title="temperature")
    return figure


def plot_filters(logits_V: np.ndarray, labels: Sequence[str], top_k: int | None = 5, top_p: float | None = 0.9, top: int = 20) -> Figure:
    """Which of the likeliest tokens top-k and top-p keep, by the rules of `flaxgpt.generation.processors`.

    Those as likely as the k-th stay with it; a token stays in top-p if the tokens likelier than it have less than p together.

    Args:
        logits_V: float.
        labels: of the V tokens.
        top_k: None leaves its panel out.
        top_p: the same; one of the two must be given.
        top: how many tokens are drawn at least, if there are so many; to show where top_k ends it may be twice as many.

    Raises:
        InputError: top_k is not above 0, top_p is not above 0 and at most 1, or neither is given.
    """
    if (top_k is None and top_p is None) or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise InputError(f"top_k={top_k}, top_p={top_p}: expected top_k of at least 1, top_p above 0 and at most 1, or one of them")
    order = top_ids(logits_V, len(logits_V))
    falling = -logits_V[order]
    probs = np.exp(log_softmax(logits_V))[order]
    likelier = np.concatenate([[0], np.cumsum(probs)])[np.searchsorted(falling, falling)]  # what those likelier than each have together
    panels = []
    if top_k is not None:
        kth = min(top_k, len(order)) - 1
        panels.append((f"top-k {top_k}", falling <= falling[kth], probs[kth]))
    if top_p is not None:
        panels.append((f"top-p {top_p:g}", likelier < top_p, top_p))
    count = min(len(order), max(top, min((top_k or 0) + 5, 2 * top)))
    figure = Figure(figsize=(1.5 + 4.3 * len(panels), 1.6 + 0.22 * count), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, stays, threshold) in zip(all_axes, panels, strict=True):
        axes.barh(range(count), probs[:count], color=np.where(stays[:count], PLAIN, CUT))
        axes.axvline(threshold, color=MARKED, linestyle="--", linewidth=1)
        axes.set(xlabel="probability", title=f"{name} keeps {stays.sum():,} of {len(order):,}")
        axes.grid(axis="x", alpha=0.3)
    if top_p is not None:
        all_axes[-1].plot(likelier[:count], range(count), "k.", markersize=4)
    key = [Patch(color=PLAIN, label="kept"), Patch(color=CUT, label="cut")]
    key.append(Line2D([], [], color=MARKED, linestyle="--", label="threshold: the k-th token, or p"))
    key.append(Line2D([], [], color="k", marker=".", linestyle="", label="all likelier tokens together, against p"))
    figure.legend(handles=key if top_p is not None else key[:3], loc="outside lower center", ncols=2, fontsize="small")
    _name_bars(all_axes[0], order[:count], labels)
    return figure


def plot_surprise(ids_T: np.ndarray, surprise_T: np.ndarray, labels: Sequence[str], start: int = 0, columns: int = 32) -> Figure:
    """Surprise along a text, wrapped into rows.

    Args:
        ids_T: token ids.
        surprise_T: of each token, in nats; nan where there is none, as for the first of a text.
        labels: of the V tokens.
        start: position of the first token in the whole text.
        columns: tokens in a row.
    """
    rows = _rows(len(ids_T), columns)
    columns = min(columns, len(ids_T))
    figure = Figure(figsize=(max(4.0, 1 + 0.32 * columns), 0.6 + 1.8 * len(rows)), layout="constrained")
    names = [_shown(labels[i]) for i in ids_T]
    upright = max(map(len, names)) <= 2
    highest = np.nanmax(np.append(surprise_T, 1.0))
    for axes, row in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
        axes.bar(range(len(row)), np.nan_to_num(surprise_T[row]), color=PLAIN)
        axes.set_xticks(range(len(row)), [names[t] for t in row], rotation=0 if upright else 90, fontsize=7, parse_math=False)
        axes.set(xlim=(-0.6, columns - 0.4), ylim=(0, 1.05 * highest), ylabel=f"position {start + row[0]} on")
        axes.grid(axis="y", alpha=0.3)
    figure.suptitle("Surprise of each token, given those before it (nats)")
    return figure


def plot_lens(ids_T: np.ndarray, lens: Lens, labels: Sequence[str], start: int = 0) -> Figure:
    """The logit lens, wrapped into rows: what each layer predicts at each position (below: its token).

    A cell has the likeliest token's name, and its probability as the colour; it has a frame where that is the true next token.

    Args:
        ids_T: token ids.
        lens: of the same T positions.
        labels: of the V tokens.
        start: position of the first token in the whole text.
    """
    top_MT, probs_MT = lens.top_ids_MTK[..., 0], np.exp(lens.top_log_probs_MTK[..., 0])
    names = {i: _shown(labels[i], 9) for i in {*top_MT.flat, *ids_T}}
    narrow = max(map(len, names.values())) <= 4
    rows = _rows(len(ids_T), 32 if narrow else 16)
    columns = max(map(len, rows))
    layers = len(top_MT)
    figure = Figure(figsize=(2 + columns * (0.38 if narrow else 0.72), 1 + len(rows) * (0.75 + 0.2 * layers)), layout="constrained")
    all_axes = figure.subplots(len(rows), squeeze=False)[:, 0]
    for axes, row in zip(all_axes, rows, strict=True):
        image = axes.imshow(probs_MT[:, row], origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1)
        for (layer, column), prob in np.ndenumerate(probs_MT[:, row]):
            token, true = top_MT[layer, row[column]], lens.next_ranks_MT[layer, row[column]] == 1
            frame = {"boxstyle": "square,pad=0.15", "fill": False, "edgecolor": MARKED} if true else None
            color = "k" if prob > 0.6 else "w"
            axes.text(column, layer, names[token], ha="center", va="center", fontsize=7, color=color, bbox=frame, parse_math=False)
        axes.set_xticks(range(len(row)), [names[i] for i in ids_T[row]], fontsize=7, parse_math=False)
        if not narrow:
            axes.tick_params("x", rotation=30)
        axes.set_yticks(range(layers), ["embedding", *(f"layer {i}" for i in range(layers - 1))], fontsize=7)
        axes.set(xlim=(-0.5, columns - 0.5), ylabel=f"position {start + row[0]} on")
        axes.spines[["top", "right"]].set_visible(False)
    figure.colorbar(image, ax=all_axes, label="probability", shrink=1 / len(rows), anchor=(0, 1))
    figure.suptitle("What each layer predicts after each token (framed: what does follow)")
    return figure


def plot_attention(weights_NTS: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """The attention maps of a layer's heads: from the token at the left to the token below.

    Args:
        weights_NTS: attention weights; those of keys after the query are left white.
        names: of the T tokens.
        title: above the picture.
    """
    heads, length, _ = weights_NTS.shape
    columns = math.ceil(math.sqrt(heads))
    lines = math.ceil(heads / columns)
    side = 2.4 if length <= 16 else 3.2
    figure = Figure(figsize=(1.5 + side * columns, 1 + (side + 0.2) * lines), layout="constrained")
    all_axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    shown = [_shown(name) for name in names]
    for head, axes in enumerate(all_axes.flat):
        if head >= heads:
            axes.set_visible(False)
            continue
        image = axes.imshow(_causal(weights_NTS[head]), **ATTENTION)
        axes.set_title(f"head {head}", fontsize="medium")
        lowest = head + columns >= heads
        axes.tick_params(labelsize=7, labelbottom=lowest)
        if length <= 32 and lowest:
            axes.set_xticks(range(length), shown, rotation=90, parse_math=False)
        if length <= 32 and head % columns == 0:
            axes.set_yticks(range(length), shown, parse_math=False)
    figure.colorbar(image, ax=all_axes, label="attention weight", fraction=0.03, aspect=30)
    figure.suptitle(title)
    return figure


def plot_attention_overview(weights_LNTS: np.ndarray) -> Figure:
    """The attention maps of all layers and heads, small, on one grid."""
    layers, heads, length, _ = weights_LNTS.shape
    side = min(length, THUMBNAIL)
    gap = 1 + side // 16
    grid = np.full((layers * (side + gap) - gap, heads * (side + gap) - gap), np.nan, np.float32)
    for layer in range(layers):
        for head in range(heads):
            top, left = layer * (side + gap), head * (side + gap)
            grid[top : top + side, left : left + side] = _causal(_shrunk(weights_LNTS[layer, head], side))
    figure = Figure(figsize=(max(5, 1.8 + 0.75 * heads), max(3, 1 + 0.75 * layers)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, interpolation="nearest", **ATTENTION)
    axes.set_xticks(np.arange(heads) * (side + gap) + side / 2, range(heads))
    axes.set_yticks(np.arange(layers) * (side + gap) + side / 2, range(layers))
    axes.set(xlabel="head", ylabel="layer")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="attention weight", fraction=0.03, aspect=30)
    figure.suptitle("Attention: down the queries, to the right the keys")
    return figure


def _text_plots(inspection: Inspection, position: int) -> Iterator[tuple[str, Figure]]:
    length = len(inspection.ids_T)
    start = min(max(0, position + 1 - WINDOW), max(0, length - WINDOW))
    part = slice(start, min(length, start + WINDOW))
    ids, labels, lens = inspection.ids_T[part], inspection.labels_V, inspection.lens
    if length > 1:
        yield "surprise", plot_surprise(ids, inspection.surprises_T[part], labels, start)
    if lens is not None:
        lens = Lens(**{name: array_MT[:, part] for name, array_MT in vars(lens).items()})
        yield "lens", plot_lens(ids, lens, labels, start)
    if (weights := inspection.weights_LNTS) is not None:
        yield "attention", plot_attention_overview(weights)
        names = [labels[i] for i in inspection.ids_T]
        for layer, weights_NTS in enumerate(weights):
            yield f"attention-{layer:02}", plot_attention(weights_NTS, names, f"Layer {layer}: attention from the left to below")


def _likeliest(logits_V: np.ndarray, top: int, target_id: int | None = None) -> np.ndarray:
    """Ids of the likeliest tokens, likeliest first, and the target's at the end if it is none of them."""
    ids = top_ids(logits_V, top)
    return ids if target_id is None or target_id in ids else np.append(ids, target_id)


def _colors(ids: np.ndarray, target_id: int | None) -> list[str]:
    return [MARKED if i == target_id else PLAIN for i in ids]


def _title(what: str, labels: Sequence[str], target_id: int | None) -> str:
    return what if target_id is None else f"{what} (orange: the target, {_shown(labels[target_id])})"


def _name_bars(axes: Axes, ids: np.ndarray, labels: Sequence[str]) -> None:
    """The tokens' names along horizontal bars, the first at the top."""
    axes.set_yticks(range(len(ids)), [_shown(labels[i]) for i in ids], parse_math=False)
    axes.set_ylim(len(ids) - 0.4, -0.6)


def _rows(length: int, columns: int) -> list[np.ndarray]:
    """The indices 0 to length - 1, in rows."""
    return np.split(np.arange(length), range(columns, length, columns))


def _causal(weights_TS: np.ndarray) -> np.ndarray:
    """Attention weights with nan, which is not drawn, for the keys after each query."""
    return np.where(np.tri(len(weights_TS), dtype=bool), weights_TS, np.nan)


def _shrunk(weights_TS: np.ndarray, side: int) -> np.ndarray:
    """Attention weights of groups of positions: the mean over a group's queries of what they give to a group of keys."""
    length = len(weights_TS)
    starts = np.arange(side) * length // side
    return np.add.reduceat(np.add.reduceat(weights_TS, starts, 0), starts, 1) / np.diff(starts, append=length)[:, None]


def _shown(label: str, longest: int = 16) -> str:
    """A label as it can be drawn: short, and escaped where the font has no glyph for a character."""
    drawable = _glyphs()
    label = "".join(c if c.isprintable() and ord(c) in drawable else c.encode("unicode_escape").decode() for c in label)
    return label if len(label) <= longest else label[: longest - 1] + "…"


@functools.cache
def _glyphs() -> frozenset[int]:
    """The code points that the font of the pictures has a glyph for."""
    return frozenset(get_font(findfont(FontProperties())).get_charmap())
