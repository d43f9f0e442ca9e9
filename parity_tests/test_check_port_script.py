"""check_port.py: a file of the user's, a table, files of the findings, and one line for what a person can mend."""

import json
import sys
from pathlib import Path

import check_port
import pytest

PORT = """
import numpy as np, torch
import jax.numpy as jnp
from flax import nnx
from flaxgpt.port.nnx_recorder import NNXRecorder
from flaxgpt.port.pair import Pair
from torch_ref.port.torch_recorder import TorchRecorder

class Net(nnx.Module):
    def __init__(self):
        self.up, self.down = nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 4, rngs=nnx.Rngs(1))
    def __call__(self, x):
        return self.down(jnp.maximum(self.up(x), 0)) * FACTOR

FACTOR = 1
NAMES = {"0": "up", "2": "down"}

def make_pair():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    return Pair(TorchRecorder(model), NNXRecorder(Net()), np.random.default_rng(0).normal(size=(3, 4)).astype("float32"), NAMES)

def no_pair():
    return 3

def broken():
    return 1 / 0
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    def run(source, *args, function="make_pair"):
        (tmp_path / "my_port.py").write_text(source, encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["check_port.py", f"{tmp_path / 'my_port.py'}:{function}", *map(str, args)])
        monkeypatch.setattr(sys, "path", [*sys.path])
        code = 0
        try:
            check_port.main()
        except SystemExit as exit:
            code = exit.code
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def test_a_correct_port_exits_with_0_and_writes_what_was_asked_for(run, tmp_path):
    files = {kind: tmp_path / f"report.{kind}" for kind in ("json", "html", "png")}
    code, out, _ = run(PORT, "--json", files["json"], "--html", files["html"], "--plot", files["png"])
    assert code == 0, out
    assert "passed: " in out
    assert [line.split()[1] for line in out.splitlines()[1:5]] == ["activations", "loss", "gradients", "clipping"]
    report = json.loads(files["json"].read_text())
    assert report["passed"]
    assert report["rungs"][0]["rows"][0]["name"] == "0"
    assert "nnx against torch" in files["html"].read_text()
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_a_wrong_port_exits_with_1_and_says_where_and_why(run, tmp_path):
    page = tmp_path / "report.html"
    code, out, _ = run(PORT.replace("FACTOR = 1", "FACTOR = 2"), "--rungs", "activations", "--html", page)
    assert code == 1
    assert "first diverge at <output>" in out
    assert "in the port" in out.splitlines()[-1], "the diagnosis names the factor"
    assert "first diverge at &lt;output&gt;" in page.read_text()


def test_a_table_is_proposed(run):
    code, out, _ = run(PORT.replace('{"0": "up", "2": "down"}', "{}"), "--propose")
    assert code == 0
    names = eval(out.partition("=")[2].partition("#")[0])
    assert names == {"0": "up", "2": "down"}


@pytest.mark.parametrize(
    ("change", "args", "message"),
    [
        (
            ('"2": "down"', '"2": "dwn"'),
            (),
            "2.weight of the reference has no parameter of the port (looked for: dwn.weight) (closest: down",
        ),
        (('"2": "down"', '"2": "down", "5": "up"'), (), "5: there is no such name in the reference"),
        (("size=(3, 4)", "size=(3, 5)"), (), "the nnx model refuses the batch (0: float32[3, 5]): TypeError: "),
        (("nnx.Linear(8, 4,", "nnx.Linear(8, 5,"), (), "2.weight is [4, 8], and down.kernel is [8, 5]"),
        (("NAMES)", "NAMES, convert=3 / 0)"), (), "ZeroDivisionError: division by zero"),
        (("", ""), ("--rungs", "everything"), "rungs: everything is none of parameters, activations"),
        (("", ""), ("--bound", "x"), "--bound x: expected NAME=VALUE"),
        (("", ""), ("--rungs", "activations", "--bound", "nosuch*=1"), "bounds: no tensor that was compared is called nosuch*"),
        (("", ""), ("--rungs", "parameters"), "rungs: nothing is left to compare"),
        (("", ""), ("--updates", "0"), "updates=0: expected at least 1"),
        (("", ""), ("--json", "/nowhere/x.json"), "can't write /nowhere/x.json"),
    ],
)
def test_bad_input_is_one_line_and_exits_with_2(run, change, args, message):
    code, _, err = run(PORT.replace(*change, 1), *args)
    assert code == 2, err
    assert message in err
    assert len(err.strip().splitlines()) == 1, err


@pytest.mark.parametrize(
    ("function", "message"), [("nothing", "has no function nothing"), ("no_pair", "returns a int: expected a"), ("broken", "line 27: Zero")]
)
def test_a_file_that_makes_no_pair_is_one_line(run, function, message):
    code, _, err = run(PORT, function=function)
    assert code == 2
    assert message in err


def test_help_shows_a_whole_file(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["check_port.py", "--help"])
    with pytest.raises(SystemExit) as exit:
        check_port.main()
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("def make_pair()", "--propose", "flaxgpt.port.pair"))
    assert Path(check_port.__file__).name == "check_port.py"
