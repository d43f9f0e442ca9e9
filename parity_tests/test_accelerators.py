"""The programs that a TPU v5e slice and eight H100 would run, compiled without them and read: what is held, and what crosses the wire.

Each plan is made by `scripts/plan.py` in a process of its own. It needs libtpu or JAX's CUDA plugin, which `.ci/run` installs in an
environment of its own, and nothing of the other tests: `pytest --noconftest -m slow parity_tests/test_accelerators.py`.

For a TPU these are seven programs, of 50 to 75 seconds of processor time each: both models where it is about what is sent, gpt2-1558m
for memory and depth, gpt2-124m where the layers' size changes nothing. A program is compiled once, however many tests read it: those
stand together, so that pytest-xdist gives them to one process.
"""

import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "plan.py"
SPLIT = ("--fsdp", "8", "--gather", "layer")
GIB = 2**30


def needs(*modules: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not any(map(importlib.util.find_spec, modules)), reason=f"compiling for it needs {' or '.join(modules)}")


TPU = pytest.param("tpu:v5e:2x4", marks=needs("libtpu"), id="tpu")
GPU = pytest.param("gpu:h100x8", marks=needs("jax_cuda12_plugin", "jax_cuda13_plugin"), id="gpu")
on_both = pytest.mark.parametrize("target", [TPU, GPU])
pytestmark = pytest.mark.slow


@functools.cache
def plan(target: str, preset: str, *flags: str) -> dict:
    """The plan of a preset: 512 rows in 32 microbatches, which are 2 rows on each of eight devices."""
    command = [sys.executable, str(SCRIPT), "--json", "--target", target, "--preset", preset, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rows"] == 2
    assert not found["doubts"]
    assert found["attention"].startswith("splash" if target.startswith("tpu") else "cudnn")
    return found


def said(rows: list[dict]) -> str:
    return "\n".join(str(row) for row in rows)


def sent(rows: list[dict]) -> float:
    return sum(row["wire_bytes"] for row in rows)


def check_fsdp(found: dict) -> None:
    """Weights are gathered and gradients scattered, and nothing that has a row of the batch is sent.

    Where a product can begin before its weights are there, a TPU gathers (and scatters) them in a ring of permutes.
    """
    rows, ring = found["traffic"], "weights or gradients"
    activations = [row for row in rows if row["what"] in ("activations", "tokens")]
    assert not activations, f"activations or logits are sent:\n{said(activations)}"
    gathered = [row for row in rows if row["kind"] == "all-gather" and row["what"] != "weights"]
    assert not gathered, f"something else than weights is gathered:\n{said(gathered)}"
    layers = [row for row in rows if row["place"] == "layer loop"]
    assert any(row["kind"] == "all-gather" or row["what"] == ring for row in layers), "no weights are gathered layer by layer"
    assert any(row["kind"] == "reduce-scatter" or row["what"] == ring for row in layers), "no gradients are scattered layer by layer"
    whole = [row for row in layers if row["kind"] == "all-reduce"]  # biases and norms are not split
    assert sent(whole) <= 0.01 * sent(layers), f"gradients are added up whole:\n{said(whole)}"


def check_one_reduction(rows: list[dict], gradient_bytes: float) -> None:
    """Gradients are added up once an update, in float32."""
    within = [row for row in rows if row["place"] != "outside"]
    assert not within, f"collectives stand in a loop:\n{said(within)}"
    rounded = [row for row in rows if row["what"] == "gradients" and row["dtype"] != "f32"]
    assert not rounded, f"gradients are added up in less than float32:\n{said(rounded)}"
    assert sent(rows) <= 2.2 * gradient_bytes, f"{sent(rows) / gradient_bytes:.2f} times the gradients are sent"
    assert sent(rows) >= gradient_bytes, "fewer bytes than adding up the gradients takes"


@on_both
@pytest.mark.parametrize("preset", ["gpt2-124m", "gpt2-1558m"])
def test_fsdp_gathers_weights_scatters_gradients_and_moves_no_activation(target, preset):
    check_fsdp(plan(target, preset, *SPLIT))


@on_both
def test_the_largest_model_on_eight_devices_peaks_below_5_5_gib(target):
    found = plan(target, "gpt2-1558m", *SPLIT)
    assert found["peak_bytes"] <= 5.5 * GIB, f"{found['peak_bytes'] / GIB:.2f} GiB"
    assert found["fits"]


@on_both
def test_48_layers_compile_in_at_most_half_again_the_time_of_12(target):
    def seconds(layers: int) -> float:
        return plan(target, "gpt2-1558m", *SPLIT, *(("--n-layers", str(layers)) if layers != 48 else ()))["compile_seconds"]

    assert seconds(48) <= 1.5 * seconds(12), f"{seconds(48):.1f} s against {seconds(12):.1f} s: is the scan unrolled?"


@on_both
def test_the_program_computes_no_more_than_the_model_and_one_forward_pass_again(target):
    found = plan(target, "gpt2-124m", *SPLIT)
    ratio = found["program_flops"] / found["model_flops"]
    assert 0.95 <= ratio <= 1.4, f"the program computes {ratio:.2f} times what the model takes"


@pytest.mark.parametrize(
    ("target", "preset"),
    [
        pytest.param(*TPU.values, "gpt2-124m", marks=TPU.marks, id="tpu-124m"),  # of 1558m, weights and moments alone are 17.4 GiB
        pytest.param(*GPU.values, "gpt2-124m", marks=GPU.marks, id="gpu-124m"),
        pytest.param(*GPU.values, "gpt2-1558m", marks=GPU.marks, id="gpu-1558m"),
    ],
)
def test_data_parallelism_adds_up_gradients_once_an_update(target, preset):
    found = plan(target, preset)
    check_one_reduction(found["traffic"], found["params_bytes"])


@on_both
@pytest.mark.parametrize("preset", ["gpt2-124m", "gpt2-1558m"])
def test_fsdp_and_data_parallelism_together_do_both(target, preset):
    found = plan(target, preset, "--fsdp", "4", "--gather", "layer")
    check_fsdp(found)
    across = [row for row in found["traffic"] if row["group"] != 4]
    check_one_reduction([row for row in across if row["what"] == "gradients"], found["params_bytes"])
    assert all(row["place"] == "outside" for row in across), f"the data axis is used in a loop:\n{said(across)}"


@on_both
def test_what_is_gathered_once_an_update_is_sent_once(target):
    found = plan(target, "gpt2-124m", "--fsdp", "8", "--gather", "update")
    within = [row for row in found["traffic"] if row["place"] != "outside"]
    assert not within, f"collectives stand in a loop:\n{said(within)}"
    whole = 8 * found["params_bytes"]  # in float32
    weights, gradients = (sent([row for row in found["traffic"] if row["what"] == what]) for what in ("weights", "gradients"))
    assert 0.4 * whole <= weights <= whole, f"{weights / whole:.2f} times the weights are sent, of which matrices are gathered in bfloat16"
    assert 0.8 * whole <= gradients <= 1.1 * whole, f"{gradients / whole:.2f} times the gradients are sent, which scattering takes once"
