"""Checking a port: what is numerically poor, oddly shaped, or no pair of models at all is said in a line of its own."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from flaxgpt.errors import InputError
from flaxgpt.port.check import check
from flaxgpt.port.function_recorder import FunctionRecorder
from flaxgpt.port.linen_recorder import LinenRecorder
from flaxgpt.port.pair import Pair
from flaxgpt.port.tap import tap
from torch_ref.port.torch_recorder import TorchRecorder

FORWARD = ("activations",)
DRAW = np.random.default_rng(0)
X = DRAW.normal(size=(4, 8)).astype(np.float32)


class Torch(torch.nn.Module):
    """A linear layer, and what a function makes of its output."""

    def __init__(self, then=lambda up, x: up(x), width=8, **modules):
        super().__init__()
        torch.manual_seed(0)
        self.then, self.up = then, torch.nn.Linear(8, width)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args):
        return self.then(self.up, *args)


class Linen(nn.Module):
    """The same."""

    then: object = lambda up, x: up(x)
    width: int = 8

    @nn.compact
    def __call__(self, *args):
        return self.then(nn.Dense(self.width, name="up"), *args)


def pair(theirs=None, ours=None, batch=X, loss=(None, None), take=(None, None), names=None, width=8):
    reference = Torch(*[theirs] if theirs else [], width=width)
    port = Linen(*[ours or theirs] if ours or theirs else [], width=width)
    recorders = TorchRecorder(reference, loss=loss[0], take=take[0]), LinenRecorder(port, loss=loss[1], take=take[1])
    return Pair(*recorders, batch, {} if names is None else names)


def in_less(x):
    """Rounded to bfloat16 where float32 is asked for."""
    return x.astype(jnp.bfloat16).astype(x.dtype) if x.dtype == jnp.float32 and not jax.config.jax_enable_x64 else x


def variance_of_squares(up, x):
    y = up(x) + 300
    return (y - y.mean(-1, keepdims=True)) / jnp.sqrt((y * y).mean(-1, keepdims=True) - y.mean(-1, keepdims=True) ** 2 + 1e-5)


def variance(up, x):
    return torch.nn.functional.layer_norm(up(x) + 300, (64,))


def exponentials(up, x):
    e = jnp.exp(100 * up(x))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("theirs", "ours", "width"),
    [
        pytest.param(lambda up, x: torch.relu(up(x)), lambda up, x: jax.nn.relu(in_less(up(x))), 8, id="rounded to bfloat16"),
        pytest.param(variance, variance_of_squares, 64, id="variance as a difference of squares"),
        pytest.param(lambda up, x: torch.softmax(100 * up(x), -1), exponentials, 8, id="softmax without the maximum"),
    ],
)
def test_a_port_that_loses_digits_in_float32_fails_and_is_told_so(theirs, ours, width):
    verdict = check(pair(theirs, ours, width=width), FORWARD)
    assert not verdict.passed, "its own error has widened its bound"
    assert verdict.first["forward"] == "<output>"
    assert "<output>: the port's own error against float64 is" in verdict.diagnosis[-1]
    assert "the reference's" in verdict.diagnosis[-1]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        pytest.param(lambda up, x: up(x) + up(torch.zeros(4, 8)), lambda up, x: up(x) + up(jnp.zeros((4, 8))), id="torch.zeros"),
        pytest.param(lambda up, x: up(x) / torch.tensor(3.0).sqrt(), lambda up, x: up(x) / 3**0.5, id="torch.tensor(3.0)"),
        pytest.param(lambda up, x: up(x) * 3**0.5, lambda up, x: up(x) * jnp.sqrt(jnp.float32(3)), id="jnp.float32(3)"),
        pytest.param(
            lambda up, x: up(x) * torch.cos(1 / 10000.0 ** (torch.arange(0, 16, 2, dtype=torch.float32) / 8)),
            lambda up, x: up(x) * jnp.cos(1 / 10000.0 ** (jnp.arange(0, 16, 2, dtype=jnp.float32) / 8)),
            id="jnp.arange(dtype=jnp.float32)",
        ),
    ],
)
def test_constants_that_a_model_makes_are_float64_in_the_float64_pass(theirs, ours):
    verdict = check(pair(theirs, ours), FORWARD)
    assert verdict.passed, verdict.diagnosis
    assert torch.get_default_dtype() == torch.float32
    assert jnp.float32 is not jnp.float64


def test_a_constant_that_stays_in_float32_is_named_as_what_it_may_be():
    table = np.sqrt(np.arange(1, 9, dtype=np.float32))
    verdict = check(pair(lambda up, x: up(x) * torch.arange(1, 9).sqrt(), lambda up, x: up(x) * table), FORWARD)
    assert not verdict.passed
    assert "agree in float32, and differ by" in verdict.diagnosis[-1]


def test_a_scan_with_a_carry_in_float32_is_compared_on_every_rung():
    def recurrent(up, x):
        h = torch.zeros(x.shape[0], 8)
        for t in range(x.shape[1]):
            h = torch.tanh(x[:, t] @ up.weight.T + up.bias + h)
        return h

    def scanned(params, x):
        def step(h, x):
            h = tap("h.{}", jnp.tanh(x @ params["up"]["weight"].T + params["up"]["bias"] + h))
            return h, h

        return jax.lax.scan(step, jnp.zeros((x.shape[0], 8), jnp.float32), x.swapaxes(0, 1))[0]

    shapes = {"up": {"weight": jax.ShapeDtypeStruct((8, 8), jnp.float32), "bias": jax.ShapeDtypeStruct((8,), jnp.float32)}}
    batch = DRAW.normal(size=(2, 3, 8)).astype(np.float32)
    verdict = check(Pair(TorchRecorder(Torch(recurrent)), FunctionRecorder(scanned, shapes), batch), ("activations", "training"), updates=1)
    assert verdict.passed, verdict.diagnosis


class Spectrum(torch.nn.Module):
    def forward(self, x):
        return torch.fft.rfft(x)


class LinenSpectrum(nn.Module):
    conjugate: bool = False

    def __call__(self, x):
        return jnp.conj(jnp.fft.rfft(x)) if self.conjugate else jnp.fft.rfft(x)


@pytest.mark.parametrize("wrong", [False, True])
def test_complex_activations_are_compared_by_both_parts(wrong):
    class Port(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jnp.abs(LinenSpectrum(wrong, name="fft")(nn.Dense(8, name="up")(x)))

    class Reference(Torch):
        def forward(self, x):
            return self.fft(self.up(x)).abs()

    verdict = check(Pair(TorchRecorder(Reference(fft=Spectrum())), LinenRecorder(Port()), X), ("activations", "gradients"))
    assert verdict.first["forward"] == ("fft" if wrong else None), verdict.diagnosis
    assert verdict.passed is not wrong
    assert not wrong or "the reference's complex conjugate" in verdict.diagnosis[-1]


def several(up, x):
    return {"logits": up(x), "aux": 2 * up(x).sum()}


def several_of_which_one_is_wrong(up, x):
    return {"logits": up(x), "aux": up(x).sum()}


def test_of_several_outputs_one_must_be_chosen():
    with pytest.raises(InputError, match=r"^the torch model returns a dict with logits, aux, in which there are 2 arrays: say"):
        check(pair(several), FORWARD)
    with pytest.raises(InputError, match=r"^the linen model returns a dict with logits, aux"):
        check(pair(several, take=({"<output>": "logits"}, None)), FORWARD)
    for key, passes in (("logits", True), ("aux", False)):
        verdict = check(pair(several, several_of_which_one_is_wrong, take=({"<output>": key}, {"<output>": key})), FORWARD)
        assert verdict.passed is passes, key


def test_the_record_of_a_transformers_model_is_its_first_array():
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    verdict = check(pair(lambda up, x: BaseModelOutputWithPooling(up(x), up(x).sum()), lambda up, x: up(x)), FORWARD)
    assert verdict.passed


LOSSES = {
    "fails": (lambda o, b: o.foo, r"the loss given to the torch recorder fails: AttributeError: 'Tensor' object has no attribute 'foo'"),
    "is no number": (lambda o, b: o, r"the loss given to the torch recorder returns an array of shape \[4, 8\]: expected one number"),
    "is constant": (lambda o, b: b.sum(), r"the loss given to the torch recorder does not depend on the parameters"),
    "is zero": (lambda o, b: (0 * o).sum(), r"the reference's gradients are all zero: its loss does not depend"),
}


@pytest.mark.parametrize("which", LOSSES)
def test_a_loss_that_can_not_be_used_is_one_line(which):
    loss, message = LOSSES[which]
    with pytest.raises(InputError, match=message):
        check(pair(loss=(loss, lambda o, b: o.sum())), ("gradients",))


def test_a_port_s_loss_that_is_no_number_is_one_line():
    with pytest.raises(InputError, match=r"the loss given to the linen recorder returns an array of shape \[4, 8\]"):
        check(pair(loss=(lambda o, b: o.sum(), lambda o, b: o)), ("loss",))


def test_two_losses_that_differ_are_described():
    verdict = check(pair(loss=(lambda o, b: o.square().mean(), lambda o, b: jnp.square(o).sum())), ("loss",))
    assert ", 32 times the reference's (" in verdict.diagnosis[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Pair(Torch(), LinenRecorder(Linen()), X), "the reference is a Torch: expected a recorder of it"),
        (lambda: pair(batch=[X]), "batch: 0 is a list: expected an array"),
        (lambda: pair(batch=None), "batch: 0 is a NoneType"),
        (lambda: pair(batch={"x": X.tolist()}), "batch: x is a list"),
        (lambda: pair(batch=X[:0]), r"batch: 0 is \[0, 8\]: there is nothing in it"),
        (lambda: pair(batch=np.where(X > 1, np.nan, X)), r"batch: 0 has nan in \d of 32 places"),
    ],
)
def test_what_is_no_pair_is_refused_when_it_is_made(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("made", "options", "message"),
    [
        ({"names": ["up"]}, {}, "names: expected a dict of the reference's names and the port's, not a list"),
        ({"names": {1: "up"}}, {}, "names: 1 is neither a name"),
        ({"names": {"up": None}}, {}, "names: None is neither a name"),
        ({"names": {"up": 3}}, {}, "names: 3 is neither a name"),
        ({}, {"rungs": ("parameters",)}, "rungs: nothing is left to compare; parameters compares those that a port has of its own"),
        ({}, {"rungs": ()}, "rungs: nothing is left to compare; expected some of"),
        ({}, {"rungs": FORWARD, "bounds": {"upp*": 1e-3}}, r"bounds: no tensor that was compared is called upp\* \(closest: up\)"),
        ({}, {"rungs": FORWARD, "exact_bounds": {"x": 1e-3}}, "bounds: no tensor that was compared is called x"),
        ({"theirs": lambda up, x: up(x).argmax(-1)}, {}, "the torch model returns integers, which have no gradient"),
    ],
)
def test_what_can_not_be_compared_is_one_line(made, options, message):
    with pytest.raises(InputError, match=message):
        check(pair(**made), **options)


def test_models_without_parameters_are_named():
    class Tanh(torch.nn.Module):
        def forward(self, x):
            return torch.tanh(x)

    with pytest.raises(InputError, match=r"^the reference \(torch\) has no parameters"):
        check(Pair(TorchRecorder(Tanh()), FunctionRecorder(lambda params, x: jnp.tanh(x), {}), X))


@pytest.mark.parametrize(
    ("theirs", "ours", "says"),
    [
        pytest.param(lambda up, x: up(x).square().mean(), lambda up, x: jnp.square(up(x)).sum(), "32 times", id="a number"),
        pytest.param(lambda up, x: up(x)[:, 0] * 2, lambda up, x: up(x)[:, 0] * 3, "1.5 times", id="one axis"),
    ],
)
def test_outputs_of_few_axes_are_diagnosed(theirs, ours, says):
    assert says in check(pair(theirs, ours), FORWARD).diagnosis[-1]


class Images(torch.nn.Module):
    """Channels come before rows and columns, which are as many as there are channels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = torch.nn.Conv2d(3, 4, 1), torch.nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.second(self.first(x))


class ImagesWithChannelsLast(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (1, 1), name="first")(x.transpose(0, 2, 3, 1)))
        return nn.Conv(4, (1, 1), name="second")(x).transpose(0, 3, 1, 2)


def test_an_input_that_no_module_made_is_laid_out_as_the_port_has_it():
    rows = {f"{name}{part}": f"{name}{part.replace('weight', 'kernel')}" for name in ("first", "second") for part in (".weight", ".bias")}
    names = rows | {name: (name, "b c h w -> b h w c") for name in ("first", "second")}
    images = DRAW.normal(size=(2, 3, 4, 4)).astype(np.float32)
    verdict = check(Pair(TorchRecorder(Images()), LinenRecorder(ImagesWithChannelsLast()), images, names), FORWARD)
    assert verdict.first["forward"] == "second"
    assert verdict.diagnosis[0].startswith("second is right, but what goes into it differs by"), verdict.diagnosis
    assert "ReLU in the port" in verdict.diagnosis[1]


def with_channels_last(shape=(2, 3, 6, 5), then=lambda x: x):
    """Two convolutions; what the whole returns has its channels last in the port, too."""

    class Port(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (1, 1), name="first")(then(x.transpose(0, 2, 3, 1)))
            return then(nn.Conv(4, (1, 1), name="second")(x))

    return Pair(TorchRecorder(Images()), LinenRecorder(Port()), DRAW.normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("size", [(6, 5), (4, 4)])
def test_a_port_may_have_its_channels_last(size):
    shape = 2, 3, *size
    names = {"<output>": ("<output>", "b c h w -> b h w c")} if size == (4, 4) else {}
    pair = with_channels_last(shape)
    assert check(dataclasses.replace(pair, names=names), ("activations", "gradients")).passed
    verdict = check(dataclasses.replace(with_channels_last(shape, nn.relu), names=names), FORWARD)
    assert verdict.first["forward"] == "first"
    assert verdict.diagnosis[0].startswith("first is right, but what goes into it differs by"), verdict.diagnosis


def test_all_outputs_that_do_not_fit_are_named_at_once():
    message = r"arrays that do not fit: first is \[2, 4, 6, 5\], and first is \[2, 5, 6, 4\]; if its axes .*; second is \[2, 4"
    with pytest.raises(InputError, match=message):
        check(with_channels_last(then=lambda x: x.swapaxes(1, 2)), FORWARD)


def test_a_module_that_can_not_be_given_the_reference_s_input_is_not_called_right():
    class Scaled(nn.Dense):
        """It takes an array that the reference's module knows nothing of."""

        @nn.compact
        def __call__(self, x, scale):
            return super().__call__(x * scale)

    class Port(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Scaled(8, name="head")(nn.Dense(8, name="up")(x), jnp.ones(3)[:1])

    class Reference(Torch):
        def forward(self, x):
            return self.head(torch.relu(self.up(x)))

    verdict = check(Pair(TorchRecorder(Reference(head=torch.nn.Linear(8, 8))), LinenRecorder(Port()), X), FORWARD)
    assert verdict.first["forward"] == "head"
    assert "(it can't be run with the reference's input)" in verdict.diagnosis[0], verdict.diagnosis


@pytest.mark.parametrize(
    ("eps", "power", "says"),
    [
        (1e-3, 1, "eps: 0.001 in the port, 1e-05 in the reference"),
        (1e-5, 0.5, "divided by the root of: the standard deviation in the port, the variance in the reference"),
    ],
)
def test_a_batch_norm_is_a_suspect(eps, power, says):
    class Port(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True, epsilon=eps, name="norm")(nn.Dense(8, name="up")(x))

    class Reference(Torch):
        def forward(self, x):
            return self.norm(self.up(x))

    norm = torch.nn.BatchNorm1d(8)
    norm.running_mean, norm.running_var = torch.randn(8), torch.rand(8) + 0.5
    statistics = {"norm": {"mean": norm.running_mean.numpy(), "var": norm.running_var.numpy() ** power}}
    port = LinenRecorder(Port(), {"params": {}, "batch_stats": statistics})
    verdict = check(Pair(TorchRecorder(Reference(norm=norm)), port, X), FORWARD)
    assert verdict.first["forward"] == "norm"
    assert says in verdict.diagnosis[-1]


def test_a_convolution_of_which_the_port_pads_one_end_is_a_suspect():
    """ "SAME" of Flax is not torch's padding=1 where there is a stride."""

    class Port(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(4, (3, 3), (2, 2), name="stem")(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)

    reference = torch.nn.Sequential()
    reference.add_module("stem", torch.nn.Conv2d(3, 4, 3, stride=2, padding=1))
    verdict = check(Pair(TorchRecorder(reference), LinenRecorder(Port()), DRAW.normal(size=(2, 3, 8, 6)).astype(np.float32)), FORWARD)
    assert verdict.first["forward"] == "stem"
    assert "padding: SAME in the port, 1 on both sides in the reference" in verdict.diagnosis[-1], verdict.diagnosis


class Heads(torch.nn.Module):
    """Attention as in BERT: what is computed before a layer is in another module than the layer."""

    def __init__(self):
        super().__init__()
        self.inside = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in "qkv"})
        self.output = torch.nn.ModuleDict({"dense": torch.nn.Linear(8, 8)})

    def forward(self, x, mask):
        q, k, v = (self.inside[name](x).unflatten(-1, (2, 4)).transpose(1, 2) for name in "qkv")
        context = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None].bool())
        return self.output["dense"](context.transpose(1, 2).flatten(-2))


class HeadsInLinen(nn.Module):
    """Flax's own attention, whose last layer takes heads and their size as two axes."""

    @nn.compact
    def __call__(self, x, mask):
        return nn.MultiHeadDotProductAttention(2, name="attention")(x, x)


def test_attention_of_flax_is_diagnosed_though_its_heads_are_an_axis_of_their_own():
    class Reference(Torch):
        def forward(self, x, mask):
            return self.heads(x, mask)

    names = {f"heads.inside.{a}": f"attention.{b}" for a, b in (("q", "query"), ("k", "key"), ("v", "value"))}
    batch = {"x": DRAW.normal(size=(2, 5, 8)).astype(np.float32), "mask": (np.arange(5) < np.array([[3], [5]])).astype(int)}
    reference = Reference(heads=Heads())
    del reference.up
    verdict = check(
        Pair(TorchRecorder(reference), LinenRecorder(HeadsInLinen()), batch, names | {"heads.output.dense": "attention.out"}), FORWARD
    )
    assert verdict.diagnosis[0].startswith("heads.output.dense is right, but what goes into it differs by"), verdict.diagnosis
    assert verdict.diagnosis[1].startswith("padding: seen in the port, not seen in the reference")


def test_what_comes_before_a_last_layer_that_the_port_does_not_show_is_diagnosed():
    """The port taps queries, keys, values and the result, and not the context."""

    def attention(params, batch):
        q, k, v = (tap(name, batch["x"] @ params[name]["weight"].T + params[name]["bias"]) for name in "qkv")
        q, k, v = (x.reshape(2, 5, 2, 4) for x in (q, k, v))
        weights = jax.nn.softmax(jnp.where(batch["mask"][:, None, None] == 1, jnp.einsum("btnh,bsnh->bnts", q, k), -1e30))
        context = jnp.einsum("bnts,bsnh->btnh", weights, v).reshape(2, 5, 8)
        return tap("out", context @ params["dense"]["weight"].T + params["dense"]["bias"])

    module = {"weight": jax.ShapeDtypeStruct((8, 8), jnp.float32), "bias": jax.ShapeDtypeStruct((8,), jnp.float32)}
    names = {"0": "out", "0.output.dense.weight": "dense.weight", "0.output.dense.bias": "dense.bias"} | {f"0.inside.{x}": x for x in "qkv"}
    batch = {"x": DRAW.normal(size=(2, 5, 8)).astype(np.float32), "mask": (np.arange(5) < np.array([[3], [5]])).astype(int)}
    reference = TorchRecorder(torch.nn.ModuleList([Heads()]), call=lambda model, batch: model[0](**batch))
    verdict = check(Pair(reference, FunctionRecorder(attention, dict.fromkeys([*"qkv", "dense"], module)), batch, names), FORWARD)
    assert verdict.first["forward"] == "0"
    assert "scale: 1 in the port, 1/sqrt(H) in the reference" in verdict.diagnosis[-1], verdict.diagnosis


def test_positions_that_differ_are_no_fault_of_their_embedding():
    """They have a row for the batch on one side, and none on the other."""

    class Port(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Embed(12, 8, name="positions")(jnp.arange(4) + 2) + nn.Dense(8, name="up")(x)

    class Reference(Torch):
        def forward(self, x):
            up = self.up(x)
            return self.positions(torch.arange(4)[None]) + up

    verdict = check(Pair(TorchRecorder(Reference(positions=torch.nn.Embedding(12, 8))), LinenRecorder(Port()), X), FORWARD)
    assert verdict.diagnosis[0].startswith("positions is right, but what goes into it differs by"), verdict.diagnosis
    assert "ids: two more in the port, as given in the reference" in verdict.diagnosis[1]


def test_a_cause_that_is_named_is_not_doubted():
    """An eps of 1e-6 shows in float64 alone, as a constant in float32 would."""

    class Port(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm(epsilon=1e-6, name="norm")(nn.Dense(8, name="up")(x))

    class Reference(Torch):
        def forward(self, x):
            return self.norm(self.up(x))

    verdict = check(Pair(TorchRecorder(Reference(norm=torch.nn.LayerNorm(8, eps=1e-12))), LinenRecorder(Port()), 3 * X), FORWARD)
    assert "eps: 1e-06 in the port, 1e-12 in the reference" in verdict.diagnosis[-1], verdict.diagnosis
