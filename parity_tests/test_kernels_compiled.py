"""Fused attention and the loss in chunks, compiled for a TPU v5e slice and eight H100 that are not attached.

Needs libtpu, or JAX's CUDA plugin and cuDNN, in an environment of its own, and nothing of the other tests (see test_accelerators.py).
"""

import functools
import importlib.util
import json
import math
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# The gradients of attention and of the loss, 16 rows of 1024 tokens on each of 2 x 2 x 2 devices, at the sizes of gpt2-124m.
PROGRAM = r"""
import functools, json, re, sys
from flaxgpt.plan.targets import find_target
devices = find_target(sys.argv[1]).devices
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from flaxgpt.config import GPTConfig
from flaxgpt.kernels import choose_attention, current_platform, fused_attention
from flaxgpt.loss import head_loss

cfg = GPTConfig(dtype="bfloat16", drop_rate=0.0, vocab_multiple=64)
N, T, H, V = cfg.n_heads, cfg.context_length, 64, cfg.padded_vocab

def plain(q, k, v):
    scores = jnp.einsum("BNTH,BNSH->BNTS", q, k, preferred_element_type=jnp.float32) / H**0.5
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -jnp.inf)).astype(q.dtype)
    return jnp.einsum("BNTS,BNSH->BNTH", weights, v)

def fused(*qkv):
    return fused_attention(*qkv, choose_attention(cfg, T, current_platform()).implementation)

def loss(chunk):
    return functools.partial(head_loss, cfg=cfg.replace(loss_chunk=chunk))

def spec(*axes):
    return NamedSharding(mesh, P(*axes))

results = {}
mesh = Mesh(np.reshape(devices, (2, 2, 2)), ("data", "fsdp", "tensor"))
with jax.set_mesh(mesh):
    x = jax.ShapeDtypeStruct((2, 32, N, T, H), cfg.dtype, sharding=spec("data", "fsdp", "tensor"))
    of_attention = [(name, lambda *qkv, f=f: jnp.sin(f(*qkv).astype(jnp.float32)).sum(), (x, x, x), (0, 0, 0), (0, 1, 2))
                    for name, f in (("plain", plain), ("fused", fused))]
    rows = [jax.ShapeDtypeStruct((2, 32, T, *D), dtype, sharding=spec("data", "fsdp")) for D, dtype in (((768,), cfg.dtype), ((), "int32"))]
    kernel = jax.ShapeDtypeStruct((768, V), "float32", sharding=spec("fsdp", "tensor"))
    of_loss = [(name, loss(chunk), (rows[0], kernel, rows[1]), (0, None, 0), (0, 1)) for name, chunk in (("whole", 0), ("chunks", None))]
    for name, f, args, axes, argnums in of_attention + of_loss:
        gradients = jax.vmap(jax.grad(f, argnums), axes, spmd_axis_name="data")
        program = jax.jit(gradients).lower(*args).compile()
        results[name] = {"temporaries": program.memory_analysis().temp_size_in_bytes, "program": program.as_text()}
print(json.dumps(results))
"""


def needs(*modules: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not all(map(importlib.util.find_spec, modules)), reason=f"compiling for it needs {' and '.join(modules)}")


TPU = pytest.param("tpu:v5e:2x4", "tpu_custom_call", marks=needs("libtpu"), id="tpu")
GPU = pytest.param("gpu:h100x8", "__cudnn$fmhaSoftmax", marks=needs("jax_cuda13_plugin", "nvidia", "nvidia.cudnn"), id="gpu")
on_both = pytest.mark.parametrize(("target", "kernel"), [TPU, GPU])


@functools.cache
def compiled(target: str) -> dict:
    done = subprocess.run([sys.executable, "-c", PROGRAM, target], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@on_both
def test_fused_attention_compiles_on_a_mesh_and_holds_no_weights(target, kernel):
    fused, plain = compiled(target)["fused"], compiled(target)["plain"]
    assert fused["program"].count(kernel) >= 2, "forward and backward are not both the kernel's"
    assert kernel not in plain["program"]
    assert fused["temporaries"] < plain["temporaries"] / 4
    assert "all-gather" not in fused["program"], "queries, keys or values are gathered"


@on_both
def test_the_loss_in_chunks_compiles_on_a_mesh_and_holds_no_logits_of_whole_rows(target, kernel):
    chunks, whole = compiled(target)["chunks"], compiled(target)["whole"]
    logits = 16 * 1024 * math.ceil(50257 / 2) * 4
    assert whole["temporaries"] > logits
    assert chunks["temporaries"] < whole["temporaries"] / 4
