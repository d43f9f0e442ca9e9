"""The page of an inspection, in a browser."""

import json
import re
import time

import numpy as np
import pytest

from flaxgpt.errors import InputError
from flaxgpt.interpret import page
from flaxgpt.interpret.inspection import Inspection, Lens
from flaxgpt.interpret.page import save_page
from flaxgpt.interpret.scores import log_softmax, rank

TITLE = "</script><script>alert(2)</script> <!-- {{data}}"
LABELS = ("<script>", "alert(1)", "</script>", '"', "'", "&amp;", "😀", r"a\n", r"\\n", "␣x", "\u2028", "東京", "$1", "]]>", "", "z")


@pytest.fixture(scope="module")
def inspection():
    """Sixteen tokens, each once, in a vocabulary of 20; random numbers."""
    rng = np.random.default_rng(0)
    labels = (*LABELS, "never1", "never2", "never3", "never4")
    L, N, T, V, K = 3, 2, len(LABELS), len(labels), 4
    ids_T = rng.permutation(T).astype(np.int32)
    logits_MTV = rng.normal(scale=1.2, size=(L + 1, T, V)).astype(np.float32)
    logits_MTV[:, range(T - 1), ids_T[1:]] += rng.uniform(0, 4, size=T - 1)  # some are expected, and some are not
    log_probs_MTV = log_softmax(logits_MTV)
    top_ids_MTK = np.argsort(-logits_MTV, -1)[..., :K].astype(np.int32)
    next_MT = np.broadcast_to(np.append(ids_T[1:], 0), (L + 1, T))
    next_log_probs_MT = np.take_along_axis(log_probs_MTV, next_MT[..., None], -1)[..., 0]
    next_log_probs_MT[:, -1] = np.nan
    next_ranks_MT = rank(logits_MTV, next_MT)
    next_ranks_MT[:, -1] = 0
    lens = Lens(top_ids_MTK, np.take_along_axis(log_probs_MTV, top_ids_MTK, -1), next_log_probs_MT, next_ranks_MT)
    weights_LNTS = np.tril(rng.uniform(size=(L, N, T, T)) ** 3)
    weights_LNTS /= weights_LNTS.sum(-1, keepdims=True)
    return Inspection(ids_T, labels, logits_MTV[-1], lens, weights_LNTS.astype(np.float32))


@pytest.fixture
def opened(browser, inspection, tmp_path):
    save_page(inspection, tmp_path / "page.html", title=TITLE)
    opened = browser.open(tmp_path / "page.html")
    yield opened
    assert opened.complaints == []
    assert opened.requests == [(tmp_path / "page.html").as_uri()], "the page asks for something"


def rows(opened, table):
    """The cells of a table."""
    return opened.evaluate(f"[...document.querySelectorAll('#{table} tbody tr')].map(r => [...r.cells].map(c => c.textContent))")


def true_rows(opened, table):
    return opened.evaluate(f"[...document.querySelectorAll('#{table} tr.true')].map(r => [...r.cells].map(c => c.textContent))")


def number(cell):
    """What a cell of the page says: 12.5% is 0.125."""
    value = float(cell.rstrip("%").replace(",", ""))
    return value / 100 if cell.endswith("%") else value


def button(t):
    return f"document.querySelectorAll('#text button')[{t}]"


def choose(opened, mean_or_layer, mean_or_head):
    for name, value in (("layer", mean_or_layer), ("head", mean_or_head)):
        opened.evaluate(f"e = document.getElementById('{name}'), e.value = '{value}', e.dispatchEvent(new Event('change'))")


def test_every_token_is_shown_as_it_is_called_and_nothing_of_it_is_run(opened, inspection):
    shown = opened.evaluate("[...document.querySelectorAll('#text button')].map(b => b.textContent)")
    assert shown == [inspection.labels_V[i] for i in inspection.ids_T] + ["▸next"]
    assert opened.evaluate("document.title") == opened.evaluate("document.querySelector('h1').textContent") == TITLE
    assert opened.evaluate("document.scripts.length") == 2  # the data and the page's own


def test_a_token_is_coloured_by_its_surprise(opened, inspection):
    most = np.log(len(inspection.labels_V))
    scale = opened.evaluate("[...document.querySelectorAll('#text button')].map(b => b.style.getPropertyValue('--s'))")
    assert scale[0] == scale[-1] == ""  # neither is predicted
    np.testing.assert_allclose([float(s) for s in scale[1:-1]], np.minimum(inspection.surprises_T[1:] / most, 1), atol=6e-4)
    colors = opened.evaluate("[...document.querySelectorAll('#text button')].map(b => getComputedStyle(b).backgroundColor)")
    assert len(set(colors)) > 3


@pytest.mark.parametrize("t", [1, 7, 15])
def test_a_click_shows_the_alternatives_of_the_token(opened, inspection, t):
    opened.click(button(t))
    assert opened.evaluate(f"{button(t)}.getAttribute('aria-pressed')") == "true"
    assert opened.evaluate("document.querySelectorAll('#text [aria-pressed=true]').length") == 1
    true, logits_V, log_probs_V = inspection.ids_T[t], inspection.logits_TV[t - 1], inspection.log_probs_TV[t - 1]
    order = np.argsort(-logits_V)[:10]
    expected = [*order, *([] if true in order else [true])]
    shown = rows(opened, "alternatives")
    assert [row[1] for row in shown] == [inspection.labels_V[i] for i in expected]
    assert [number(row[0]) for row in shown] == [rank(logits_V, i) for i in expected]
    np.testing.assert_allclose([number(row[2]) for row in shown], np.exp(log_probs_V[expected]), rtol=6e-3)
    np.testing.assert_allclose([number(row[3]) for row in shown], logits_V[expected], atol=6e-3)
    assert [row[1] for row in true_rows(opened, "alternatives")] == [inspection.labels_V[true]]
    said = opened.evaluate("document.getElementById('said').textContent")
    assert f"Rank {inspection.next_ranks_T[t - 1]} of 20, surprise {inspection.surprises_T[t]:.2f}" in said
    assert f"{inspection.entropies_T[t - 1]:.2f} nats" in said


def test_a_click_shows_the_lens_from_the_last_layer_down(opened, inspection):
    opened.click(button(5))
    lens, p = inspection.lens, 4
    shown = rows(opened, "layers")[::-1]
    assert [row[0] for row in shown] == ["embedding", "layer 0", "layer 1", "layer 2"]
    assert [number(row[1]) for row in shown] == lens.next_ranks_MT[:, p].tolist()
    np.testing.assert_allclose([number(row[2]) for row in shown], np.exp(lens.next_log_probs_MT[:, p]), rtol=6e-3)
    for m in range(4):
        labels = opened.evaluate(f"[...document.querySelectorAll('#layers tbody tr')].at(-1 - {m}).querySelectorAll('code').length")
        assert labels == lens.top_ids_MTK.shape[-1]
        assert shown[m][3].startswith(f"{inspection.labels_V[lens.top_ids_MTK[m, p, 0]]} ")
    percents = [number(f"{x}%") for x in re.findall(r" ([\d.e-]+)%", shown[2][3])]
    np.testing.assert_allclose(percents, np.exp(lens.top_log_probs_MTK[2, p]), rtol=6e-3)


@pytest.mark.parametrize(("layer", "head"), [("mean", "mean"), (1, "mean"), ("mean", 1), (2, 0)])
def test_attention_of_a_layer_and_head_or_their_mean_lies_under_the_text(opened, inspection, layer, head):
    t = 9
    opened.click(button(t))
    choose(opened, layer, head)
    chosen = inspection.weights_LNTS[slice(None) if layer == "mean" else [layer]][:, slice(None) if head == "mean" else [head]]
    expected = chosen.mean((0, 1))[t]
    shown = rows(opened, "weights")
    assert len(shown) == t + 1
    for position, label, weight in shown:
        assert label == inspection.labels_V[inspection.ids_T[int(position)]]
        assert number(weight) == pytest.approx(expected[int(position)], abs=0.5 / 255 + 0.0005)
    assert [number(row[2]) for row in shown] == sorted((number(row[2]) for row in shown), reverse=True)
    shades = opened.evaluate("[...document.querySelectorAll('#text button')].map(b => Number(b.style.getPropertyValue('--a')))")
    np.testing.assert_allclose(shades, np.append(expected / expected.max(), 0), atol=0.02)
    assert shades[t + 1 :] == [0] * (len(shades) - t - 1)


def test_the_keyboard_goes_through_the_text_and_chooses(opened, inspection):
    length = len(inspection.ids_T)
    focused = "[...document.querySelectorAll('#text button')].indexOf(document.activeElement)"
    opened.press("Tab")
    assert opened.evaluate(focused) == length - 1  # the one that is chosen at first
    for key, expected in [
        ("ArrowLeft", length - 2),
        ("Home", 0),
        ("ArrowLeft", 0),
        ("ArrowRight", 1),
        ("End", length),
        ("ArrowRight", length),
    ]:
        opened.press(key)
        assert opened.evaluate(focused) == expected, key
    chosen = "document.getElementById('chosen').textContent"
    assert opened.evaluate(chosen).startswith(f"Token {length - 1}")  # arrows do not choose
    opened.press("Enter")
    assert opened.evaluate(chosen) == "What comes next"
    for key, above in (("ArrowUp", True), ("ArrowDown", False)):
        before = opened.evaluate("document.activeElement.offsetTop")
        opened.press(key)
        after = opened.evaluate("document.activeElement.offsetTop")
        assert (after < before) if above else (after > before), f"{key} does not leave the line"
    assert opened.evaluate("document.querySelectorAll('#text [tabindex=\"0\"]').length") == 1


def test_the_first_token_has_no_alternatives_and_what_comes_next_has_no_rank_and_no_attention(opened, inspection):
    hidden = "['alternatives', 'lens', 'attention'].map(id => document.getElementById(id).hidden)"
    opened.click(button(0))
    assert opened.evaluate(hidden) == [True, True, False]
    assert rows(opened, "weights") == [["0", inspection.labels_V[inspection.ids_T[0]], "100.0%"]]
    opened.click(button(len(inspection.ids_T)))
    assert opened.evaluate(hidden) == [False, False, True]
    assert true_rows(opened, "alternatives") == true_rows(opened, "layers") == []
    assert [row[1] for row in rows(opened, "layers")] == ["–"] * 4
    assert number(rows(opened, "alternatives")[0][2]) == pytest.approx(np.exp(inspection.log_probs_TV[-1].max()), rel=6e-3)


def test_the_page_fits_the_width_of_a_phone(browser, inspection, tmp_path):
    save_page(inspection, tmp_path / "page.html", title="A" * 100)
    opened = browser.open(tmp_path / "page.html", width=360, height=700)
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_page_of_logits_alone_shows_what_there_is(browser, inspection, tmp_path):
    save_page(Inspection(inspection.ids_T[:1], inspection.labels_V, inspection.logits_TV[:1]), tmp_path / "page.html", title="one token")
    opened = browser.open(tmp_path / "page.html")
    opened.click(button(1))
    assert len(rows(opened, "alternatives")) == 10
    assert opened.evaluate("['lens', 'attention', 'shade'].map(id => document.getElementById(id).hidden)") == [True] * 3
    assert opened.complaints == []


def test_logits_that_are_shown_alike_have_ranks_of_their_own(browser, inspection, tmp_path):
    logits_TV = np.array([[1.00003, 1.00004, 1.00004, 0.5]], np.float32)
    save_page(Inspection(np.zeros(1, np.int32), inspection.labels_V[:4], logits_TV), tmp_path / "page.html", title="close")
    opened = browser.open(tmp_path / "page.html")
    opened.click(button(1))
    assert [row[0] for row in rows(opened, "alternatives")] == ["1", "1", "3", "4"]


def test_the_browser_refuses_whatever_the_page_might_ask_the_network_for(browser, inspection, tmp_path):
    save_page(inspection, tmp_path / "page.html", title="alone")
    opened = browser.open(tmp_path / "page.html")
    opened.evaluate("(new Image()).src = 'https://example.invalid/x.png'")
    deadline = time.monotonic() + 10
    while not opened.complaints and time.monotonic() < deadline:
        time.sleep(0.05)
    assert ["Content Security Policy" in str(complaint) for complaint in opened.complaints] == [True]


def test_the_data_can_not_end_its_script_element(inspection, tmp_path):
    save_page(inspection, tmp_path / "page.html", title=TITLE)
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1]
    assert "<" not in data
    assert data.isascii()
    assert set(json.loads(data)["labels"].values()) >= {"<script>", "</script>", "\u2028", "😀"}
    assert json.loads(data)["title"] == TITLE
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)|url\(|@import|fetch\(""", html), "the page names something outside it"


def test_a_page_that_would_be_too_large_is_refused_and_says_what_to_leave_out(inspection, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "LARGEST", 5000)
    with pytest.raises(InputError, match="shorten the text"):
        save_page(inspection, tmp_path / "page.html", title="small")
    monkeypatch.undo()
    long = 1024
    weights_LNTS = np.broadcast_to(np.float32(1 / long), (12, 12, long, long))
    large = Inspection(np.zeros(long, np.int32), inspection.labels_V, np.zeros((long, 20), np.float32), None, weights_LNTS)
    with pytest.raises(InputError, match=r"would have 101 MB, and 101 of them would be attention; .* or leave out attention"):
        save_page(large, tmp_path / "page.html", title="large")
    assert list(tmp_path.iterdir()) == []
