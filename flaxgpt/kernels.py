"""What is computed otherwise than the plain code says, with the same numbers: attention without weights_BNTS, the loss without logits_BTV.

What a model uses where is chosen by pure functions: `choose_attention`, `choose_loss_chunk`, and for its layers `choose_unroll`. With a
mesh in context (`jax.set_mesh`), rows are split over its axis "fsdp", heads and vocabulary over "tensor".
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from flaxgpt.config import GPTConfig
from flaxgpt.errors import InputError
from flaxgpt.layers import project, wide
from flaxgpt.sharding import constrained, placed, ways

LOSS_TOKENS = 2048
"""Tokens whose logits are held at a time, if nothing else is asked for: 0.4 GB of them at GPT-2's vocabulary."""

WRITTEN_OUT = 8
"""On a CPU, models of at most so many layers have them written out: see `choose_unroll`."""


class Choice(NamedTuple):
    """Which attention is computed, and why."""

    implementation: Literal["plain", "cudnn", "splash"]
    reason: str


def choose_attention(cfg: GPTConfig, length: int, platform: str, *, dropout: bool = False) -> Choice:
    """The attention that `cfg.attention` stands for, over whole rows without a cache.

    Args:
        cfg: the model.
        length: T, tokens of a row.
        platform: "cpu", "gpu" (or "cuda") or "tpu".
        dropout: whether the attention weights are dropped out.

    Raises:
        InputError: a fused one is asked for, and impossible.
    """
    if cfg.attention == "plain":
        return Choice("plain", "asked for")
    obstacle = _obstacle(cfg, length, platform, dropout)
    if obstacle and cfg.attention == "fused":
        raise InputError(f"attention=fused is impossible: {obstacle}; pass --attention auto or plain")
    if obstacle:
        return Choice("plain", obstacle)
    return Choice("splash" if platform == "tpu" else "cudnn", "asked for" if cfg.attention == "fused" else "possible here")


def _obstacle(cfg: GPTConfig, length: int, platform: str, dropout: bool) -> str | None:
    """Why no fused attention can be used, if so: what jax.nn.dot_product_attention and splash attention refuse in JAX 0.10."""
    H = cfg.emb_dim // cfg.n_heads
    of_any = [(dropout, "no kernel drops out attention weights (drop_rate above 0)")]
    of_platform = {
        "gpu": [
            (cfg.dtype != "bfloat16", f"cuDNN's attention computes in bfloat16, not {cfg.dtype}"),
            (H % 8 or H > 128, f"cuDNN's attention takes heads of at most 128 and a multiple of 8, not {H}"),
            (length % 2, f"cuDNN's attention takes an even number of tokens, not {length}"),
        ],
        "tpu": [
            (cfg.dtype == "float64", "splash attention computes in float32 at most"),
            (length % 128, f"splash attention takes a multiple of 128 tokens, not {length}"),
        ],
    }
    of_platform["cuda"] = of_platform["gpu"]
    if platform not in of_platform:
        return f"there is no kernel for {platform}"
    return next((reason for applies, reason in of_any + of_platform[platform] if applies), None)


def choose_loss_chunk(cfg: GPTConfig, rows: int, length: int) -> int:
    """How many positions of each row the loss takes at a time, at most `cfg.loss_chunk`; `length` if all.

    `rows` are those of one device. Chunks are of nearly equal size, so that the last one is not mostly padding.
    """
    most = (max(1, LOSS_TOKENS // rows) if cfg.loss_chunk is None else cfg.loss_chunk) or length
    chunks = -(-length // most)
    return -(-length // chunks)


def choose_unroll(cfg: GPTConfig, platform: str) -> int:
    """How many blocks are written out in each turn of the scan over layers: all of a small model's on a CPU, else one.

    Around a scan's turns XLA copies slices of the parameters, activations and gradients. Written out, an update takes 0.8 to 0.9 of
    the time, but its compilation 1.3 times as long for 4 layers and four times for 12 (docs/performance.md).
    """
    return cfg.n_layers if platform == "cpu" and cfg.n_layers <= WRITTEN_OUT else 1


def current_platform() -> str:
    """Of the mesh in context, or of the default backend where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty or mesh.abstract_device is None else mesh.abstract_device.platform


def fused_attention(
    q_BNTH: jax.Array, k_BNTH: jax.Array, v_BNTH: jax.Array, implementation: Literal["cudnn", "splash"], *, interpret: bool = False
) -> jax.Array:
    """Causal attention, context_BNTH, by a kernel that holds only blocks of the attention weights.

    Args:
        q_BNTH: queries.
        k_BNTH: keys.
        v_BNTH: values.
        implementation: what `choose_attention` has chosen.
        interpret: run splash attention in Pallas's interpreter, on any device.
    """
    if implementation == "splash":
        return _splash_attention(q_BNTH, k_BNTH, v_BNTH, interpret)
    q_BTNH, k_BTNH, v_BTNH = (x.swapaxes(1, 2) for x in (q_BNTH, k_BNTH, v_BNTH))
    return jax.nn.dot_product_attention(q_BTNH, k_BTNH, v_BTNH, is_causal=True, implementation="cudnn").swapaxes(1, 2)


def _splash_attention(q_BNTH: jax.Array, k_BNTH: jax.Array, v_BNTH: jax.Array, interpret: bool) -> jax.Array:
    # Imported here, since it brings in all of Pallas.
    from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes, CausalMask, MultiHeadMask, make_splash_mha

    T, H = q_BNTH.shape[2:]
    block = next(size for size in (512, 256, 128) if T % size == 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks = BlockSizes(**{f"block_{name}": block for name in names})

    def attend(q_BNTH: jax.Array, k_BNTH: jax.Array, v_BNTH: jax.Array) -> jax.Array:
        mask = MultiHeadMask([CausalMask((T, T))] * q_BNTH.shape[1])
        kernel = make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret)
        return jax.vmap(kernel)(q_BNTH * H**-0.5, k_BNTH, v_BNTH)

    # XLA can't split a Pallas kernel over devices: each is given its own rows and heads.
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        spec = P(*(axis if ways(axis, size) > 1 else None for axis, size in zip(("fsdp", "tensor"), q_BNTH.shape, strict=False)))
        attend = jax.shard_map(attend, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)
    return attend(q_BNTH, k_BNTH, v_BNTH)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
@jax.named_scope("loss")
def chunked_loss(x_BTD: jax.Array, kernel_DV: jax.Array, targets_BT: jax.Array, vocab_size: int, chunk: int) -> jax.Array:
    """`next_token_loss` of the logits x_BTD @ kernel_DV, of which a chunk is computed at a time, and never all are held.

    Its gradient is computed together with the loss, chunk by chunk, so that no logits are computed twice. Where no gradient is
    asked for, none is computed.

    Args:
        x_BTD: the final norm's output.
        kernel_DV: the head's weights, in any precision; the product is in that of x.
        targets_BT: token ids.
        vocab_size: columns of the kernel that are tokens; the others are padding, and have no probability.
        chunk: positions of each row that are computed at a time.

    Returns:
        (), float32 at least.
    """
    kernel_DV = placed(kernel_DV.astype(x_BTD.dtype), "DV")  # gathered once, before the loop

    def add(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x_BTD, targets_BT = part
        return total + _cross_entropy(padded_logits(x_BTD, kernel_DV, vocab_size), targets_BT)[0], None

    total, _ = jax.lax.scan(add, jnp.zeros((), wide(x_BTD.dtype)), _chunks(x_BTD, targets_BT, chunk))
    return total / targets_BT.size


@jax.named_scope("loss")
def _loss_and_gradients(
    x_BTD: jax.Array, kernel_DV: jax.Array, targets_BT: jax.Array, vocab_size: int, chunk: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    B, T, _ = x_BTD.shape
    gathered_DV = placed(kernel_DV.astype(x_BTD.dtype), "DV")

    def of_rows(x_BTD: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def add(sums: tuple[jax.Array, jax.Array], part: tuple[jax.Array, jax.Array]) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            (total, dkernel_DV), (x_BTD, targets_BT) = sums, part
            loss, dlogits_BTV = _cross_entropy(padded_logits(x_BTD, gathered_DV, vocab_size), targets_BT)
            dlogits_BTV = (dlogits_BTV / (B * T)).astype(x_BTD.dtype)
            dx_BTD = jnp.einsum("BTV,DV->BTD", dlogits_BTV, gathered_DV)
            dkernel_DV += jnp.einsum("BTD,BTV->DV", x_BTD, dlogits_BTV, preferred_element_type=wide(x_BTD.dtype))
            return (total + loss, placed(dkernel_DV, "DV")), dx_BTD

        zero = jnp.zeros((), wide(x_BTD.dtype)), jnp.zeros(kernel_DV.shape, wide(x_BTD.dtype))
        (total, dkernel_DV), dx_CBTD = jax.lax.scan(add, zero, _chunks(x_BTD, targets_BT, chunk))
        dx_BTD = dx_CBTD.swapaxes(0, 1).reshape(x_BTD.shape[0], -1, x_BTD.shape[2])[:, :T]
        return total, dx_BTD, dkernel_DV

    # The rows of each device by themselves: what they add to the kernel's gradient is then added up over devices once, not in each chunk.
    shards = ways("fsdp", B)
    by_shard = [constrained(rows.reshape(shards, -1, *rows.shape[1:]), P("fsdp")) for rows in (x_BTD, targets_BT)]
    total, dx_BTD, dkernel_DV = jax.vmap(of_rows, spmd_axis_name="fsdp" if shards > 1 else None)(*by_shard)
    dkernel_DV = constrained(dkernel_DV.sum(0), P("fsdp", "tensor"))
    return total.sum() / (B * T), (dx_BTD.reshape(x_BTD.shape), dkernel_DV.astype(kernel_DV.dtype))


def _scaled(vocab_size: int, chunk: int, gradients: tuple[jax.Array, jax.Array], scale: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    dx_BTD, dkernel_DV = gradients
    return (dx_BTD * scale).astype(dx_BTD.dtype), (dkernel_DV * scale).astype(dkernel_DV.dtype), None


chunked_loss.defvjp(_loss_and_gradients, _scaled)


def padded_logits(x_BTD: jax.Array, kernel_DV: jax.Array, vocab_size: int) -> jax.Array:
    """logits_BTV, as many as the kernel has columns: -inf from `vocab_size` on."""
    logits_BTV = constrained(project(x_BTD, kernel_DV), P(P.UNCONSTRAINED, None, "tensor"))
    if vocab_size == kernel_DV.shape[1]:
        return logits_BTV
    return jnp.where(jnp.arange(kernel_DV.shape[1]) < vocab_size, logits_BTV, -jnp.inf)


def _cross_entropy(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sum of the losses, and its gradient; a target of -1 counts in neither."""
    hit_BTV = targets_BT[..., None] == jnp.arange(logits_BTV.shape[-1])
    counts_BT = targets_BT >= 0
    normalizer_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    # A sum over V, unlike an index, needs nothing from other devices but its result.
    losses_BT = normalizer_BT - jnp.where(hit_BTV, logits_BTV, 0).sum(-1)
    dlogits_BTV = jnp.exp(logits_BTV - normalizer_BT[..., None]) - hit_BTV
    return jnp.where(counts_BT, losses_BT, 0).sum(), jnp.where(counts_BT[..., None], dlogits_BTV, 0)


def _chunks(x_BTD: jax.Array, targets_BT: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Both cut along T, the chunks along a new leading axis; the last one is filled up with targets of -1."""
    missing = -x_BTD.shape[1] % chunk
    x_BTD, targets_BT = jnp.pad(x_BTD, ((0, 0), (0, missing), (0, 0))), jnp.pad(targets_BT, ((0, 0), (0, missing)), constant_values=-1)
    x_CBTD, targets_CBT = (rows.reshape(rows.shape[0], -1, chunk, *rows.shape[2:]).swapaxes(0, 1) for rows in (x_BTD, targets_BT))
    return x_CBTD, targets_CBT
