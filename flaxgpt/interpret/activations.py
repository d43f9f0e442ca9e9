"""The activations of a forward pass, by the names of their sites."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from flaxgpt.config import GPTConfig
from flaxgpt.convert.names import module_path
from flaxgpt.edits import Edits, checked_edits
from flaxgpt.interventions import editing, layer_numbers, tapping, visiting
from flaxgpt.model import GPT
from flaxgpt.sites import sites_meant
from flaxgpt.types import Params


def activations(
    params: Params, cfg: GPTConfig, tokens_BT: jax.Array, names: Sequence[str], *, edits: Edits | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The logits of `flaxgpt.forward`, and activations beside them: a pure function as well.

    Args:
        params: as `init_params` makes them.
        cfg: the model.
        tokens_BT: token ids.
        names: of sites (`flaxgpt.sites`); "trf_blocks.{}.shortcut2" is that of every block, stacked along a leading L axis.
        edits: as `forward` takes them; activations are those after the edits.

    Returns:
        logits_BTV; and by the names asked for, the activations, in the dtype that they are computed in.

    Raises:
        InputError: there is no such site, or an edit makes no sense.
    """
    meant = {name: sites_meant(name, cfg.n_layers) for name in names}
    points = {name: module_path(found[0].point) for name, found in meant.items()}
    edits = checked_edits(edits or {}, cfg, tokens_BT.shape[1])
    with visiting(*editing(edits, cfg, jnp.arange(tokens_BT.shape[1])), tapping(set(points.values()))):
        logits_BTV, state = GPT(cfg).apply({"params": params, **layer_numbers(edits, cfg)}, tokens_BT, mutable=["taps"])
    taken = {}
    for name, point in points.items():
        x = state["taps"]
        for part in point.split("/"):
            x = x[part]
        layer = name.split(".")[1] if name.startswith("trf_blocks.") else "{}"
        taken[name] = x if layer == "{}" else x[int(layer)]
    return logits_BTV, taken
