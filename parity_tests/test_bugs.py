"""Each planted bug is caught on the rung that is there to catch it."""

import re
from pathlib import Path

import pytest
from bugs import BUGS, planted
from conftest import SMALL
from test_ladder import climb

from flaxgpt.config import TrainConfig
from flaxgpt.parity.compare import first_divergence
from flaxgpt.parity.problem import make_problem

PARITY_PAGE = Path(__file__).parent.parent / "docs" / "parity.md"
FAST = ("erf GELU", "positions off by one", "schedule off by one")


@pytest.fixture(scope="module")
def problem():
    return make_problem(TrainConfig(model=SMALL.replace(qkv_bias=True, drop_rate=0.1)), batch=4, steps=2)


def slowly(bug):
    return pytest.param(bug, id=f"{bug.side}: {bug.name}", marks=() if bug.name in FAST else pytest.mark.slow)


@pytest.mark.parametrize("bug", [slowly(bug) for bug in BUGS])
def test_a_planted_bug_is_caught_on_its_rung(bug, problem):
    # In float64, where bounds are a billion times tighter; a report in any precision has that column.
    with planted(bug) as side:
        (result,) = climb(problem, (bug.rung,), "float64", **{"ours" if bug.side == "flaxgpt" else "theirs": side})
    assert not result.passed, f"{bug.name} in {bug.module} goes unnoticed on rung {bug.rung}"
    assert bug.first in (None, result.failures[0].name), "it is noticed, but somewhere else"


def test_with_no_bug_planted_the_same_rungs_pass(problem):
    for result in climb(problem, ("activations", "adamw"), "float64"):
        assert result.passed, result.failures[0]


def test_the_first_divergence_is_named_forward_and_backward(problem):
    (bug,) = [bug for bug in BUGS if bug.name == "erf GELU" and bug.side == "torch_ref"]
    with planted(bug) as side:
        results = climb(problem, ("activations", "gradients"), theirs=side)
    divergence = first_divergence(results)
    assert divergence["forward"] == "trf_blocks.0.ff.hidden"
    assert divergence["backward"] == "backward/logits", "the gradient starts from other logits"


def test_the_table_in_the_docs_is_the_catalogue():
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", PARITY_PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    listed = {(name, rung): (ours, theirs) for name, rung, ours, theirs in rows}
    sides = {(bug.name, bug.rung): {other.side for other in BUGS if other.name == bug.name} for bug in BUGS}
    caught = {bug: tuple("caught" if side in found else "-" for side in ("flaxgpt", "torch_ref")) for bug, found in sides.items()}
    listed = {bug: entries for bug, entries in listed.items() if set(entries) <= {"caught", "-"}}  # the other tables of the page
    assert listed == caught
