"""Watching a run: TensorBoard, Weights & Biases, MFU, what the time goes to, the profiler's trace and the page."""

import gzip
import importlib.util
import json
import shutil
import signal
import sys
import threading
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import train_jax
import train_torch
from conftest import FLAGS, ONE_LAYER, SMALL, TEXT, refused, run_to_the_end

import flaxgpt.checkpoint
import flaxgpt.train
from flaxgpt.checkpoint import Checkpoints
from flaxgpt.config import GPTConfig
from flaxgpt.data.token_files import Checked
from flaxgpt.errors import InputError
from flaxgpt.model import init_params
from flaxgpt.plan.targets import CHIPS, Target
from flaxgpt.run import watchers
from flaxgpt.run.cli import parse_updates
from flaxgpt.run.folder import COLUMNS, PARTS, RunFolder, read_metrics
from flaxgpt.run.report import _spread, save_report
from flaxgpt.run.setup import prepare
from flaxgpt.run.throughput import flops_per_token, spent

TIMES = ("tokens_per_second", "seconds", *(f"seconds/{part}" for part in PARTS))


def stopped_and_resumed(cfg, folder):
    """A run of 12 updates that was killed after the last one, before its checkpoint: resumed from update 10. "whole" was not killed."""
    run_to_the_end(cfg, folder)
    shutil.copytree(folder, folder.with_name("whole"))
    shutil.rmtree(folder / "checkpoints" / "12")
    run_to_the_end(cfg, folder, resume=True)


def events(folder):
    """What TensorBoard shows: (step, value) of each scalar, and of each text."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.plugin_event_accumulator", reason="tensorboard is not installed")
    found = reader.EventAccumulator(str(folder / "tensorboard"), size_guidance={reader.TENSORS: 0}).Reload()
    from tensorboard.util import tensor_util

    shown = {}
    for tag in found.Tags()[reader.TENSORS]:
        values = [
            (event.step, tensor_util.make_ndarray(event.tensor_proto)) for event in found.Tensors(tag) if not tag.startswith("_hparams_")
        ]
        shown[tag] = [(step, value.item() if value.dtype == np.float32 else value.item().decode()) for step, value in values]
    return shown, found


def test_tensorboard_has_every_number_the_samples_and_the_config(config, tmp_path):
    run_to_the_end(config.replace(tensorboard=True), tmp_path / "run")
    shown, found = events(tmp_path / "run")
    for name in set(COLUMNS) - {"step"}:
        expected = [(r["step"], float(np.float32(r[name]))) for r in read_metrics(tmp_path / "run") if name in r]
        # "tokens" and "seconds" are of a log line and of an evaluation after the same update
        assert shown.get(name, []) == expected, name
    samples = RunFolder(tmp_path / "run").samples()
    assert [(step, text.replace("    ", "", 1).rstrip("\n")) for step, text in shown["sample"]] == samples
    assert json.loads(shown["config"][0][1])["batch_size"] == 4
    (hparams,) = [found.SummaryMetadata(tag) for tag in found.Tags()["tensors"] if tag.startswith("_hparams_")]
    from tensorboard.plugins.hparams import plugin_data_pb2

    session = plugin_data_pb2.HParamsPluginData.FromString(hparams.plugin_data.content).session_start_info
    assert session.hparams["learning_rate"].number_value == config.learning_rate
    assert session.hparams["model.emb_dim"].number_value == 32


def test_after_a_resume_tensorboard_shows_the_run_as_if_it_had_never_stopped(config, tmp_path):
    cfg = config.replace(tensorboard=True)
    stopped_and_resumed(cfg, tmp_path / "parts")
    assert len(list((tmp_path / "parts" / "tensorboard").iterdir())) == 2
    whole, parts = events(tmp_path / "whole")[0], events(tmp_path / "parts")[0]
    assert whole.keys() == parts.keys()
    for tag in whole.keys() - {"config"}:
        if tag in TIMES:
            assert [step for step, _ in whole[tag]] == [step for step, _ in parts[tag]], tag
        else:
            assert whole[tag] == parts[tag], tag


def test_a_new_run_forgets_what_was_watched_of_the_old_one(config, run):
    (run / "tensorboard").mkdir()
    (run / "tensorboard" / "events.out.tfevents.1").write_text("what was watched")
    (run / "wandb.txt").write_text("an id")
    run_to_the_end(config.replace(max_steps=1), run, overwrite=True)
    assert not (run / "tensorboard").exists()
    assert not (run / "wandb.txt").exists()


@pytest.mark.parametrize("flags", [("--tensorboard",), ("--wandb", "mine")], ids=lambda flags: flags[0])
def test_a_missing_extra_is_one_line_before_anything_is_written(call, tmp_path, monkeypatch, flags):
    (tmp_path / "text.txt").write_text(TEXT)
    name = flags[0].removeprefix("--")
    find = importlib.util.find_spec
    monkeypatch.setattr(watchers.importlib.util, "find_spec", lambda asked: None if asked == name else find(asked))
    for script in (train_jax, train_torch):
        refused(call(script, *FLAGS, *flags, "--out-dir", "run"), rf'--{name} needs the package {name}: pip install "flaxgpt\[{name}\]"')
    assert not (tmp_path / "run").exists()


class FakeRun:
    """Remembers what it is told."""

    def __init__(self, **options):
        self.options, self.logged, self.metrics, self.finished = options, [], {}, 0

    def define_metric(self, name, **options):
        self.metrics[name] = options

    def log(self, values):
        assert not self.finished
        self.logged.append(values)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    """In place of the package: it shows what is asked of it, not that it does that (the next test but one does)."""
    runs = []
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.util.spec_from_loader("wandb", None)
    fake.Error = type("Error", (Exception,), {})
    fake.Html = lambda text: ("html", text)
    fake.login = lambda: True
    fake.init = lambda **options: runs.append(FakeRun(**options)) or runs[-1]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    fake.runs = runs
    return fake


def test_weights_and_biases_gets_every_record_and_sample_and_a_resumed_run_its_id(config, tmp_path, wandb):
    stopped_and_resumed(config.replace(wandb="mine"), tmp_path / "run")
    first, second = wandb.runs
    assert first.options["project"] == "mine"
    assert first.options["name"] == "run"
    assert first.options["config"]["model"]["emb_dim"] == 32
    assert first.options["id"] == second.options["id"]
    assert first.finished == second.finished == 1
    assert first.metrics["*"] == {"step_metric": "step"}
    records = [values for values in second.logged if "sample" not in values]
    assert records == [record for record in read_metrics(tmp_path / "run") if record in records]
    assert {record["step"] for record in records} == {10, 11}
    assert len([values for values in first.logged if "sample" in values]) == 4
    assert first.logged[2]["sample"][1].startswith("<pre>")
    assert (tmp_path / "run" / "wandb.txt").read_text() == first.options["id"]


@pytest.mark.parametrize("asked", ["login", "init"])
def test_weights_and_biases_that_refuse_are_one_line(call, saved, tmp_path, wandb, asked):
    def refuse(**_):
        raise wandb.Error("api_key not configured (no-tty).\nmore")

    (tmp_path / "text.txt").write_text(TEXT)
    shutil.copytree(saved, tmp_path / "run")
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != ".lock"}
    setattr(wandb, asked, refuse)
    said = r"Weights & Biases: api_key not configured \(no-tty\)\.: run `wandb login`, or set WANDB_MODE=offline"
    for script in (train_jax, train_torch):
        refused(call(script, *FLAGS, "--wandb", "mine", "--out-dir", "new"), said)
        assert (tmp_path / "new").exists() == (asked == "init")
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
    refused(call(train_jax, *FLAGS, "--wandb", "mine", "--out-dir", "run", "--overwrite"), said)
    if asked == "login":
        assert all(path.read_bytes() == content for path, content in files.items()), "it touched the run"


@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is not installed (the extra wandb)")
def test_weights_and_biases_itself_takes_a_run_offline(config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    stopped_and_resumed(config.replace(wandb="mine"), tmp_path / "run")
    run_id = (tmp_path / "run" / "wandb.txt").read_text()
    stored = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(stored) == 2
    assert all(path.stat().st_size > 1000 for path in stored)


@pytest.mark.parametrize("tied", [False, True])
def test_flops_per_token_are_six_for_each_weight_that_multiplies_and_those_of_attention(tied):
    cfg = SMALL.replace(tie_embeddings=tied, vocab_size=96)
    params = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    matrices = {
        jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(params) if "kernel" in jax.tree_util.keystr(path)
    }
    weights = sum(leaf.size for leaf in matrices.values()) + (params["tok_emb"]["embedding"].size if tied else 0)
    attention = (
        2 * 2 * 3 * cfg.n_layers * cfg.emb_dim * cfg.context_length
    )  # scores and their use; a product is 2; three products in training
    assert flops_per_token(cfg) == 6 * weights + attention
    assert flops_per_token(GPTConfig.preset("gpt2-124m")) == 6 * (12 * 12 * 768**2 + 768 * 50257) + 12 * 12 * 768 * 1024


def test_mfu_is_recorded_where_the_peak_is_given_and_left_out_where_it_is_not_known(config, whole, tmp_path, capsys):
    run_to_the_end(config.replace(peak_tflops=0.5), tmp_path / "given")
    shares = [
        (r["mfu"], r["tokens_per_second"] * flops_per_token(SMALL.replace(vocab_size=len(set(TEXT)))) / 0.5e12)
        for r in read_metrics(tmp_path / "given")
        if "train/batch_loss" in r
    ]
    assert len(shares) == 5
    for found, expected in shares:
        assert found == pytest.approx(expected / jax.device_count(), rel=1e-12)
    assert "% MFU" in capsys.readouterr().out
    assert not any("mfu" in record for record in read_metrics(whole.folder))
    assert "MFU" not in whole.said


def test_the_peak_of_known_devices_is_the_published_one():
    h100 = Target("gpu:h100x2", devices=(None, None), memory=0, chip=CHIPS["gpu:h100"], hosts=1)
    assert h100.peak("bfloat16") == 2 * 989e12
    assert h100.peak("float32") == 2 * 494e12
    assert Target("here", devices=(None,), memory=0, chip=None, hosts=1).peak("float32") is None


def slow(function, seconds):
    def slowed(*args, **options):
        time.sleep(seconds)
        return function(*args, **options)

    return slowed


def test_the_time_of_each_part_is_counted_for_that_part(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(flaxgpt.train.sharding, "shard_batch", slow(flaxgpt.train.sharding.shard_batch, 0.02))
    sample, save, seal, sampled = flaxgpt.train.make_sample, Checkpoints.save, flaxgpt.checkpoint.seal, threading.Event()

    def slow_sample(*args):
        time.sleep(0.3)
        try:
            return sample(*args)
        finally:
            sampled.set()

    def slow_save(checkpoints, state):
        """For 0.1 s in the loop, and in the background until 0.2 s after the next evaluation."""
        checkpoints.wait()
        sampled.clear()
        time.sleep(0.1)
        save(checkpoints, state)

    monkeypatch.setattr(flaxgpt.train, "make_sample", slow_sample)
    monkeypatch.setattr(Checkpoints, "save", slow_save)
    monkeypatch.setattr(flaxgpt.checkpoint, "seal", lambda path: (sampled.wait() and time.sleep(0.2)) or seal(path))
    jitted = flaxgpt.train.jit_train_step
    monkeypatch.setattr(flaxgpt.train, "jit_train_step", lambda *args: slow(jitted(*args), 0.05))
    run_to_the_end(config.replace(log_every=1), tmp_path / "run")
    records = read_metrics(tmp_path / "run")
    lines, evaluations = [r for r in records if "train/batch_loss" in r], [r for r in records if "val/loss" in r]
    assert all(set(line) & {f"seconds/{part}" for part in PARTS} == {"seconds/data", "seconds/compute"} for line in lines)
    assert sum(r["seconds/data"] for r in lines) > 12 * 0.02
    assert sum(r["seconds/compute"] for r in lines) > 12 * 0.05
    assert all(r["seconds/evaluation"] > 0.3 for r in evaluations)
    assert [r["seconds/checkpoint"] > 0.1 for r in evaluations] == [False, True, True, True]  # saved after 5, 10 and 12 updates
    assert evaluations[-1]["seconds/checkpoint"] > 0.1 + 0.2, "waiting for the last save is counted too"
    parts = spent(records)
    assert sum(parts.values()) == pytest.approx(records[-1]["seconds"], abs=0.01)
    assert list(parts) == [*PARTS, "other"]
    assert f"evaluation {parts['evaluation']:,.1f} s" in capsys.readouterr().out


def test_the_time_of_a_run_is_that_of_all_its_processes():
    first = [{"step": 0, "seconds": 2.0, "seconds/compute": 1.5}, {"step": 0, "seconds": 3.0, "seconds/evaluation": 1.0}]
    second = [{"step": 1, "seconds": 1.0, "seconds/compute": 0.5}, {"step": 2, "seconds": 2.0, "seconds/data": 0.25}]
    assert spent([*first, *second]) == {"data": 0.25, "compute": 2.0, "evaluation": 1.0, "checkpoint": 0, "other": 1.75}
    assert sum(spent([]).values()) == 0


def test_the_reference_is_watched_alike(call, tmp_path):
    pytest.importorskip("tensorboard")
    (tmp_path / "text.txt").write_text(TEXT)
    code, out, err = call(train_torch, *FLAGS, "--tensorboard", "--peak-tflops", 0.1, "--out-dir", "run")
    assert code == 0, err
    assert "% MFU" in out
    records = read_metrics(tmp_path / "run")
    assert {name for record in records for name in record} == set(COLUMNS) - {"skipped"}
    assert events(tmp_path / "run")[0]["val/loss"] == [(r["step"], float(np.float32(r["val/loss"]))) for r in records if "val/loss" in r]
    assert data_of(tmp_path / "run")["environment"]["devices"] == "1 x cpu (torch)"
    refused(call(train_torch, *FLAGS, "--profile", "1:2", "--out-dir", "other"), "train_jax.py has it")


def test_the_profiler_traces_the_updates_that_are_asked_for(call, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    code, out, err = call(train_jax, *FLAGS, "--profile", "1:3", "--out-dir", "run")
    assert code == 0, err
    (trace,) = (tmp_path / "run" / "profile" / "plugins" / "profile").glob("*/*.trace.json.gz")
    assert str(trace.relative_to(tmp_path)) in out
    assert list(trace.parent.glob("*.xplane.pb"))
    with gzip.open(trace, "rt") as file:
        found = json.load(file)["traceEvents"]
    assert sorted(event["args"]["step_num"] for event in found if event.get("name") == "update") == ["1", "2"]


@pytest.mark.parametrize(
    ("said", "pattern"),
    [
        ("3", "--profile 3: expected START:STOP"),
        ("3:3", "--profile 3:3: expected START:STOP"),
        ("b:c", "expected START:STOP"),
        ("-1:3", "expected START:STOP"),
        ("2:9", "--profile 2:9: the updates to come are 0:4"),
    ],
)
def test_updates_that_will_not_be_made_are_not_traced(call, tmp_path, said, pattern):
    (tmp_path / "text.txt").write_text(TEXT)
    refused(call(train_jax, *FLAGS, f"--profile={said}", "--out-dir", "run"), pattern)
    assert not (tmp_path / "run").exists()
    assert parse_updates("10:13") == range(10, 13)


def data_of(folder: Path) -> dict:
    """What a run's page is filled with."""
    page = (folder / "report.html").read_text(encoding="utf-8")
    return json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])


HOSTILE = "</script><script>alert(1)</script> <!-- {{data}}"


def opened(browser, path, **size):
    page = browser.open(path, **size)
    assert page.complaints == []
    assert page.requests == [path.as_uri()], "the page asks for something"
    return page


def test_the_page_shows_the_run_and_asks_for_nothing(browser, config, tmp_path):
    folder = tmp_path / "a <b> run"
    (tmp_path / "text.txt").write_text(TEXT + HOSTILE * 20)
    run_to_the_end(config.replace(prompt=HOSTILE, peak_tflops=0.5, model=ONE_LAYER), folder)
    page = opened(browser, folder / "report.html")
    assert page.evaluate("document.title") == page.evaluate("document.querySelector('h1').textContent") == "a <b> run"
    last = [record for record in read_metrics(folder) if "val/loss" in record][-1]
    said = page.evaluate("document.getElementById('said').textContent")
    for part in ("12 of 12 updates", f"validation loss {last['val/loss']:.3f}", "tokens/s", "% MFU"):
        assert part in said
    charts = page.evaluate(
        "[...document.querySelectorAll('figure')].map(f => [f.querySelector('figcaption').textContent, f.querySelectorAll('path').length])"
    )
    assert [count for _, count in charts] == [3, 1, 1, 1, 1]
    assert charts[0][0].startswith("Loss")
    paths = page.evaluate("[...document.querySelectorAll('svg path')].map(p => p.getAttribute('d'))")
    assert all(path.startswith("M") and "NaN" not in path for path in paths)
    samples = page.evaluate("[...document.querySelectorAll('pre')].map(p => p.textContent)")
    assert samples == [text for _, text in reversed(RunFolder(folder).samples())]
    assert samples[0].startswith(HOSTILE)
    parts = page.evaluate("[...document.querySelectorAll('#seconds th')].map(c => c.textContent)")
    assert parts == [*PARTS, "other"]
    shown = page.evaluate("document.getElementById('environment').textContent")
    assert f"jax {jax.__version__}" in shown
    assert page.evaluate("document.getElementById('config').textContent").count("model.emb_dim32") == 1
    assert page.evaluate("document.scripts.length") == 2  # the data and the page's own
    page.call(
        "Input.dispatchMouseEvent",
        type="mouseMoved",
        **page.evaluate("(b => ({x: b.left + 50, y: b.top + 50}))(document.querySelector('svg').getBoundingClientRect())"),
    )
    assert page.evaluate("document.querySelector('.read').textContent").startswith("update 0: each batch")


def test_the_page_fits_the_width_of_a_phone(browser, config, tmp_path):
    run_to_the_end(config.replace(data=config.data), tmp_path / ("long" * 40))
    page = opened(browser, tmp_path / ("long" * 40) / "report.html", width=320)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_the_page_of_losses_that_are_not_numbers_and_of_a_long_run_is_drawn(browser, config, tmp_path):
    folder = RunFolder(tmp_path)
    folder.records = [{"step": s, "tokens": s, "train/batch_loss": 1.0, "tokens_per_second": 2.0, "seconds": s} for s in range(100_001)]
    folder.records += [{"step": 100_000, "tokens": 1, "train/loss": float("nan"), "val/loss": float("inf"), "seconds": 100_000.0}]
    save_report(folder, config, {}, tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 500_000
    page = opened(browser, tmp_path / "report.html")
    assert page.evaluate("document.querySelectorAll('svg path').length") == 2
    assert data_of(tmp_path)["logged"]["step"][-1] == 100_000
    for n in (0, 1, 7, 8, 100):
        found = _spread(list(range(n)), 4)
        assert len(found) <= 4
        assert found[-1:] == list(range(n))[-1:]


def test_a_run_that_is_stopped_has_a_page_of_all_that_it_did(config, tmp_path, monkeypatch):
    evaluate = flaxgpt.train.evaluate

    def interrupted(*args):
        losses = evaluate(*args)
        signal.raise_signal(signal.SIGINT)
        return losses

    monkeypatch.setattr(flaxgpt.train, "evaluate", interrupted)
    run_to_the_end(config.replace(log_every=1), tmp_path / "run")
    assert len(read_metrics(tmp_path / "run")) == 3, "stopped after the update that follows"
    assert data_of(tmp_path / "run")["logged"]["step"] == [0, 1]


def test_a_run_begins_without_reading_a_long_text_and_names_a_bad_id_where_it_is_drawn(call, config, tmp_path, monkeypatch):
    (tmp_path / "tokens").mkdir()
    n = 2**24
    with (tmp_path / "tokens" / "train.bin").open("wb") as file:  # zeros, which take no room on the disk
        file.truncate(2 * n)
    np.zeros(1000, np.uint16).tofile(tmp_path / "tokens" / "val.bin")
    read, read_slice = [], Checked.__getitem__

    def counted(self, part):
        start, stop, _ = part.indices(len(self))
        read.append(stop - start)
        return read_slice(self, part)

    monkeypatch.setattr(Checked, "__getitem__", counted)
    cfg = config.replace(
        data=str(tmp_path / "tokens"), tokenizer="gpt2", model=config.model.replace(vocab_size=50257), stride=1, max_steps=2
    )
    cfg, corpus = prepare(cfg, tmp_path / "run")
    corpus.fingerprint()
    flaxgpt.train.train_batches(corpus.train, cfg)[0]
    assert sum(read) < 1.1 * 2**20, "more was read than the fingerprint and a batch"
    tokens = np.memmap(tmp_path / "tokens" / "train.bin", np.uint16, "r+")
    tokens[5000:] = 60000
    tokens.flush()
    model = "--emb-dim 8 --n-heads 1 --n-layers 1 --context-length 8"
    flags = f"--data tokens --tokenizer gpt2 --max-steps 2 --warmup-steps 1 {model} --out-dir run"
    refused(
        call(train_jax, *flags.split()), r"train\.bin has the token id 60000 at token \d+ \(byte \d+\), outside the vocabulary of 50257"
    )


def test_a_run_over_a_long_text_of_an_earlier_version_is_resumed(private_cache, config, tmp_path):
    """Its fingerprint is of single tokens."""
    (tmp_path / "tokens").mkdir()
    (np.arange(2**20 + 5) % 97).astype(np.uint16).tofile(tmp_path / "tokens" / "train.bin")
    np.zeros(100, np.uint16).tofile(tmp_path / "tokens" / "val.bin")
    cfg = config.replace(data=str(tmp_path / "tokens"), tokenizer="gpt2")
    settled, corpus = prepare(cfg, tmp_path / "run")
    assert corpus.fingerprint() != corpus.fingerprint(scattered=True)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(settled.to_dict()))
    (tmp_path / "run" / "tokenizer.json").write_text(json.dumps(corpus.tokenizer.to_dict()))
    for scattered in (False, True):
        (tmp_path / "run" / "data.json").write_text(corpus.fingerprint(scattered=scattered))
        prepare(cfg, tmp_path / "run", resume=True)
    (tmp_path / "run" / "data.json").write_text(corpus.fingerprint().replace("1048581", "1048580"))
    with pytest.raises(InputError, match="is not the one that"):
        prepare(cfg, tmp_path / "run", resume=True)
