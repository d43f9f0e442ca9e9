"""A table of names pairs the parameters of two models, and lays them out both ways; what does not fit is named."""

import numpy as np
import pytest

from flaxgpt.errors import InputError
from flaxgpt.port.arrange import arranged, regrouped, undone
from flaxgpt.port.names import Link, Table
from flaxgpt.port.propose import propose_names

REFERENCE = {
    "h.0.attn.weight": (24, 8),
    "h.0.attn.bias": (24,),
    "h.0.up.weight": (16, 8),
    "h.0.gate.weight": (16, 8),
    "h.0.square.weight": (8, 8),
    "h.0.conv.weight": (6, 5, 3),
    "h.0.interleaved.weight": (24, 8),
    "norm.weight": (8,),
}
PORT = {
    "b.0.q.kernel": (8, 2, 4),
    "b.0.k.kernel": (8, 8),
    "b.0.v.kernel": (8, 8),
    "b.0.q.bias": (2, 4),
    "b.0.k.bias": (8,),
    "b.0.v.bias": (8,),
    "b.0.up_gate.kernel": (8, 32),
    "b.0.square.kernel": (8, 8),
    "b.0.conv.kernel": (3, 5, 6),
    "b.0.one": (8, 2, 4),
    "b.0.two": (8, 2, 4),
    "b.0.three": (8, 2, 4),
    "norm.scale": (8,),
}
NAMES = {
    "h.{}": "b.{}",
    "h.{}.attn": ["b.{}.q", "b.{}.k", "b.{}.v"],
    ("h.{}.up", "h.{}.gate"): "b.{}.up_gate",
    "h.{}.square.weight": ("b.{}.square.kernel", "i o -> i o"),
    "h.{}.interleaved.weight": (["b.{}.one", "b.{}.two", "b.{}.three"], "(n p h) d -> p d n h"),
}


def arrays(shapes):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def test_parameters_are_laid_out_for_the_port_and_back_again():
    reference, port = arrays(REFERENCE), {}
    links = Table(NAMES).parameters(REFERENCE, PORT)
    for link in links:
        there = link.to_port([reference[name] for name in link.reference], [PORT[name] for name in link.port])
        back = link.to_reference(there, [REFERENCE[name] for name in link.reference])
        port |= dict(zip(link.port, there, strict=True))
        for name, x in zip(link.reference, back, strict=True):
            np.testing.assert_array_equal(x, reference[name], err_msg=name)
    assert {name: x.shape for name, x in port.items()} == PORT
    np.testing.assert_array_equal(port["b.0.q.kernel"].reshape(8, 8), reference["h.0.attn.weight"][:8].T)
    np.testing.assert_array_equal(port["b.0.v.bias"], reference["h.0.attn.bias"][16:])
    np.testing.assert_array_equal(port["b.0.up_gate.kernel"][:, 16:], reference["h.0.gate.weight"].T)
    np.testing.assert_array_equal(port["b.0.square.kernel"], reference["h.0.square.weight"])
    np.testing.assert_array_equal(port["b.0.conv.kernel"][2], reference["h.0.conv.weight"][:, :, 2].T)
    np.testing.assert_array_equal(port["b.0.two"][:, 1], reference["h.0.interleaved.weight"].reshape(2, 3, 4, 8)[1, 1].T)


@pytest.mark.parametrize(
    ("reference", "port", "message"),
    [
        ({"a.weight": (2,), "b.weight": (2,)}, {"a.scale": (2,)}, r"b\.weight of the reference has no parameter of the port"),
        (
            {"a.weight": (2,)},
            {"a.scale": (2,), "a2.weight": (2,)},
            r"a2\.weight of the port has no parameter of the reference \(closest: a\.we",
        ),
        ({"a.weight": (2, 3)}, {"a.weight": (2, 4)}, r"a\.weight is \[2, 3\], and a\.weight is \[2, 4\]$"),
        ({"a.weight": (2, 3)}, {"a.weight": (3, 2)}, r'in another order, say so: \("a\.weight", "a b -> b a"\)'),
        ({"a.weight": (2, 3)}, {"a.kernel": (2, 3)}, r'say so: \("a\.kernel", "a b -> a b"\)'),
    ],
)
def test_what_is_missing_left_over_or_misshapen_is_named(reference, port, message):
    with pytest.raises(InputError, match=message):
        Table({}).parameters(reference, port)


def test_a_name_on_neither_side_is_named_with_the_closest():
    with pytest.raises(InputError, match=r"layer\.{}\.att: there is no such name in the reference \(closest: layers\.0\.attn\)"):
        Table({"layer.{}.att": "b.{}"}).outputs(["layers.0.attn"], ["b.0"])
    with pytest.raises(InputError, match=r"b\.{}\.x: there is no such name in the port"):
        Table({"layers.{}.attn": "b.{}.x"}).outputs(["layers.0.attn"], ["b.0"])


def test_what_is_below_a_pair_is_paired_by_the_same_name():
    links = Table({"layers.{}": "b.{}", "layers.{}.mlp": "b.{}.ff"}).outputs(
        ["layers.1.attn.q", "layers.1.mlp.up", "layers.1"], ["b.1.attn.q", "b.1.ff.up", "b.1", "b.11"]
    )
    assert links == [
        Link((a,), (b,)) for a, b in (("layers.1.attn.q", "b.1.attn.q"), ("layers.1.mlp.up", "b.1.ff.up"), ("layers.1", "b.1"))
    ]


@pytest.mark.parametrize("pattern", ["a b", "a b -> a", "a a -> a a", "a b -> a b c"])
def test_what_is_no_arrangement_is_said(pattern):
    with pytest.raises(InputError, match="is no arrangement"):
        arranged(np.zeros((2, 2)), pattern, (2, 2))


def test_an_arrangement_is_undone_by_its_inverse():
    x = np.arange(24).reshape(6, 4)
    there = arranged(x, "(n h) d -> d n h", (4, 2, 3))
    np.testing.assert_array_equal(there[1, 1], x[3:, 1])
    np.testing.assert_array_equal(arranged(there, undone("(n h) d -> d n h"), (6, 4)), x)
    with pytest.raises(InputError, match=r"does not make \[4, 2, 4\] of \[6, 4\]"):
        arranged(x, "(n h) d -> d n h", (4, 2, 4))


@pytest.mark.parametrize(
    ("a", "b", "fits"), [((2, 12), (2, 3, 4), True), ((6, 4), (4, 6), False), ((1, 8), (8,), True), ((2, 6), (4, 3), False)]
)
def test_only_neighbouring_axes_are_merged(a, b, fits):
    assert regrouped(a, b) is regrouped(b, a) is fits


def test_a_table_is_proposed_from_names_shapes_and_order():
    reference = {f"h.{i}.{name}": shape for i in range(2) for name, shape in {"ln_1.weight": (8,), "c_attn.weight": (24, 8)}.items()}
    reference |= {"wte.weight": (11, 8), "strange": (7,)}
    port = {f"layers.{i}.attn.{x}.kernel": (8, 8) for i in range(2) for x in ("key", "query", "value")}
    port |= {f"layers.{i}.norm1.scale": (8,) for i in range(2)} | {"embed.embedding": (11, 8)}
    proposal = propose_names(reference, port)
    assert proposal.names == {
        "h.{}.ln_1": "layers.{}.norm1",
        "h.{}.c_attn": ["layers.{}.attn.query", "layers.{}.attn.key", "layers.{}.attn.value"],
        "wte": "embed",
    }
    assert proposal.unmatched == ("strange [7] of the reference",)
    del reference["strange"]
    Table(proposal.names).parameters(reference, port)


def of(name, *shapes, weight="weight"):
    """A module's parameters: a weight, and a bias if there is a second shape."""
    return dict(zip((f"{name}.{weight}", f"{name}.bias"), shapes, strict=False))


def together(*modules):
    return {name: shape for module in modules for name, shape in module.items()}


def test_a_proposal_keeps_weight_and_bias_of_a_module_together():
    dense, norm = ((8, 8), (8,)), ((8,), (8,))
    modules = ("dense", dense), ("LayerNorm", norm)
    reference = [of(f"layer.{i}.{part}.{name}", *x) for i in range(2) for part in ("attention.output", "output") for name, x in modules]
    port = [of(f"layers.{i}.{name}", *dense, weight="kernel") for i in range(2) for name in ("attn.out", "down")]
    port += [of(f"layers.{i}.{name}", *norm, weight="scale") for i in range(2) for name in ("n1", "n2")]
    assert propose_names(together(*reference), together(*port)).names == {
        "layer.{}.attention.output.dense": "layers.{}.attn.out",
        "layer.{}.attention.output.LayerNorm": "layers.{}.n1",
        "layer.{}.output.dense": "layers.{}.down",
        "layer.{}.output.LayerNorm": "layers.{}.n2",
    }


def test_a_proposal_knows_layers_by_any_of_the_numbers_in_a_name():
    """In a ResNet the first block of a stage may have another width than the others: only by the second number are they layers."""
    widths = {(1, 0): 4, (1, 1): 4, (2, 0): 4, (2, 1): 8}
    convolutions = [(stage, i, k, 4 * stage, width if k == 1 else 4 * stage) for (stage, i), width in widths.items() for k in (1, 2)]
    reference = [of(f"layer{stage}.{i}.conv{k}", (o, c, 3, 3)) for stage, i, k, o, c in convolutions]
    port = [of(f"stage{stage}_{i}.conv{k}", (3, 3, c, o), weight="kernel") for stage, i, k, o, c in convolutions]
    proposal = propose_names(together(*reference), together(*port))
    assert proposal.names == {
        **{f"layer1.{{}}.conv{k}": f"stage1_{{}}.conv{k}" for k in (1, 2)},
        "layer2.{}.conv2": "stage2_{}.conv2",
        **{f"layer2.{i}.conv1": f"stage2_{i}.conv1" for i in (0, 1)},
    }
    assert not proposal.unmatched


def test_a_proposal_pairs_layers_that_are_numbered_otherwise_one_by_one():
    """Activations count in a Sequential of torch, and not in Linen."""
    reference = together(*(of(f"net.{i}", (8, 8), (8,)) for i in range(0, 24, 2)))
    port = together(*(of(f"Dense_{i}", (8, 8), (8,), weight="kernel") for i in sorted(range(12), key=str)))
    assert propose_names(reference, port).names == {f"net.{2 * i}": f"Dense_{i}" for i in range(12)}


def test_a_proposal_tells_an_encoder_from_a_decoder_whatever_comes_first():
    layers = {"encoder.block.{}.SelfAttention": "enc_{}.attn", "decoder.block.{}.SelfAttention": "dec_{}.attn"}
    layers |= {"encoder.block.{}.DenseReluDense": "enc_{}.ff", "decoder.block.{}.DenseReluDense": "dec_{}.ff"}
    layers |= {"decoder.block.{}.EncDecAttention": "dec_{}.cross"}
    reference = [of(f"{name.format(i)}.wi", (8, 8)) for name in layers for i in range(2)]
    port = [of(f"{name.format(i)}.wi", (8, 8), weight="kernel") for name in sorted(layers.values()) for i in range(2)]
    names = {f"{name}.wi": f"{there}.wi" for name, there in layers.items()}
    assert propose_names(together(*reference), together(*port)).names == names
