"""scripts/parity_report.py, as a person uses it."""

import functools
import json
import os
import pickle
import re
import sys

import numpy as np
import parity_report
import pytest
import torch
from bugs import BUGS, planted
from conftest import ONE_LAYER, SMALL, random_ids, random_pair, refused, refused_by_tyro
from safetensors.torch import save_file

from flaxgpt.config import TrainConfig
from torch_ref.model import GPTModel
from torch_ref.optim import make_optimizer
from torch_ref.step import train_step

CFG = TrainConfig(model=SMALL, batch_size=2)


@pytest.fixture
def report(call):
    return functools.partial(call, parity_report)


@pytest.fixture
def checkpoint(tmp_path):
    """A file as people keep them: the state_dicts of a model and of its optimizer."""
    model, _ = random_pair(SMALL)
    optimizer = make_optimizer(model, CFG)
    batch = tuple(torch.from_numpy(random_ids(SMALL, (2, 16), seed)) for seed in (0, 1))
    for step in range(2):
        train_step(model, optimizer, batch, step, CFG)
    path = tmp_path / "model_and_optimizer.pth"
    torch.save({"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}, path)
    return path


def test_a_checkpoint_with_its_optimizer_passes_and_is_reported_in_every_form(report, checkpoint, tmp_path):
    files = {name: tmp_path / name for name in ("report.json", "layers.png", "report.html")}
    flags = ("--json", files["report.json"], "--plot", files["layers.png"], "--html", files["report.html"])
    code, out, _ = report("--state-dict", checkpoint, "--n-heads", 4, "--rungs", 1, 2, 3, "adamw", *flags)
    assert code == 0, out
    assert "passed:" in out
    written = json.loads(files["report.json"].read_text())
    assert written["passed"] is True
    assert written["first_divergence"] == {"forward": None, "backward": None}
    assert written["config"]["n_layers"] == 2
    assert [r["rung"] for r in written["rungs"]] == ["activations", "loss", "gradients", "adamw"]
    row = written["rungs"][0]["rows"][0]
    assert row["name"] == "embedding"
    assert row["passed"] is True
    assert any("the checkpoint's moments" in r["name"] for r in written["rungs"][3]["rows"])
    assert files["layers.png"].read_bytes().startswith(b"\x89PNG")
    page = files["report.html"].read_text()
    assert "<h1>flaxgpt against torch_ref</h1>" in page
    assert "data:image/png;base64," in page
    assert "http" not in page, "the page needs nothing else"


def test_a_report_against_transformers_says_so_in_every_form(report, folders, tmp_path):
    files = {name: tmp_path / name for name in ("report.json", "report.html")}
    flags = ("--rungs", 1, 3, "--length", 8, "--json", files["report.json"], "--html", files["report.html"])
    code, out, err = report("--init-from", folders / "plain", "--reference", "transformers", *flags)
    assert code == 0, out + err
    assert "flaxgpt on cpu (cpu), against transformers on cpu" in out
    assert re.search(r"^rung .* flaxgpt +transformers +float64", out, re.MULTILINE)
    written = json.loads(files["report.json"].read_text())
    assert written["reference"] == "transformers"
    assert {"torch", "transformers"} <= set(written)
    page = files["report.html"].read_text()
    assert "<h1>flaxgpt against transformers</h1>" in page
    assert "torch_ref" not in page


def test_without_transformers_it_is_said_what_to_install(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "torch_ref.parity.huggingface_side", raising=False)
    refused(
        report("--reference", "transformers"), r'--reference transformers needs transformers: pip install -e "\.\[parity,transformers\]"'
    )


def test_a_bug_makes_it_fail_and_the_first_divergence_is_named(report, checkpoint):
    (bug,) = [bug for bug in BUGS if bug.name == "erf GELU" and bug.side == "torch_ref"]
    with planted(bug):
        code, out, _ = report("--state-dict", checkpoint, "--n-heads", 4, "--rungs", 1, 3)
    assert code == 1, out
    assert "forward:  the two sides first diverge at trf_blocks.0.ff.hidden" in out
    assert "backward: the two sides first diverge at backward/" in out
    assert "FAILED" in out


def test_a_safetensors_file_and_a_preset_s_config_will_do(report, tmp_path):
    cfg = TrainConfig.preset("tiny").model
    torch.manual_seed(0)
    model = GPTModel(cfg)
    path = tmp_path / "tiny.safetensors"
    save_file({k: v.clone() for k, v in model.state_dict().items() if "mask" not in k}, path)
    code, out, _ = report("--preset", "tiny", "--state-dict", path, "--rungs", 2, "--length", 4)
    assert code == 0, out


def test_a_tied_model_s_file_is_read_as_tied(report, tmp_path):
    model, _ = random_pair(ONE_LAYER.replace(tie_embeddings=True))
    torch.save(model.state_dict(), tmp_path / "tied.pt")
    code, _, err = report("--state-dict", tmp_path / "tied.pt", "--n-heads", 4, "--rungs", 2, "--json", tmp_path / "r.json")
    assert code == 0, err
    assert json.loads((tmp_path / "r.json").read_text())["config"]["tie_embeddings"] is True


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--rungs", "11"], "rungs: 11 is none of 1 activations"),
        (["--preset", "huge"], "unknown preset 'huge'"),
        (["--checkpoint", "nowhere"], "nowhere is not a run folder"),
        (["--state-dict", "nowhere.pth"], "nowhere.pth is not a file"),
        (["--checkpoint", "a", "--preset", "tiny"], "--checkpoint brings its own config"),
        (["--device", "tpu"], "device=tpu: JAX has only cpu here"),
        (["--batch", "0"], "batch=0"),
        (["--preset", "tiny", "--n-heads", "2"], "--n-heads goes with --state-dict alone"),
        (["--length", "65"], "length=65: expected at most the model's context_length=64"),
        (["--html", "no/such/folder/x.html"], "can't write no/such/folder/x.html"),
    ],
)
def test_bad_flags_are_one_line_and_exit_code_2(report, flags, named):
    refused(report(*flags), re.escape(named))


def test_a_precision_that_there_is_not_is_refused_with_those_that_there_are(report):
    refused_by_tyro(report("--dtype", "float16"), "float16.*float32.*bfloat16.*float64")


def broken(change):
    state_dict = random_pair(SMALL)[0].state_dict()
    change(state_dict)
    return state_dict


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("pos_emb.weight"), "no matrices tok_emb.weight and pos_emb.weight"),
        (lambda s: s.update({"extra": torch.ones(1)}), "unknown: extra"),
        (
            lambda s: s.update({"final_norm.scale": torch.ones(31), "final_norm.shift": torch.ones(33)}),
            "final_norm.shift is (33,), expected",
        ),
        (lambda s: s["trf_blocks.1.norm1.shift"].fill_(np.nan), "1 of 31 tensors, the first trf_blocks.1.norm1.shift with nan at [0]"),
        (lambda s: s.update({"note": "text"}), "holds no state_dict"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_one_line_and_exit_code_2(report, tmp_path, change, named):
    path = tmp_path / "model.pt"
    torch.save(broken(change), path)
    refused(report("--state-dict", path, "--n-heads", 4), re.escape(named))


def test_an_optimizer_state_of_another_model_is_one_line_and_exit_code_2(report, checkpoint, tmp_path):
    saved = torch.load(checkpoint, weights_only=True)
    saved["model_state_dict"] = random_pair(SMALL.replace(emb_dim=64))[0].state_dict()
    torch.save(saved, tmp_path / "mixed.pth")
    refused(report("--state-dict", tmp_path / "mixed.pth", "--n-heads", 4), r"tok_emb\.weight is \(97, 32\), expected \(97, 64\)")


def test_a_pickle_that_runs_code_is_refused_unread(report, tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps({"tok_emb.weight": Harm()}))
    refused(report("--state-dict", path), "can be read safely")
    assert not (tmp_path / "harm").exists()
