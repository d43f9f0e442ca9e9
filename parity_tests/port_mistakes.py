"""A catalogue of mistakes to plant in the ports of `port_examples`, one line of source or one row of the table of names each."""

from __future__ import annotations

import functools
import types
from pathlib import Path
from typing import NamedTuple

import gpt2
import gpt2_pair
import llama
import llama_pair

from flaxgpt.port.pair import Pair

PAIRS = {"llama": (llama, llama_pair), "gpt2": (gpt2, gpt2_pair)}


class Mistake(NamedTuple):
    """What is changed, where it must be found, and what the diagnosis must say."""

    name: str
    port: str
    first: str
    """The first tensor of the forward pass that parts; or of the backward pass, after "backward/" or "gradients/"."""
    says: str
    """What stands in the diagnosis: the cause, where it is one of the usual suspects, and else how the difference looks."""
    old: str = ""
    new: str = ""
    names: dict[str, object] = {}  # noqa: RUF012 - read only
    """Rows of the table of names that are other than they should be."""

    @property
    def suspect(self) -> bool:
        """Whether the diagnosis must name a cause."""
        return " in the port" in self.says

    @property
    def backward(self) -> bool:
        """Whether all outputs are right."""
        return self.first.startswith(("backward/", "gradients/"))

    def planted(self, **sizes: int) -> Pair:
        """The pair, with the mistake in the port or in the table."""
        module, pair = PAIRS[self.port]
        return pair.make_pair(changed(module, (self.old, self.new)) if self.old else module, pair.NAMES | self.names, **sizes)


@functools.cache
def changed(module: types.ModuleType, *changes: tuple[str, str]) -> types.ModuleType:
    """The module, from a source in which each old text is a new one."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    for old, new in changes:
        assert source.count(old) == 1, f"{module.__name__} has changed: adapt the mistake, {old!r} is not there once"
        source = source.replace(old, new)
    other = types.ModuleType(module.__name__)
    exec(compile(source, module.__file__, "exec"), other.__dict__)
    return other


_L, _G = "model.layers.0.", "transformer.h.0."
_ATTENTION = 'x_BTD + Attention(self.cfg, name="attention")(RMSNorm(self.cfg.eps, name="norm1")(x_BTD), keep_BT)'
_AFTER = 'x_BTD + RMSNorm(self.cfg.eps, name="norm1")(Attention(self.cfg, name="attention")(x_BTD, keep_BT))'
_NORMED = '(h := RMSNorm(self.cfg.eps, name="norm1")(x_BTD)) + Attention(self.cfg, name="attention")(h, keep_BT)'
_PAIRS = """a, b = x_BTNH[..., ::2], x_BTNH[..., 1::2]
    return jnp.stack([a * cos_TH - b * sin_TH, b * cos_TH + a * sin_TH], axis=-1).reshape(x_BTNH.shape)"""
_HALVES = """a, b = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([a * cos_TH - b * sin_TH, b * cos_TH + a * sin_TH], axis=-1)"""
_DOWN = 'nn.Dense(x_BTD.shape[-1], use_bias=False, name="down")'
_CUT = "dot_general=lambda x, w, *a, **k: jax.lax.dot_general(*(jax.lax.reduce_precision(y, 8, {}) for y in (x, w)), *a, **k)"
_UP = 'nn.Dense(self.cfg.F, use_bias=False, name="up"'
_HEAD = 'nn.Dense(self.cfg.V, use_bias=False, name="head")(x_BTD)'
_TIED = '0 * nn.Dense(self.cfg.V, use_bias=False, name="head")(x_BTD) + x_BTD @ self.variables["params"]["embed"]["embedding"].T'
_SPLIT = "(x.reshape(B, T, self.N, -1) for x in jnp.split(self.qkv(x_BTD), 3, axis=-1))"
_BY_HEAD = "jnp.split(self.qkv(x_BTD).reshape(B, T, self.N, -1), 3, axis=-1)"

MISTAKES = (
    Mistake(
        "eps 1e-6",
        "llama",
        f"{_L}input_layernorm",
        "eps: 1e-06 in the port, 1e-05 in the reference",
        "variance + self.eps",
        "variance + 1e-6",
    ),
    Mistake(
        "unbiased variance",
        "llama",
        f"{_L}input_layernorm",
        "variance: unbiased in the port, biased in the reference",
        "(wide * wide).mean(-1, keepdims=True)",
        "(wide * wide).sum(-1, keepdims=True) / (wide.shape[-1] - 1)",
    ),
    Mistake(
        "norm that takes the mean away",
        "llama",
        f"{_L}input_layernorm",
        "norm: layer norm in the port, RMS norm in the reference",
        "variance = (wide",
        "wide -= wide.mean(-1, keepdims=True)\n        variance = (wide",
    ),
    Mistake(
        "weight of the norm plus one",
        "llama",
        f"{_L}input_layernorm",
        "weight: times 1 + weight in the port, times weight in the reference",
        "return weight *",
        "return (1 + weight) *",
    ),
    Mistake(
        "forgotten scale of the norm",
        "llama",
        f"{_L}input_layernorm",
        "weight: forgotten in the port, times weight in the reference",
        "return weight *",
        "return 1 *",
    ),
    Mistake(
        "forgotten bias",
        "llama",
        f"{_L}self_attn.o_proj",
        "bias: forgotten in the port, added in the reference",
        'nn.Dense(D, name="out")',
        'nn.Dense(D, name="out", promote_dtype=lambda x, w, b, dtype: (x, w, None))',
    ),
    Mistake(
        "transposed weight",
        "llama",
        f"{_L}self_attn.q_proj",
        "product: x W in the port, x W^T in the reference",
        names={"model.layers.{}.self_attn.q_proj.weight": ("block{}.attention.query.kernel", "i o -> i o")},
    ),
    Mistake(
        "keys and values exchanged in the table",
        "llama",
        f"{_L}self_attn.k_proj",
        "weight: model.layers.0.self_attn.v_proj.weight in the port, its own in the reference",
        names={
            "model.layers.{}.self_attn.k_proj.weight": "block{}.attention.value.kernel",
            "model.layers.{}.self_attn.v_proj.weight": "block{}.attention.key.kernel",
        },
    ),
    Mistake(
        "products in TF32",
        "llama",
        f"{_L}mlp.up_proj",
        "precision: TF32 or float16 in the port, exact in the reference",
        _UP,
        f"{_UP}, {_CUT.format(10)}",
    ),
    Mistake(
        "products in bfloat16",
        "llama",
        f"{_L}mlp.up_proj",
        "precision: bfloat16 in the port, exact in the reference",
        _UP,
        f"{_UP}, {_CUT.format(7)}",
    ),
    Mistake(
        "GELU for SiLU", "llama", f"{_L}mlp.down_proj", "activation: GELU (tanh) in the port, SiLU in the reference", "nn.silu(", "nn.gelu("
    ),
    Mistake(
        "the other half of the gate",
        "llama",
        f"{_L}mlp.down_proj",
        "of: the last times the first in the port, the first times the last in the reference",
        "nn.silu(gate_BTF) * up_BTF",
        "gate_BTF * nn.silu(up_BTF)",
    ),
    Mistake("no 1/sqrt(head size)", "llama", f"{_L}self_attn.o_proj", "scale: 1 in the port, 1/sqrt(H) in the reference", " / H**0.5", ""),
    Mistake(
        "scores scaled by D, not H",
        "llama",
        f"{_L}self_attn.o_proj",
        "scale: 1/sqrt(D) in the port, 1/sqrt(H) in the reference",
        " / H**0.5",
        " / D**0.5",
    ),
    Mistake(
        "heads interleaved",
        "llama",
        f"{_L}self_attn.o_proj",
        "(H, N) in place of (N, H): queries in the port, nowhere in the reference",
        "reshape(B, T, cfg.N, H)",
        "reshape(B, T, H, cfg.N).swapaxes(2, 3)",
    ),
    Mistake(
        "grouped heads tiled",
        "llama",
        f"{_L}self_attn.o_proj",
        "grouped heads: tiled in the port, repeated in the reference",
        "jnp.repeat(x, cfg.N // cfg.K, axis=2)",
        "jnp.tile(x, (1, 1, cfg.N // cfg.K, 1))",
    ),
    Mistake(
        "causal mask off by one",
        "llama",
        f"{_L}self_attn.o_proj",
        "mask: causal and the next key in the port, causal in the reference",
        "bool)) &",
        "bool), 1) &",
    ),
    Mistake(
        "own position masked",
        "llama",
        f"{_L}self_attn.o_proj",
        "mask: causal without the own position in the port, causal in the reference",
        "bool)) &",
        "bool), -1) &",
    ),
    Mistake(
        "attention that is not causal",
        "llama",
        f"{_L}self_attn.o_proj",
        "mask: none in the port, causal in the reference",
        "jnp.tril(",
        "(",
    ),
    Mistake(
        "padding that is looked at",
        "llama",
        f"{_L}self_attn.o_proj",
        "padding: seen in the port, not seen in the reference",
        " & keep_BT[:, None, None, :].astype(bool)",
        "",
    ),
    Mistake(
        "rotary in pairs",
        "llama",
        f"{_L}self_attn.o_proj",
        "rotary: pairs with base 10000 in the port, halves with base 10000 in the reference",
        _HALVES,
        _PAIRS,
    ),
    Mistake(
        "rotary base",
        "llama",
        f"{_L}self_attn.o_proj",
        "rotary: halves with base 500000 in the port, halves with base 10000 in the reference",
        "10000.0",
        "500000.0",
    ),
    Mistake(
        "rotary backwards",
        "llama",
        f"{_L}self_attn.o_proj",
        "rotary: halves backwards with base 10000 in the port, halves with base 10000 in the reference",
        "np.outer(np",
        "-np.outer(np",
    ),
    Mistake(
        "keys that are not turned",
        "llama",
        f"{_L}self_attn.o_proj",
        "rotary turns: queries in the port, queries and keys in the reference",
        "k_BSKH = rotate(k_BSKH, cfg.rope_base)",
        "",
    ),
    Mistake(
        "keys one position further",
        "llama",
        f"{_L}self_attn.o_proj",
        "positions: one more for keys in the port, the same in the reference",
        "k_BSKH = rotate(k_BSKH, cfg.rope_base)",
        "k_BSKH = rotate(jnp.pad(k_BSKH, ((0, 0), (1, 0), (0, 0), (0, 0))), cfg.rope_base)[:, 1:]",
    ),
    Mistake("norm after attention", "llama", f"{_L}input_layernorm", f"sum of: {_L}self_attn in the port", _ATTENTION, _AFTER),
    Mistake(
        "shortcut taken after the norm",
        "llama",
        f"{_L}post_attention_layernorm",
        f"sum of: {_L}input_layernorm + {_L}self_attn in the port",
        _ATTENTION,
        _NORMED,
    ),
    Mistake(
        "embedding scaled",
        "llama",
        f"{_L}input_layernorm",
        "times: sqrt(32) in the port, 1 in the reference",
        'name="embed")(input_ids)',
        'name="embed")(input_ids) * self.cfg.D**0.5',
    ),
    Mistake(
        "tied head", "llama", "<output>", "weight: model.embed_tokens.weight in the port, lm_head.weight in the reference", _HEAD, _TIED
    ),
    Mistake(
        "layer norm with eps 1e-6",
        "gpt2",
        f"{_G}ln_1",
        "eps: 1e-06 in the port, 1e-05 in the reference",
        "norm1 = nnx.LayerNorm(D, epsilon=1e-5,",
        "norm1 = nnx.LayerNorm(D,",
    ),
    Mistake(
        "exact GELU",
        "gpt2",
        f"{_G}mlp.c_proj",
        "activation: GELU (exact) in the port, GELU (tanh) in the reference",
        "approximate=True",
        "approximate=False",
    ),
    Mistake(
        "positions off by one",
        "gpt2",
        "transformer.wpe",
        "ids: one more in the port, as given in the reference",
        "jnp.arange(input_ids.shape[1])",
        "1 + jnp.arange(input_ids.shape[1])",
    ),
    Mistake(
        "fused weights split by heads",
        "gpt2",
        f"{_G}attn.c_proj",
        "fused weights are split: (N, 3, H) in the port, (3, N, H) in the reference",
        _SPLIT,
        _BY_HEAD,
    ),
    Mistake(
        "fused weights in another order",
        "gpt2",
        f"{_G}attn.c_proj",
        "q k v are taken as: k q v in the port, q k v in the reference",
        "q_BTNH, k_BSNH, v_BSNH = (",
        "k_BSNH, q_BTNH, v_BSNH = (",
    ),
    # not on the list of suspects: how the difference looks
    Mistake(
        "inputs rounded to bfloat16",
        "llama",
        f"{_L}mlp.gate_proj",
        "precision: bfloat16 inputs in the port, exact in the reference",
        'name="gate")(x_BTD',
        'name="gate")(x_BTD.astype(jnp.bfloat16)',
    ),
    Mistake(
        "half of a value's gradient",
        "llama",
        "backward/model.layers.1.self_attn.v_proj",
        "the port is 0.5 times the reference",
        "q_BTNH = rotate(q_BTNH",
        "v_BSKH = (v_BSKH + jax.lax.stop_gradient(v_BSKH)) / 2\n        q_BTNH = rotate(q_BTNH",
    ),
    Mistake(
        "gradient stopped at the gate",
        "llama",
        "backward/model.layers.1.mlp.gate_proj",
        "the gradient stops here",
        "nn.silu(gate_BTF)",
        "nn.silu(jax.lax.stop_gradient(gate_BTF))",
    ),
    Mistake(
        "frozen weight of the norm",
        "llama",
        "gradients/model.layers.0.input_layernorm.weight",
        "the gradient stops here",
        "return weight *",
        "return jax.lax.stop_gradient(weight) *",
    ),
    Mistake(
        "scores capped",
        "llama",
        f"{_L}self_attn.o_proj",
        "none of the usual suspects explains it",
        " / H**0.5",
        " / H**0.5; scores_BNTS = 5 * jnp.tanh(scores_BNTS / 5)",
    ),
    Mistake(
        "last position left out of the MLP",
        "llama",
        f"{_L}mlp.gate_proj",
        "only in position 11 (of 12); there the port is zero",
        'name="gate")(x_BTD',
        'name="gate")(x_BTD.at[:, -1].set(0)',
    ),
)
"""Each is planted alone."""

STORY = ("eps 1e-6", "grouped heads tiled", "rotary in pairs", "GELU for SiLU")
"""The mistakes of docs/port.md: all are in the first draft, and one check after the other finds them."""


def draft(*left: str) -> Pair:
    """The Llama with the mistakes of those names."""
    return llama_pair.make_pair(changed(llama, *((mistake.old, mistake.new) for mistake in MISTAKES if mistake.name in left)))
