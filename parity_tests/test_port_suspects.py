"""Each suspect is named from two arrays and what went in. Right and wrong are computed by torch, not by the suspects' own formulas."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flaxgpt.port.description import describe
from flaxgpt.port.suspects import Place, find_cause

B, T, D, N, K = 2, 10, 24, 4, 2
H = D // N


def draw(*shape, seed=0):
    return torch.tensor(np.random.default_rng([seed, *shape]).normal(size=shape))


X, W, BIAS, SCALE, SHIFT = draw(B, T, D), draw(36, D, seed=1), draw(36, seed=2), 1 + 0.3 * draw(D, seed=3), draw(D, seed=4)
Q, KEYS, VALUES = draw(B, T, D), draw(B, T, K * H, seed=1), draw(B, T, K * H, seed=2)
KEEP = np.ones((B, T), int)
KEEP[1, 7:] = 0


def cause_of(sources, weights, reference, port, **others):
    numpy = {name: x.numpy() for name, x in sources.items()}, {name: x.numpy() for name, x in weights.items()}
    return find_cause(Place(*numpy, reference.numpy(), port.numpy(), **others))


def changed(cause):
    assert cause is not None, "no suspect was named"
    return {change.option: (change.port, change.reference) for change in cause.changes}


def layer_norm(eps=1e-5, scale=SCALE, shift=SHIFT, unbiased=False):
    centred = X - X.mean(-1, keepdim=True)
    return centred / torch.sqrt(X.var(-1, keepdim=True, unbiased=unbiased) + eps) * scale + shift


@pytest.mark.parametrize(
    ("port", "expected"),
    [
        (F.layer_norm(X, (D,), SCALE, SHIFT, 1e-6), {"eps": ("1e-06", "1e-05")}),
        (F.layer_norm(X, (D,), SCALE, SHIFT, 1e-12), {"eps": ("1e-12", "1e-05")}),
        (layer_norm(unbiased=True), {"variance": ("unbiased", "biased")}),
        (F.layer_norm(X, (D,), None, SHIFT, 1e-5), {"weight": ("forgotten", "times weight")}),
        (F.layer_norm(X, (D,), SCALE, None, 1e-5), {"bias": ("forgotten", "added")}),
        (F.layer_norm(X, (D,), 1 + SCALE, SHIFT, 1e-5), {"weight": ("times 1 + weight", "times weight")}),
        (F.rms_norm(X, (D,), SCALE, 1e-5) + SHIFT, {"norm": ("RMS norm", "layer norm")}),
        (layer_norm(eps=0, unbiased=True), {"eps": ("0", "1e-05"), "variance": ("unbiased", "biased")}),
    ],
)
def test_what_is_wrong_with_a_norm_is_named(port, expected):
    cause = cause_of({"x": X}, {"weight": SCALE, "bias": SHIFT}, F.layer_norm(X, (D,), SCALE, SHIFT, 1e-5), port)
    assert changed(cause) == expected
    assert cause.family == "norm"
    assert cause.agreement < 1e-12


def test_in_float32_a_norms_eps_is_named_as_well():
    x, reference = X.float(), F.layer_norm(X.float(), (D,), SCALE.float(), None, 1e-5)
    port = F.layer_norm(X.float(), (D,), SCALE.float(), None, 1e-4)
    cause = find_cause(Place({"x": x.double().numpy()}, {"weight": SCALE.numpy()}, reference.numpy(), port.numpy(), noise=3e-6))
    assert changed(cause) == {"eps": ("0.0001", "1e-05")}
    assert cause.agreement < 3e-7


IMAGE, KERNEL, PER_CHANNEL = draw(2, 6, 8, 7), draw(6, 6, 3, 3), draw(6, seed=1)


def convolved(pad, kernel=KERNEL, **options):
    return F.conv2d(F.pad(IMAGE, pad), kernel, **options)


@pytest.mark.parametrize(
    ("weights", "reference", "port", "expected"),
    [
        ({}, convolved((1, 1, 1, 1), stride=2), convolved((1, 1, 0, 1), stride=2), {"padding": ("SAME", "1 on both sides")}),
        ({}, convolved((0, 0, 0, 0)), convolved((0, 0, 0, 0), KERNEL.mT), {"window": ("with its axes exchanged", "as given")}),
        ({}, convolved((1, 1, 1, 1)), convolved((1, 1, 1, 1), KERNEL.flip(2, 3)), {"window": ("backwards", "as given")}),
        (
            {},
            convolved((1, 1, 1, 1)),
            convolved((1, 1, 1, 1), KERNEL.swapaxes(0, 1)),
            {"window": ("with in and out exchanged", "as given")},
        ),
        ({}, convolved((1, 1, 1, 1)), convolved((2, 0, 2, 0)), {"padding": ("all before", "1 on both sides")}),
        ({"bias": PER_CHANNEL}, convolved((1, 1, 1, 1), bias=PER_CHANNEL), convolved((1, 1, 1, 1)), {"bias": ("forgotten", "added")}),
        (
            {"weight": KERNEL[:, :2]},
            convolved((1, 1, 1, 1), KERNEL[:, :2], stride=2, groups=3),
            convolved((1, 1, 0, 1), KERNEL[:, :2], stride=2, groups=3),
            {"padding": ("SAME", "1 on both sides")},
        ),
    ],
)
def test_what_is_wrong_with_a_convolution_is_named(weights, reference, port, expected):
    cause = cause_of({"x": IMAGE}, {"weight": KERNEL} | weights, reference, port)
    assert changed(cause) == expected
    assert cause.family == "convolution"


@pytest.mark.parametrize(
    ("groups", "eps", "expected"),
    [(3, 1e-6, {"eps": ("1e-06", "1e-05")}), (2, 1e-5, {"groups": ("2", "3")}), (6, 1e-5, {"groups": ("6", "3")})],
)
def test_what_is_wrong_with_a_group_norm_is_named(groups, eps, expected):
    weights = {"weight": PER_CHANNEL, "bias": draw(6, seed=2)}
    reference, port = (F.group_norm(IMAGE, n, *weights.values(), e) for n, e in ((3, 1e-5), (groups, eps)))
    cause = cause_of({"x": IMAGE}, weights, reference, port)
    assert changed(cause) == expected
    assert cause.family == "group norm"


@pytest.mark.parametrize(
    "other", [F.conv2d(IMAGE, KERNEL, padding=1, dilation=1) * 1.01, convolved((1, 1, 1, 1), KERNEL.roll(1, 0)), IMAGE]
)
def test_no_convolution_is_named_for_what_none_is(other):
    assert cause_of({"x": IMAGE}, {"weight": KERNEL}, convolved((1, 1, 1, 1)), other) is None


SQUARE = draw(D, D, seed=5)
FUSED = F.linear(X, W, BIAS)


def reordered(shape, order):
    return F.linear(X, W[torch.arange(36).reshape(shape).permute(order).flatten()])


@pytest.mark.parametrize(
    ("weight", "port", "expected"),
    [
        (SQUARE, F.linear(X, SQUARE.T), {"product": ("x W", "x W^T")}),
        (W, F.linear(X, W.reshape(D, 36).T), {"product": ("x W, W reshaped where it should be transposed", "x W^T")}),
        (W, F.linear(X, W) / math.sqrt(D), {"times": ("1/sqrt(24)", "1")}),
        (W, F.linear(X, draw(36, D, seed=6)), {"weight": ("other.weight", "its own")}),
        (W, reordered((4, 3, 3), (1, 0, 2)), {"order of the outputs": ("(4, 3, 3) read as (3, 4, 3)", "as given")}),
        (W, reordered((9, 4), (1, 0)), {"order of the outputs": ("(9, 4) read as (4, 9)", "as given")}),
        (W, F.linear(X, W[[*range(12), *range(24, 36), *range(12, 24)]]), {"order of the outputs": ("parts 1 3 2 of 3", "as given")}),
        (W, F.linear(X[..., torch.arange(D).reshape(N, H).T.flatten()], W), {"order of the inputs": ("(4, 6) read as (6, 4)", "as given")}),
        (W, F.linear(X.bfloat16().double(), W.bfloat16().double()), {"precision": ("bfloat16", "exact")}),
        (W, F.linear(X.bfloat16(), W.bfloat16()).double(), {"precision": ("bfloat16 with its result", "exact")}),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_linear_layer_is_named(weight, port, expected):
    others = {"other.weight": draw(36, D, seed=6).numpy()}
    cause = cause_of({"x": X}, {"weight": weight}, F.linear(X, weight), port, others=others)
    assert changed(cause) == expected
    assert cause.family == "linear layer"


def test_a_forgotten_bias_is_named():
    assert changed(cause_of({"x": X}, {"weight": W, "bias": BIAS}, FUSED, F.linear(X, W))) == {"bias": ("forgotten", "added")}


def test_a_tied_head_is_named_where_the_reference_has_one_of_its_own():
    table, head = draw(50, D), draw(50, D, seed=1)
    others = {"embed.weight": table.numpy(), "head.weight": head.numpy()}
    cause = cause_of({"x": X}, {}, F.linear(X, head), F.linear(X, table), others=others)
    assert changed(cause) == {"weight": ("embed.weight", "head.weight")}


IDS, TABLE = torch.tensor(np.random.default_rng(0).integers(0, 50, (B, T))), draw(50, D)
IDS[0, 0] = 49


@pytest.mark.parametrize(
    ("ids", "port", "expected"),
    [
        (IDS, TABLE[IDS] * math.sqrt(D), {"times": ("sqrt(24)", "1")}),
        (IDS, TABLE[(IDS + 1) % 50], {"ids": ("one more, modulo their number", "as given")}),
        (torch.arange(T), TABLE[torch.arange(T) + 1], {"ids": ("one more", "as given")}),
        (torch.arange(T), TABLE[(torch.arange(T) + 1) % T], {"ids": ("one more, modulo the length", "as given")}),
        (IDS, TABLE[IDS.roll(1, -1)], {"ids": ("those of the position before", "as given")}),
    ],
)
def test_what_is_wrong_with_an_embedding_is_named(ids, port, expected):
    assert changed(cause_of({"ids": ids}, {"weight": TABLE}, TABLE[ids], port)) == expected


@pytest.mark.parametrize(
    ("right", "wrong", "expected"),
    [
        (F.gelu, lambda x: F.gelu(x, approximate="tanh"), ("GELU (tanh)", "GELU (exact)")),
        (lambda x: F.gelu(x, approximate="tanh"), F.gelu, ("GELU (exact)", "GELU (tanh)")),
        (F.silu, F.gelu, ("GELU (exact)", "SiLU")),
        (lambda x: F.gelu(x, approximate="tanh"), F.relu, ("ReLU", "GELU (tanh)")),
    ],
)
def test_the_wrong_activation_is_named_alone_and_in_a_gate(right, wrong, expected):
    a, b = draw(B, T, D), draw(B, T, D, seed=1)
    assert changed(cause_of({"x": a}, {}, right(a), wrong(a))) == {"activation": expected}
    assert changed(cause_of({"gate": a, "up": b}, {}, right(a) * b, wrong(a) * b)) == {"activation": expected}
    fused = torch.cat([a, b], -1)
    assert changed(cause_of({"both": fused}, {}, right(a) * b, wrong(a) * b)) == {"activation": expected}


def test_the_wrong_half_of_a_gate_is_named():
    a, b = draw(B, T, D), draw(B, T, D, seed=1)
    cause = cause_of({"gate": a, "up": b}, {}, F.silu(a) * b, a * F.silu(b))
    assert changed(cause) == {"of": ("the last times the first", "the first times the last")}


def rotated(x, base=10000.0, pairs=False, first=0, sign=1):
    angles = torch.outer(torch.arange(first, first + T, dtype=torch.float64), base ** (-torch.arange(0, H, 2, dtype=torch.float64) / H))
    turn = torch.polar(torch.ones_like(angles), sign * angles)
    if pairs:
        return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], H // 2, 2)) * turn).flatten(-2)
    z = torch.complex(*x.chunk(2, -1)) * turn
    return torch.cat([z.real, z.imag], -1)


def attention(q=Q, k=KEYS, v=VALUES, *, scale=None, mask=None, turn=rotated, turn_keys=None, tile=False, heads_first=True, merge=None):
    q, k, v = (x.unflatten(-1, (-1, H)) if heads_first else x.unflatten(-1, (H, -1)).transpose(2, 3) for x in (q, k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    q, k = turn(q), (turn_keys or turn)(k)
    if k.shape[1] < N:
        k, v = (x.repeat(1, N // K, 1, 1) if tile else x.repeat_interleave(N // K, 1) for x in (k, v))
    mask = torch.ones(T, T).tril().bool() if mask is None else mask
    context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return (merge or (lambda x: x.transpose(1, 2)))(context).reshape(B, T, D)


CAUSAL, SEEN = torch.ones(T, T).tril().bool(), torch.tensor(KEEP).bool()[:, None, None]
EARLIER = "causal without the own position"
PLAIN = {"turn": lambda x: x}


@pytest.mark.parametrize(
    ("port", "expected"),
    [
        ({"scale": 1.0}, {"scale": ("1", "1/sqrt(H)")}),
        ({"scale": D**-0.5}, {"scale": ("1/sqrt(D)", "1/sqrt(H)")}),
        ({"mask": torch.ones(T, T).tril(1).bool()}, {"mask": ("causal and the next key", "causal")}),
        ({"mask": torch.ones(T, T).bool()}, {"mask": ("none", "causal")}),
        (
            {"mask": torch.ones(T, T).tril(-1).bool()},
            {"mask": (EARLIER, "causal"), "a query that sees nothing": ("gives zero", "sees all")},
        ),
        ({"turn": lambda x: rotated(x, pairs=True)}, {"rotary": ("pairs with base 10000", "halves with base 10000")}),
        ({"turn": lambda x: rotated(x, 500000.0)}, {"rotary": ("halves with base 500000", "halves with base 10000")}),
        ({"turn": lambda x: rotated(x, sign=-1)}, {"rotary": ("halves backwards with base 10000", "halves with base 10000")}),
        ({"turn": lambda x: x}, {"rotary": ("none", "halves with base 10000")}),
        ({"turn_keys": lambda x: x}, {"rotary turns": ("queries", "queries and keys")}),
        ({"turn_keys": lambda x: rotated(x, first=1)}, {"positions": ("one more for keys", "the same")}),
        ({"tile": True}, {"grouped heads": ("tiled", "repeated")}),
        ({"heads_first": False}, {"(H, N) in place of (N, H)": ("queries, keys and values", "nowhere")}),
        ({"merge": lambda x: x}, {"context": ("not transposed back", "heads side by side")}),
        ({"merge": lambda x: x.permute(0, 2, 3, 1)}, {"(H, N) in place of (N, H)": ("context", "nowhere")}),
        ({"k": VALUES, "v": KEYS}, {"q k v are taken as": ("q v k", "q k v")}),
        ({"scale": 1.0, "tile": True}, {"scale": ("1", "1/sqrt(H)"), "grouped heads": ("tiled", "repeated")}),
    ],
)
def test_what_is_wrong_with_attention_is_named(port, expected):
    cause = cause_of({"q": Q, "k": KEYS, "v": VALUES}, {}, attention(), attention(**port))
    assert changed(cause) == expected
    assert cause.family == "attention"
    assert cause.agreement < 1e-12


def test_padding_that_is_looked_at_is_named():
    cause = cause_of({"q": Q, "k": KEYS, "v": VALUES}, {}, attention(mask=CAUSAL & SEEN), attention(), keep_BT=KEEP)
    assert changed(cause) == {"padding": ("seen", "not seen")}


def test_fused_weights_split_in_the_wrong_order_are_named():
    fused = draw(B, T, 3 * D)
    apart = fused.chunk(3, -1)
    by_head = [x.flatten(-2) for x in fused.unflatten(-1, (N, 3, H)).unbind(-2)]
    cause = cause_of({"qkv": fused}, {}, attention(*apart, **PLAIN), attention(*by_head, **PLAIN))
    assert changed(cause) == {"fused weights are split": ("(N, 3, H)", "(3, N, H)")}


def test_attention_weights_are_recognised_too():
    q, k = (x.unflatten(-1, (N, H)).transpose(1, 2) for x in (Q, X))
    weights = [((q @ k.mT) * scale).masked_fill(~CAUSAL, -torch.inf).softmax(-1) for scale in (H**-0.5, 1.0)]
    assert changed(cause_of({"q": Q, "k": X, "v": X}, {}, *weights)) == {"scale": ("1", "1/sqrt(H)")}


def test_a_shortcut_taken_from_the_wrong_place_is_named():
    x, normed, out = draw(B, T, D), draw(B, T, D, seed=1), draw(B, T, D, seed=2)
    cause = cause_of({"x": x, "norm": normed, "out": out}, {}, x + out, normed + out)
    assert changed(cause) == {"sum of": ("norm + out", "x + out")}


@pytest.mark.parametrize("seed", range(5))
def test_no_suspect_is_named_for_what_none_of_them_does(seed):
    noise = draw(B, T, D, seed=10 + seed)
    reference = F.layer_norm(X, (D,), SCALE, SHIFT, 1e-5)
    for port in (
        reference + 1e-3 * noise,
        F.layer_norm(X, (D,), SCALE, SHIFT, 3.3e-5),
        reference.tanh(),
        reference * (1 + noise.sign() * 1e-2),
    ):
        assert cause_of({"x": X}, {"weight": SCALE, "bias": SHIFT}, reference, port) is None
    right = attention()
    for port in (attention(scale=0.37), attention(turn=lambda x: rotated(x, 31.0)), right + 1e-4 * noise, right.flip(1)):
        assert cause_of({"q": Q, "k": KEYS, "v": VALUES}, {}, right, port) is None


A = draw(B, T, D, seed=7).numpy()
LATER, HEAD = np.roll(A, 1, axis=1), A.copy()
HEAD[..., 6:12] *= 3
SPOILED = A.copy()
SPOILED[1, 3:, 5] = np.nan


@pytest.mark.parametrize(
    ("port", "look"),
    [
        (2.5 * A, r"the port is 2\.5 times the reference"),
        (-A, r"the port is -1 times the reference"),
        (A + 0.25, r"the port is the reference \+0\.25"),
        (0 * A, "zero everywhere"),
        (A[..., :5], r"shape is \(2, 10, 5\), the reference's is \(2, 10, 24\)"),
        (SPOILED, "nan or infinity in 7 of 480 places, only in row 1 .of 2., positions 3 to 9 .of 10., feature 5 .of 24."),
        (LATER, "1 position later"),
        (np.roll(A, -1, axis=1), "1 position earlier"),
        (A[:, ::-1], "its positions in another order: 9, 8, 7, 6"),
        (A[..., np.arange(D).reshape(N, H).T.ravel()], "its features in another order: 0, 6, 12, 18"),
        (HEAD, "only in features 6 to 11 .of 24.; there the port is 3 times the reference"),
        (np.where(np.arange(T)[:, None] == T - 1, 0, A), "only in position 9 .of 10.; there the port is zero"),
        (A * (1 + np.arange(D)), "each feature has a factor of its own, from 1 to 24"),
        (A + SHIFT.numpy(), "each feature has a number of its own added to it.*a bias"),
        (torch.tensor(A).bfloat16().double().numpy(), "every number of the port is one of bfloat16"),
        (A.astype(np.float32), "every number of the port is one of float32"),
        (A + 2e-3 * np.abs(A) * X.numpy().clip(-1, 1), "noise of .*bfloat16"),
        (np.where(X.numpy() > -1, A / 0.8, 0), r"zero in 1\d% of all places, and elsewhere is 1\.25 times the reference: dropout\?"),
        (np.where(np.arange(T)[:, None] > 0, np.sin(3 * A), A), "the port differs, only in positions 1 to 9 .of 10.$"),
        (np.sin(3 * A), "no pattern"),
    ],
)
def test_a_difference_is_described(port, look):
    assert re.search(look, describe(A, port)), describe(A, port)


def test_where_images_differ_is_described():
    image = draw(2, 4, 6, 5).numpy()
    port = image.copy()
    port[:, 1:3, 0] = 0
    assert describe(image, port).startswith(
        "the port differs, only in heads or channels 1, 2 (of 4), position 0 (of 6); there the port is zero"
    )
    port = draw(2, 4, 6, 5, 3).numpy()
    assert "only in axis 4 index 2 (of 3)" in describe(port, np.where(np.arange(3) == 2, np.sin(3 * port), port))


def test_an_embedding_that_has_its_scale_beside_the_table_is_known():
    scaled = TABLE[IDS] * math.sqrt(D)
    cause = cause_of({"ids": IDS}, {"weight": TABLE, "embed_scale": torch.tensor(math.sqrt(D))}, scaled, TABLE[IDS])
    assert changed(cause) == {"times": ("1", f"sqrt({D})")}


def test_exchanged_axes_are_described():
    square = draw(2, 6, 6).numpy()
    assert "axes in the order (0, 2, 1)" in describe(square, square.swapaxes(1, 2))
