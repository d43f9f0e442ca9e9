"""The page of an inspection: one HTML file to be explored in a browser, which needs nothing else (see page.html)."""

from __future__ import annotations

import base64
import importlib.resources
import json
from pathlib import Path

import numpy as np

from flaxgpt.errors import InputError
from flaxgpt.interpret.inspection import Inspection, Lens
from flaxgpt.interpret.scores import top_ids
from flaxgpt.run.folder import write_text

LARGEST = 32_000_000
"""Bytes; a browser opens such a page within a few seconds."""


def save_page(inspection: Inspection, path: Path, *, title: str, top: int = 10) -> None:
    """Write the page, whole or not at all.

    Numbers are rounded to 4 decimals, and attention weights to multiples of 1/255.

    Args:
        inspection: what it shows; without a lens or attention weights it lacks those parts.
        path: where to write it.
        title: plain text, above the page.
        top: the likeliest tokens to show for each position.

    Raises:
        InputError: the page would be larger than LARGEST.
    """
    text, lens, weights_LNTS = _text(inspection, top), _lens(inspection.lens), inspection.weights_LNTS
    named = np.unique(np.concatenate([np.ravel(ids) for ids in (text["ids"], text["topIds"], lens["topIds"] if lens else [])]).astype(int))
    parts = {"text": _json(text), "lens": _json(lens), "labels": _json({i: inspection.labels_V[i] for i in named.tolist()})}
    sizes = {name: len(part) for name, part in parts.items()} | {"attention": 0 if weights_LNTS is None else _attention_size(weights_LNTS)}
    if (size := sum(sizes.values())) > LARGEST:
        largest = max(sizes, key=sizes.__getitem__)
        raise InputError(
            f"the page would have {size / 1e6:.0f} MB, and {sizes[largest] / 1e6:.0f} of them would be {largest}; expected at most "
            f"{LARGEST / 1e6:.0f}: shorten the text" + (f", or leave out {largest}" if largest in ("lens", "attention") else "")
        )
    parts |= {"title": _json(title), "vocabulary": _json(len(inspection.labels_V)), "attention": _json(_attention(weights_LNTS))}
    data = ",".join(f'"{name}":{part}' for name, part in parts.items())
    template = importlib.resources.files("flaxgpt.interpret").joinpath("page.html").read_text(encoding="utf-8")
    write_text(path, template.replace("{{data}}", f"{{{data}}}", 1))


def _text(inspection: Inspection, top: int) -> dict[str, list]:
    """What page.html calls `text`: lists over positions."""
    top_ids_TK = np.stack([top_ids(logits_V, top) for logits_V in inspection.logits_TV])
    top_logits_TK = np.take_along_axis(inspection.logits_TV, top_ids_TK, 1)
    next_logits_T = [*inspection.logits_TV[range(len(inspection.ids_T) - 1), inspection.ids_T[1:]], np.nan]
    return {
        "ids": inspection.ids_T.tolist(),
        "surprises": _numbers(inspection.surprises_T),
        "entropies": _numbers(inspection.entropies_T),
        "topIds": top_ids_TK.tolist(),
        "topRanks": (1 + (top_logits_TK[:, None] > top_logits_TK[..., None]).sum(-1)).tolist(),
        "topLogits": _numbers(top_logits_TK),
        "topLogProbs": _numbers(np.take_along_axis(inspection.log_probs_TV, top_ids_TK, 1)),
        "nextLogits": _numbers(np.array(next_logits_T)),
        "nextLogProbs": _numbers(inspection.next_log_probs_T),
        "nextRanks": inspection.next_ranks_T.tolist(),
    }


def _lens(lens: Lens | None) -> dict[str, list] | None:
    """What page.html calls `lens`: lists over layers and positions."""
    if lens is None:
        return None
    return {
        "topIds": lens.top_ids_MTK.tolist(),
        "topLogProbs": _numbers(lens.top_log_probs_MTK),
        "nextLogProbs": _numbers(lens.next_log_probs_MT),
        "nextRanks": lens.next_ranks_MT.tolist(),
    }


def _attention(weights_LNTS: np.ndarray | None) -> dict[str, object] | None:
    """What page.html calls `attention`: for each layer, head and query the weights of the keys up to it, a byte each."""
    if weights_LNTS is None:
        return None
    layers, heads, length, _ = weights_LNTS.shape
    rows, columns = np.tril_indices(length)
    weights = np.rint(weights_LNTS[:, :, rows, columns] * 255).astype(np.uint8)
    return {"layers": layers, "heads": heads, "bytes": base64.b64encode(weights.tobytes()).decode("ascii")}


def _attention_size(weights_LNTS: np.ndarray) -> int:
    layers, heads, length, _ = weights_LNTS.shape
    return layers * heads * length * (length + 1) // 2 * 4 // 3


def _numbers(array: np.ndarray) -> list:
    """Nested lists, with null for nan."""
    numbers = np.round(array.astype(np.float64), 4).astype(object)
    numbers[np.isnan(array)] = None
    return numbers.tolist()


def _json(value: object) -> str:
    """JSON that can stand in a script element: ASCII, and without <, so nothing in it ends the element or begins a comment."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", r"\u003c")
