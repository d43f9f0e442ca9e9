"""A catalogue of bugs to plant, one line each in the source of either side, and the rung of the ladder that must catch each."""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import sys
from collections.abc import Iterator
from importlib.util import spec_from_file_location
from typing import Any, NamedTuple


class Bug(NamedTuple):
    """A line of source and what it is changed to."""

    name: str
    rung: str
    module: str
    old: str
    new: str
    first: str | None = None
    """The tensor at which the two sides must be seen to diverge first."""

    @property
    def side(self) -> str:
        return self.module.split(".")[0]


@contextlib.contextmanager
def planted(bug: Bug) -> Iterator[Any]:
    """The bug's side, imported afresh from sources with that one line changed."""
    saved = {name: module for name, module in sys.modules.items() if name.split(".")[0] == bug.side and name not in _KEPT}
    finder = _Finder(bug, saved[bug.module].__file__)
    for name in saved:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        side = importlib.import_module(_SIDES[bug.side])
        yield side if bug.side == "flaxgpt" else side.TorchSide()
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == bug.side and name not in _KEPT]:
            del sys.modules[name]
        sys.modules.update(saved)


_SIDES = {"flaxgpt": "flaxgpt.parity.flax_side", "torch_ref": "torch_ref.parity.torch_side"}

_KEPT = ("flaxgpt.config", "flaxgpt.errors")
"""The modules whose classes a problem is made of: both sides, and the ladder, must mean the same ones."""


class _Finder:
    """Finds the module of the bug before anybody else does."""

    def __init__(self, bug: Bug, path: str) -> None:
        self.bug, self.path = bug, path

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return spec_from_file_location(name, self.path, loader=_Loader(self.bug, self.path)) if name == self.bug.module else None


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, bug: Bug, path: str) -> None:
        super().__init__(bug.module, path)
        self.bug = bug

    def get_code(self, name: str) -> Any:
        source = self.get_source(name)
        assert source.count(self.bug.old) == 1, (
            f"{self.bug.module} has changed: adapt the bug {self.bug.name!r}, its line is not there once"
        )
        return compile(source.replace(self.bug.old, self.bug.new), self.path, "exec")


_FLAX, _TORCH = "flaxgpt.model", "torch_ref.model"
_LAYERS, _TORCH_LAYERS = "flaxgpt.layers", "torch_ref.layers"
_OPTIM, _TORCH_OPTIM, _STEP, _TORCH_STEP = "flaxgpt.optim", "torch_ref.optim", "flaxgpt.step", "torch_ref.step"
_CAUSAL = "jnp.tril(jnp.ones((T, T), bool))"
_PROJECTION = "return self.out_proj(context_BTNH.reshape(B, T, D))"
_OTHER_PROJECTION = """x_BTD = context_BTNH.reshape(B, T, D)
        return 0 * self.out_proj(x_BTD) + x_BTD @ self.out_proj.weight + self.out_proj.bias"""
_CHAIN = "return optax.chain(clip, adamw)"
_L2 = """adam = optax.adam(make_schedule(cfg), cfg.beta1, cfg.beta2, cfg.eps)
    return optax.chain(clip, optax.chain(optax.add_decayed_weights(cfg.weight_decay, decay_mask), *[adam]))"""
_UNCORRECTED = """def late(grads, state, params):
        return adamw.update(grads, (state[0]._replace(count=state[0].count + 10**6), *state[1:]), params)

    return optax.chain(clip, optax.GradientTransformation(adamw.init, late))"""
_CLIP = "return torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm or math.inf).item()"
_CLIP_VALUE = """norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
    torch.nn.utils.clip_grad_value_(model.parameters(), cfg.clip_norm)
    return norm"""
_RATE = "rate = make_schedule(cfg)(step)"
_BLOCK = "out_BTD = self.att(self.norm1(x_BTD), use_cache)"
_INTERVENTIONS, _TORCH_INTERVENTIONS = "flaxgpt.interventions", "torch_ref.interventions"
_SHORTCUT = """x_BTD = self.shortcut1(x_BTD + self.drop_shortcut1(out_BTD, rows_B))
        out_BTD = self.ff(self.norm2(x_BTD))"""
_UNREAD = """before_BTD = x_BTD + self.drop_shortcut1(out_BTD, rows_B)
        x_BTD, out_BTD = self.shortcut1(before_BTD), self.ff(self.norm2(before_BTD))"""
_TORCH_SHORTCUT = """x_BTD = self.shortcut1(x_BTD + self.drop_shortcut1(out_BTD))
        out_BTD = self.ff(self.norm2(x_BTD))"""
_TORCH_UNREAD = """before_BTD = x_BTD + self.drop_shortcut1(out_BTD)
        x_BTD, out_BTD = self.shortcut1(before_BTD), self.ff(self.norm2(before_BTD))"""
_ABOVE = "logits_BV < kth_B1"
_ABOVE_TORCH = "logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)"
_TOP_K = "processors.keep_top_k(logits_BV, self.top_k)"
_TOP_K_BEFORE = """jnp.where(
                logits_BV < jax.lax.top_k(logits_BV * numbers["temperature"], min(self.top_k, 20))[0][:, -1:], -jnp.inf, logits_BV
            )"""


BUGS = (
    Bug("layer norm with eps 1e-6", "activations", _LAYERS, "variance + 1e-5", "variance + 1e-6", "trf_blocks.0.norm1.out"),
    Bug("layer norm with eps 1e-6", "activations", _TORCH_LAYERS, "variance + 1e-5", "variance + 1e-6", "trf_blocks.0.norm1.out"),
    Bug(
        "unbiased variance",
        "activations",
        _LAYERS,
        "x_wide.var(-1, keepdims=True)",
        "x_wide.var(-1, keepdims=True, ddof=1)",
        "trf_blocks.0.norm1.out",
    ),
    Bug("unbiased variance", "activations", _TORCH_LAYERS, "unbiased=False", "unbiased=True", "trf_blocks.0.norm1.out"),
    Bug("erf GELU", "activations", _FLAX, 'approximate=self.cfg.activation == "gelu_tanh"', "approximate=False", "trf_blocks.0.ff.hidden"),
    Bug(
        "erf GELU",
        "activations",
        _TORCH_LAYERS,
        "return 0.5 * x * (1 + torch.tanh(",
        "return nn.functional.gelu(x) + 0 * (torch.tanh(",
        "trf_blocks.0.ff.hidden",
    ),
    Bug("no 1/sqrt(head size)", "activations", _FLAX, " / H**0.5", "", "trf_blocks.0.att.weights"),
    Bug("no 1/sqrt(head size)", "activations", _TORCH, " / H**0.5", "", "trf_blocks.0.att.weights"),
    Bug("scores scaled by D, not H", "activations", _FLAX, " / H**0.5", " / D**0.5"),
    Bug("scores scaled by D, not H", "activations", _TORCH, " / H**0.5", " / D**0.5"),
    Bug(
        "heads split in the wrong order",
        "activations",
        _FLAX,
        ".reshape(B, T, N, H).swapaxes(1, 2)",
        ".reshape(B, T, H, N).transpose(0, 3, 1, 2)",
    ),
    Bug(
        "heads split in the wrong order",
        "activations",
        _TORCH,
        ".view(B, T, N, H).transpose(1, 2)",
        ".view(B, T, H, N).permute(0, 3, 1, 2)",
    ),
    Bug(
        "transposed output projection",
        "activations",
        "flaxgpt.convert.names",
        '"trf_blocks.{}.att.out_proj.weight", "DE"',
        '"trf_blocks.{}.att.out_proj.weight", "ED"',
    ),
    Bug("transposed output projection", "activations", _TORCH, _PROJECTION, _OTHER_PROJECTION, "trf_blocks.0.att.out"),
    Bug("attention that is not causal", "activations", _FLAX, _CAUSAL, "jnp.ones((T, T), bool)", "trf_blocks.0.att.weights"),
    Bug(
        "attention that is not causal",
        "activations",
        _TORCH,
        "self.mask.bool()[S - T : S, :S]",
        "torch.zeros(T, S).bool()",
        "trf_blocks.0.att.weights",
    ),
    Bug("causal mask off by one", "activations", _FLAX, _CAUSAL, "jnp.tril(jnp.ones((T, T), bool), k=1)", "trf_blocks.0.att.weights"),
    Bug("causal mask off by one", "activations", _TORCH, "diagonal=1)", "diagonal=2)", "trf_blocks.0.att.weights"),
    Bug(
        "positions off by one",
        "activations",
        _FLAX,
        "self.embed(tokens_BT, jnp.arange(T),",
        "self.embed(tokens_BT, jnp.arange(1, T + 1) % T,",
        "embedding",
    ),
    Bug(
        "positions off by one",
        "activations",
        _TORCH,
        "torch.arange(first, S, device=tokens_BT.device)",
        "torch.arange(1, S + 1) % S",
        "embedding",
    ),
    Bug("head tied when it should not be", "activations", _FLAX, "if self.cfg.tie_embeddings else self", "if True else self"),
    Bug("head tied when it should not be", "activations", _TORCH, "if cfg.tie_embeddings:", "if True:"),
    Bug("loss a mean over the wrong count", "loss", "flaxgpt.loss", ").mean()", ").sum() / (targets_BT.size - 1)"),
    Bug(
        "loss a mean over the wrong count",
        "loss",
        "torch_ref.loss",
        "targets_BT.flatten())",
        "targets_BT.flatten()) * targets_BT.numel() / (targets_BT.numel() - 1)",
    ),
    Bug(
        "half the gradient of the queries",
        "gradients",
        _FLAX,
        "q_BNTH, k_BNSH, preferred",
        "(q_BNTH + jax.lax.stop_gradient(q_BNTH)) / 2, k_BNSH, preferred",
    ),
    Bug("half the gradient of the queries", "gradients", _TORCH, "q_BNTH @", "(q_BNTH + q_BNTH.detach()) / 2 @"),
    Bug("clipping by value", "clipping", _OPTIM, "lambda g: g * scale.astype(g.dtype)", "lambda g: jnp.clip(g, -limit, limit)"),
    Bug("clipping by value", "clipping", _TORCH_OPTIM, _CLIP, _CLIP_VALUE),
    Bug("decay applied to nothing", "adamw", _OPTIM, "weight_decay=cfg.weight_decay", "weight_decay=0.0"),
    Bug("decay applied to nothing", "adamw", _TORCH_OPTIM, '"weight_decay": cfg.weight_decay}', '"weight_decay": 0.0}'),
    Bug("decay coupled (L2)", "adamw", _OPTIM, _CHAIN, _L2),
    Bug("decay coupled (L2)", "adamw", _TORCH_OPTIM, "return torch.optim.AdamW(", "return torch.optim.Adam("),
    Bug("decay of biases and norms too", "adamw", _OPTIM, 'path[-1].key in ("kernel", "embedding")', "True"),
    Bug("decay of biases and norms too", "adamw", _TORCH_OPTIM, "parameter.ndim >= 2", "True"),
    Bug("eps inside the square root", "adamw", _OPTIM, "cfg.beta2, cfg.eps, weight_decay", "cfg.beta2, 0.0, cfg.eps, weight_decay"),
    Bug("no bias correction", "adamw", _OPTIM, _CHAIN, _UNCORRECTED),
    Bug("schedule off by one", "adamw", _OPTIM, "schedule(1.0 * step)", "schedule(1.0 * step + 1)"),
    Bug("schedule off by one", "adamw", _TORCH_OPTIM, _RATE, _RATE.replace("(step)", "(step + 1)")),
    Bug("microbatches summed, not averaged", "accumulation", _STEP, "x / grad_accum_steps, total", "x, total"),
    Bug("microbatches summed, not averaged", "accumulation", _TORCH_STEP, "(len(inputs) / len(inputs_BT),", "(1.0,"),
    Bug("gradients of the last update kept", "training", _TORCH_STEP, "    optimizer.zero_grad()\n", ""),
    Bug("dropout without rescaling", "dropout", _LAYERS, "x / (1 - self.rate)", "x"),
    Bug(
        "dropout without rescaling",
        "dropout",
        _TORCH,
        "self.drop_emb(x_BTD)",
        "self.drop_emb(x_BTD) * (1 - self.training * self.cfg.drop_rate)",
    ),
    Bug("dropout mask reused across layers", "dropout", _FLAX, '"dropout": True}', '"dropout": False}'),
    Bug("dropout mask reused across layers", "dropout", _TORCH, _BLOCK, f"torch.manual_seed(0)\n        {_BLOCK}"),
    Bug("top-k that drops ties", "generation", "flaxgpt.generation.processors", _ABOVE, "jnp.argsort(jnp.argsort(-logits_BV)) >= top_k"),
    Bug(
        "top-k that drops ties",
        "generation",
        "torch_ref.generation.sampling",
        _ABOVE_TORCH,
        "torch.where((-logits_BV).argsort().argsort() < sampling.top_k, logits_BV, -torch.inf)",
    ),
    Bug("temperature applied after the mask's threshold", "generation", "flaxgpt.generation.sampling", _TOP_K, _TOP_K_BEFORE),
    Bug(
        "temperature applied after the mask's threshold",
        "generation",
        "torch_ref.generation.sampling",
        "torch.topk(logits_BV,",
        "torch.topk(logits_BV * sampling.temperature,",
    ),
    Bug("edit at the wrong position", "edits", _INTERVENTIONS, "hit = (positions[..., None] ==", "hit = (1 + positions[..., None] =="),
    Bug("edit at the wrong position", "edits", _TORCH_INTERVENTIONS, "torch.isin(positions,", "torch.isin(1 + positions,"),
    Bug("edit of the wrong head", "edits", _INTERVENTIONS, "(jnp.arange(cfg.n_heads)", "(1 + jnp.arange(cfg.n_heads)"),
    Bug("edit of the wrong head", "edits", _TORCH_INTERVENTIONS, "torch.arange(cfg.n_heads)", "1 + torch.arange(cfg.n_heads)"),
    Bug("edit of later layers too", "edits", _INTERVENTIONS, "cond(layer == int(", "cond(layer >= int(", "edited/trf_blocks.1.norm1.out"),
    Bug("edit applied after it was read", "edits", _INTERVENTIONS, "in visitors:", "in reversed(visitors):", "edited/embedding"),
    Bug(
        "edit applied after it was read",
        "edits",
        _TORCH_INTERVENTIONS,
        "register_forward_hook(after)",
        "register_forward_hook(after, prepend=True)",
        "edited/embedding",
    ),
    Bug("edit that one of two readers sees", "edits", _FLAX, _SHORTCUT, _UNREAD, "edited/trf_blocks.0.norm2.out"),
    Bug("edit that one of two readers sees", "edits", _TORCH, _TORCH_SHORTCUT, _TORCH_UNREAD, "edited/trf_blocks.0.norm2.out"),
    Bug("hook left behind", "edits", _TORCH_INTERVENTIONS, "site, third)).remove)", "site, third)).id.bit_length)", "after/embedding"),
)
"""Each is planted alone. A bug inside torch.optim has no line here to change, so only flaxgpt has it; it has no hooks to leave behind."""
