"""The benchmark runs, and what it writes has every row; no time is asserted."""

import json
import re
import subprocess
import sys
from pathlib import Path

import benchmark as script
import pytest

from flaxgpt.benchmark import report
from flaxgpt.benchmark.timing import Row, alternate

SCRIPT = Path(__file__).parent.parent / "scripts" / "benchmark.py"
PEERS = {"torch_ref", "torch_ref, fused AdamW", "Hugging Face, fused AdamW"}


def benchmark(*args):
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, args)], capture_output=True, text=True)


def test_the_order_alternates_and_short_calls_are_repeated():
    calls, order = 0, []

    def count(name):
        order.append(name)

    seconds = alternate({"a": lambda: count("a"), "b": lambda: count("b")}, 3, warm=False)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}

    def call():
        nonlocal calls
        calls += 1

    alternate({"short": call}, 1)
    assert calls > 1000, "a call of less than a microsecond was timed too seldom to be measured"


def test_ratios_are_ours_over_theirs_within_the_same_work():
    rows = [Row("w", "flaxgpt", "s", (1.0, 3.0, 2.0), 0.5), Row("w", "torch", "s", (4.0,)), Row("v", "torch", "s", (), note="not there")]
    found = report.to_json(rows, {}, "command")["rows"]
    assert [(row["median"], row["ratio"]) for row in found] == [(2.0, 1.0), (4.0, 0.5), (None, None)]


def test_nobody_is_taken_for_us_where_we_were_not_timed():
    rows = [Row("w", "torch", "s", (4.0,), 1.0), Row("w", "Hugging Face", "s", (2.0,))]
    assert [row["ratio"] for row in report.to_json(rows, {}, "command")["rows"]] == [None, None]
    assert [list(column.cells)[1:] for column in report.table(rows).columns[4:]] == [["", ""], ["", ""]]


def test_a_quick_update_is_timed_beside_torch_and_the_json_and_the_picture_have_every_row(call, tmp_path):
    files = ("--json", tmp_path / "b.json", "--plot", tmp_path / "b.svg")
    code, out, err = call(script, "train", "--quick", "--parts", "forward", "update", *files)
    assert code == 0, err
    found = json.loads((tmp_path / "b.json").read_text())
    assert {(row["work"].split(",")[0], row["who"]) for row in found["rows"]} == {
        (part, who) for part in ("forward", "update") for who in {"flaxgpt"} | PEERS
    }
    assert all(0 < min(row["values"]) <= row["median"] for row in found["rows"])
    assert all(row["floor"] > 0 for row in found["rows"])
    assert found["machine"]["jax"]
    assert found["peak_memory_gb"] > 0.1
    assert found["rates"]["float32"]["flops"] > 1e8
    picture = (tmp_path / "b.svg").read_text()
    assert picture.lstrip().startswith("<?xml")
    assert all(text in out for text in ("flaxgpt", "torch_ref, fused AdamW", "ours / floor"))


@pytest.mark.slow
def test_everything_quick_has_rows_of_every_kind(tmp_path):
    ran = benchmark("all", "--quick", "--json", tmp_path / "b.json")
    assert ran.returncode == 0, ran.stderr
    found = json.loads((tmp_path / "b.json").read_text())["rows"]
    kinds = ("forward", "gradients", "optimizer", "update", "1 tokens", "8 tokens", "a run of", "compiling", "peak memory", "patching")
    assert [kind for kind in kinds if not any(row["work"].startswith(kind) and row["values"] for row in found)] == []
    assert {row["who"] for row in found if row["work"].startswith("a run of")} == {"train_jax.py", "train_torch.py"}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train", "--rows", "0"], "rows=0: expected at least 1"),
        (["generate", "--preset", "tiny", "--new-tokens", "64"], "exceed context_length=64"),
        (["train", "--plot", "x.pdf"], "expected a name that ends in .png or .svg"),
        (["train", "--json", "nowhere/x.json"], "there is no folder nowhere"),
        (["compile", "--depths", "0"], "depths=(0,): expected numbers from 1 on"),
        (["train", "--preset", "gpt5"], "gpt5"),
        (["run", "--quick", "--against", "false"], "ended with 1"),
        (["run", "--against", "no-such-program x"], "expected a command that can be run"),
        (["all", "--preset", "tiny"], "exceed context_length=64"),
        (["train", "--json", "/dev"], "can't write /dev: it is not a file"),
        (["train", "--only", "torch_ref", "--plot", "x.png"], "name flaxgpt too in --only"),
        (["train", "--quick", "--only", "nobody"], "--only nobody names nobody"),
    ],
)
def test_what_is_asked_for_wrongly_is_one_line(call, args, words):
    code, out, err = call(script, *args)
    assert code == 2, out + err
    assert words in " ".join(re.sub("[│╭╮╰╯─]", " ", err).split()), err
    assert "Traceback" not in err
