"""Each mistake planted in a port is found at its tensor, and the diagnosis says which it is."""

import re
from pathlib import Path

import gpt2_pair
import llama
import llama_pair
import numpy as np
import pytest
from port_mistakes import MISTAKES, STORY, changed, draft

from flaxgpt.port.check import NUMBERED, check

PORT_PAGE = Path(__file__).parent.parent / "docs" / "port.md"
FAST = ("eps 1e-6", "grouped heads tiled", "exact GELU")
FORWARD = ("activations",)


def slowly(mistake):
    return pytest.param(mistake, id=f"{mistake.port}: {mistake.name}", marks=() if mistake.name in FAST else pytest.mark.slow)


@pytest.mark.parametrize("mistake", [slowly(mistake) for mistake in MISTAKES])
def test_a_planted_mistake_is_found_and_explained(mistake):
    verdict = check(mistake.planted(), ("activations", "gradients") if mistake.backward else FORWARD)
    assert verdict.first["backward" if mistake.backward else "forward"] == mistake.first, (
        f"{mistake.name} is found elsewhere, or not at all"
    )
    said = "\n".join(verdict.diagnosis)
    assert mistake.says in said, f"{mistake.name}: the diagnosis is\n{said}"
    assert mistake.suspect == (" in the port, " in said), "a cause is named only for what is on the list"


@pytest.mark.slow
@pytest.mark.parametrize("pair", [llama_pair, gpt2_pair])
def test_a_correct_port_passes_every_rung(pair):
    verdict = check(pair.make_pair())
    assert verdict.passed, [row for result in verdict.results for row in result.failures][:3]
    assert {result.rung for result in verdict.results} >= {"activations", "loss", "gradients", "clipping", "adamw", "training"}
    assert verdict.diagnosis == ()


def drawn(seed):
    """Sizes of a model and a batch, all kinds of them."""
    draw = np.random.default_rng(seed)
    H, K = int(2 * draw.integers(1, 9)), int(draw.integers(1, 4))
    N = K * int(draw.integers(1, 4))
    sizes = {"V": draw.integers(20, 300), "D": N * H, "F": draw.integers(3, 100), "N": N, "K": K, "layers": draw.integers(1, 3)}
    return {name: int(size) for name, size in {**sizes, "B": draw.integers(1, 5), "T": draw.integers(4, 33)}.items()}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 50))])
def test_a_correct_port_gives_no_false_alarm(seed):
    rungs = NUMBERED if seed % 10 == 1 else ("activations", "loss", "gradients")  # updates are compiled for each shape
    verdict = check(llama_pair.make_pair(seed=seed, **drawn(seed)), rungs)
    assert verdict.passed, (drawn(seed), [row for result in verdict.results for row in result.failures][:3])


OTHERS = (
    ("scale 0.37", " / H**0.5", " * 0.37"),
    ("a softcap", " / H**0.5", " / H**0.5; scores_BNTS = 20 * jnp.tanh(scores_BNTS / 20)"),
    ("an odd eps", "variance + self.eps", "variance + 3.3e-5"),
    ("an odd base", "10000.0", "9999.0"),
    ("another activation", "nn.silu(gate_BTF)", "gate_BTF * jax.nn.sigmoid(1.1 * gate_BTF)"),
    ("a window", "jnp.tril(jnp.ones((T, T), bool))", "jnp.tril(jnp.ones((T, T), bool)) & ~jnp.tril(jnp.ones((T, T), bool), -5)"),
    ("noise", 'name="norm")(x_BTD)', 'name="norm")(x_BTD + 1e-3 * jnp.cos(999 * x_BTD))'),
)  # fmt: skip


@pytest.mark.parametrize(("name", "old", "new"), [pytest.param(*row, id=row[0], marks=pytest.mark.slow) for row in OTHERS])
def test_what_is_no_usual_suspect_is_described_and_not_blamed_on_one(name, old, new):
    verdict = check(llama_pair.make_pair(changed(llama, (old, new))), FORWARD)
    said = "\n".join(verdict.diagnosis)
    assert not verdict.passed
    assert "none of the usual suspects explains it" in said, f"{name}: {said}"


def test_the_table_in_the_docs_is_the_catalogue():
    rows = re.findall(r"^\| ([^|]+) \| (llama|gpt2) \| `([^|]+)` \| ([^|]+) \|$", PORT_PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [(mistake.name, mistake.port, mistake.first, mistake.says) for mistake in MISTAKES]


def without_figures(text):
    return re.sub(r"\d(\.\d+)?e[+-]\d+", "#", " ".join(text.split()))


@pytest.mark.slow
def test_the_story_in_the_docs_is_what_the_tool_says():
    page, left = without_figures(PORT_PAGE.read_text(encoding="utf-8")), STORY
    told = []
    while not (verdict := check(draft(*left), FORWARD)).passed:
        told.append(" ".join(verdict.diagnosis))
        assert without_figures(told[-1]) in page, f"docs/port.md tells another story: {told[-1]}"
        fixed = [name for name in left if next(m for m in MISTAKES if m.name == name).says.split(" in the port")[0] in told[-1]]
        assert fixed, f"nothing that is left in the draft was named: {told[-1]}"
        left = tuple(name for name in left if name not in fixed)
    assert not left
    assert len(told) == 3
