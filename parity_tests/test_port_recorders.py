"""What anybody's model computes is recorded by name, in torch, Linen, NNX and plain JAX, and the model stays as it was."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from flaxgpt.errors import InputError
from flaxgpt.port.check import check
from flaxgpt.port.function_recorder import FunctionRecorder
from flaxgpt.port.linen_recorder import LinenRecorder
from flaxgpt.port.nnx_recorder import NNXRecorder
from flaxgpt.port.pair import Pair
from flaxgpt.port.recorder import OUTPUT
from flaxgpt.port.tap import tap
from flaxgpt.port.testing import assert_ported
from torch_ref.port.torch_recorder import TorchRecorder

L, D = 3, 4
X = np.random.default_rng(0).normal(size=(2, D)).astype(np.float32)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = torch.nn.Linear(D, D)

    def forward(self, x):
        return x + torch.tanh(self.lin(x)), {"nothing": None}


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block() for _ in range(L)])
        self.norm = torch.nn.LayerNorm(D)

    def forward(self, x):
        for block in self.blocks:
            x, _ = block(x)
        return self.norm(x)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(nn.Dense(D, name="lin")(x)), None


class Scanned(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        block = nn.remat(LinenBlock) if self.remat else LinenBlock
        layers = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=L)
        x, _ = layers(name="blocks")(x, None)
        return nn.LayerNorm(epsilon=1e-5, name="norm")(x)


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.lin = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x):
        return x + jnp.tanh(self.lin(x))


class NNXModel(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([NNXBlock(rngs) for _ in range(L)])
        self.norm = nnx.LayerNorm(D, epsilon=1e-5, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class NNXScanned(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.vmap(NNXBlock, in_axes=0)(rngs.split(L))
        self.norm = nnx.LayerNorm(D, epsilon=1e-5, rngs=rngs)

    def __call__(self, x):
        x = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        return self.norm(x)


def function(params, x):
    def block(x, layer):
        y = tap("blocks.{}.lin", x @ layer["lin"]["kernel"] + layer["lin"]["bias"])
        return tap("blocks.{}", x + jnp.tanh(y)), None

    x, _ = jax.lax.scan(jax.checkpoint(block), x, params["blocks"])
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return tap("norm", (x - mean) * jax.lax.rsqrt(variance + 1e-5) * params["norm"]["scale"] + params["norm"]["bias"])


def shapes(*of):
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), of[0], is_leaf=lambda x: isinstance(x, tuple))


PARAMS = shapes({"blocks": {"lin": {"kernel": (L, D, D), "bias": (L, D)}}, "norm": {"scale": (D,), "bias": (D,)}})

PORTS = {
    "linen, scanned": lambda: LinenRecorder(Scanned()),
    "linen, scanned and rematerialised": lambda: LinenRecorder(Scanned(remat=True)),
    "nnx": lambda: NNXRecorder(NNXModel(nnx.Rngs(0))),
    "nnx, scanned": lambda: NNXRecorder(NNXScanned(nnx.Rngs(0))),
    "function, scanned and rematerialised": lambda: FunctionRecorder(function, PARAMS, stacked={"blocks": L}),
}


def model(seed=0):
    torch.manual_seed(seed)
    built = Model()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return built


@pytest.mark.parametrize("port", PORTS)
def test_every_kind_of_port_is_compared_layer_by_layer_without_a_table(port):
    pair = Pair(TorchRecorder(model()), PORTS[port](), X)
    verdict = check(pair)
    expected = [name for i in range(L) for name in (f"blocks.{i}.lin", f"blocks.{i}")] + ["norm", OUTPUT]
    assert [row.name for row in verdict.results[0].rows] == expected
    assert [row.name for row in verdict.results[2].rows][:2] == [f"backward/{OUTPUT}", "backward/norm"]
    for result in verdict.results:
        assert result.passed, (result.rung, result.failures[0])


def test_outputs_before_and_after_a_check_are_the_same_bits_and_no_hook_is_left():
    built, port = model().train(), NNXModel(nnx.Rngs(0))
    x = torch.tensor(X)
    before, before_port = built(x), np.asarray(port(X))
    assert not check(Pair(TorchRecorder(built), NNXRecorder(port), X, convert=False)).passed, "they have different weights"
    assert torch.equal(before, built(x))
    assert np.array_equal(before_port, np.asarray(port(X)))
    assert built.training
    assert all(parameter.grad is None for parameter in built.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in built.modules())


@pytest.mark.parametrize("side", ["torch", "nnx"])
def test_a_refused_batch_is_one_line_that_names_the_side_and_leaves_nothing_behind(side):
    built, call = model(), NNXModel.__call__
    calls = {side: lambda model, batch: model(batch[:, :3])}
    pair = Pair(TorchRecorder(built, call=calls.get("torch")), NNXRecorder(NNXModel(nnx.Rngs(0)), call=calls.get("nnx")), X)
    with pytest.raises(InputError, match=rf"^the {side} model refuses the batch \(0: float32\[2, 4\]\): \w+: ") as error:
        check(pair)
    assert "\n" not in str(error.value)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in built.modules())
    assert NNXModel.__call__ is call


def test_outputs_that_are_no_arrays_are_named_with_what_to_do():
    class Odd(Model):
        def forward(self, x):
            return super().forward(x), 0

    class Cached(torch.nn.Module):
        def forward(self, x):
            return {"hidden": x, "cache": x + 1}

    class Silent(torch.nn.Module):
        def forward(self, x):
            return "no array"

    built = Odd()
    built.blocks[1].cached, built.blocks[1].silent = Cached(), Silent()
    built.blocks[1].register_forward_hook(lambda m, args, result: (m.silent(m.cached(args[0])), result)[1])
    port = NNXRecorder(NNXModel(nnx.Rngs(0)))
    with pytest.raises(InputError, match=r"^blocks\.1\.silent of the reference returns a str, which has no array: say which element"):
        check(Pair(TorchRecorder(built), port, X, {"blocks.{}.silent": "blocks.{}.lin"}))
    with pytest.raises(InputError, match=r"^take: blocks\.1\.cached returns a dict with hidden, cache, which has no element 'keys'"):
        check(Pair(TorchRecorder(built, take={"blocks.{}.cached": "keys"}), port, X))
    with pytest.raises(InputError, match=r"^take: the reference has no module block\.{} \(closest: blocks"):
        check(Pair(TorchRecorder(built, take={"block.{}": 0}), port, X))
    recording = TorchRecorder(built, take={"blocks.{}.cached": "cache"}).record(X, "float32")
    assert np.array_equal(recording.outputs["blocks.1.cached"], recording.inputs["blocks.1.cached"][0] + 1)


def test_a_port_that_stays_in_float32_can_not_be_compared_in_float64():
    class Narrow(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.LayerNorm(epsilon=1e-5, name="norm", dtype=jnp.float32)(x)

    class Norm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(D)

        def forward(self, x):
            return self.norm(x)

    verdict = check(Pair(TorchRecorder(Norm()), LinenRecorder(Narrow()), X), ("activations",))
    assert verdict.passed, "a cast of an array to float32 stays float64 in the float64 pass"


def test_a_submodule_runs_alone_on_given_inputs():
    given = np.ones((2, D), np.float32)
    for recorder in (TorchRecorder(model()), NNXRecorder(NNXModel(nnx.Rngs(0)))):
        weights = recorder.parameters(X)
        kernel = weights["blocks.1.lin.weight"].T if "blocks.1.lin.weight" in weights else weights["blocks.1.lin.kernel"]
        expected = given @ kernel + weights["blocks.1.lin.bias"]
        np.testing.assert_allclose(recorder.run_submodule(X, "blocks.1.lin", (given,), "float32"), expected, rtol=1e-5)
        assert recorder.run_submodule(X, "blocks.7", (given,), "float32") is None


def test_bfloat16_is_bounded_by_what_float32_loses():
    verdict = check(Pair(TorchRecorder(model()), LinenRecorder(Scanned()), X), ("activations", "gradients"), dtype="bfloat16")
    compared = [row for result in verdict.results for row in result.rows if row.difference is not None]
    assert verdict.passed
    assert len(compared) > 10
    assert max(row.difference for row in compared) > 1e-4, "it was not computed in bfloat16"


def test_a_bound_by_hand_replaces_the_derived_one():
    pair = Pair(TorchRecorder(model()), LinenRecorder(Scanned()), X)
    (result,) = check(pair, ("activations",), bounds={"blocks.*.lin": 1e-12}, exact_bounds={"norm": 0.5}).results
    rows = {row.name: row for row in result.rows}
    assert not rows["blocks.1.lin"].passed
    assert rows["blocks.1"].passed
    assert rows["norm"].exact_bound == 0.5


def test_assert_ported_says_in_ten_lines_where_and_why():
    class Wrong(NNXModel):
        def __call__(self, x):
            for block in self.blocks:
                x = block(x)
            return self.norm(x) * 1.001

    assert_ported(Pair(TorchRecorder(model()), NNXRecorder(NNXModel(nnx.Rngs(0))), X), rungs=("activations",))
    with pytest.raises(AssertionError, match="first diverge at <output>") as error:
        assert_ported(Pair(TorchRecorder(model()), NNXRecorder(Wrong(nnx.Rngs(0))), X), rungs=("activations", "loss"))
    lines = str(error.value).splitlines()
    assert len(lines) <= 10
    assert "1.001" in " ".join(lines[2:]), lines
