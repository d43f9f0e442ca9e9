"""scripts/sample.py as a user meets it. Flags that it shares with the others are in test_cli.py."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sample
from conftest import refused, refused_by_tyro


@pytest.fixture
def folder(small):
    """A run folder: a model that has hardly been trained, of single characters."""
    return small.folder


@pytest.fixture
def run(call, folder):
    return lambda *args: call(sample, "--checkpoint", folder, *args)


def test_a_seed_is_shown_and_repeats_the_text(run):
    code, out, err = run("--prompt", "the", "--max-new-tokens", 20, "--num-samples", 2)
    assert code == 0
    assert "tokens/s" in err
    seed = err.split("seed ")[1].split()[0]
    assert run("--prompt", "the", "--max-new-tokens", 20, "--num-samples", 2, "--seed", seed)[1] == out
    assert run("--prompt", "the", "--max-new-tokens", 20, "--num-samples", 2)[1] != out


def test_prompts_come_from_a_flag_a_file_or_standard_input(run, tmp_path, monkeypatch):
    options = ("--max-new-tokens", 20, "--seed", 1)
    expected = run("--prompt", "the value\nof", *options)[1]
    (tmp_path / "start.txt").write_text("the value\nof")
    monkeypatch.setattr(sys, "stdin", io.StringIO("the value\nof"))
    assert run("--prompt", "FILE:start.txt", *options)[1] == expected
    assert run("--prompt", "-", *options)[1] == expected
    assert run("--prompt", "the value\nof", "--stream", *options)[1] == expected


def test_many_prompts_are_one_batch_of_json_lines(run, tmp_path):
    (tmp_path / "many.txt").write_text("the\n\na longer line\n")
    options = ("--max-new-tokens", 12, "--num-samples", 2, "--json", "--seed", 5, "--top-log-probs", 3, "--stop", "e")
    code, out, _ = run("--prompts", "many.txt", *options)
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["prompt"], line["sample"], line["seed"]) for line in lines] == [
        ("the", 1, 5),
        ("the", 2, 5),
        ("a longer line", 1, 5),
        ("a longer line", 2, 5),
    ]
    for line in lines:
        assert "e" not in line["text"]
        assert len(line["ids"]) == len(line["log_probs"]) == len(line["top"])
        assert len(line["top"][0]) == 3
        assert line["finish"] in ("stop", "length")
        assert line["seconds"] > 0
        assert line["tokens_per_second"] > 0
    plain = run("--prompts", "many.txt", "--max-new-tokens", 3, "--seed", 5)[1]
    assert "--- prompt 2, sample 1 ---\na longer line" in plain


def test_interactive_continues_each_line(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\n\nö\nof\n"))
    code, out, err = run("--interactive", "--max-new-tokens", 4, "--seed", 7, "--banned", 0)
    assert code == 0
    first, second = out.splitlines()
    assert (first[:3], second[:2]) == ("the", "of")
    assert "seed 7" in err
    assert "'ö'" in err
    assert "seed 8" in err
    assert run("--prompt", "of", "--max-new-tokens", 4, "--seed", 8, "--banned", 0)[1] == second + "\n"


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "ö"], "'ö'"),
        (["--prompt", "FILE:absent.txt"], "prompt.*absent.txt"),
        (["--prompt", "FILE:latin1.txt"], "prompt.*UTF-8"),
        (["--prompts", "absent.txt"], "prompts.*absent.txt"),
        (["--prompts", "empty.txt"], "prompts.*empty.txt"),
        (["--prompts", "empty.txt", "--prompt", "a"], "exclude"),
        (["--logit-bias", "9999", "1"], "logit_bias.*9999"),
        (["--banned", "9999"], "banned.*9999"),
        (["--eos-id", "9999"], "eos_id"),
        (["--stop", ""], "stop"),
        (["--num-samples", "0"], "num_samples"),
        (["--num-samples", "2", "--stream"], "num_samples"),
        (["--json", "--stream"], "--json"),
        (["--top-log-probs", "-1", "--json"], "top_log_probs"),
        (["--max-new-tokens", "-5"], "max_new_tokens"),
        (["--max-new-tokens", "99999999999"], "max_new_tokens"),
        (["--seed", "-5"], "seed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(run, tmp_path, args, pattern):
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "latin1.txt").write_bytes("déjà vu".encode("latin-1"))
    refused(run(*args), pattern)


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--top-k", "0"], "top_k"),
        (["--top-p", "0"], "top_p"),
        (["--top-p", "much"], "--top-p"),
        (["--min-p", "2"], "min_p"),
        (["--repetition-penalty", "0"], "repetition_penalty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_setting_that_does_not_fit_is_explained_by_tyro(run, args, pattern):
    refused_by_tyro(run(*args), pattern)


def test_a_prompt_longer_than_the_context_is_said(run):
    code, out, err = run("--prompt", "the value of", "--max-new-tokens", 2)
    assert code == 0
    assert out.startswith("the value of")
    assert "12 tokens; the model saw the last 8" in err


@pytest.fixture
def sigint_is_heeded():
    """A shell's background jobs ignore SIGINT, and so do their children; what has a handler here is not ignored there."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


@pytest.mark.usefixtures("sigint_is_heeded")
def test_ctrl_c_while_streaming_ends_with_what_was_written(folder):
    script = Path(__file__).parent.parent / "scripts" / "sample.py"
    args = [sys.executable, script, "--checkpoint", folder, "--prompt", "the", "--stream", "--max-new-tokens", "99999"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"}) as process:
        written = process.stdout.read(30)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert written.startswith(b"the")
    assert rest.endswith(b"\n")
    assert b"Traceback" not in err
    assert err.endswith(b"stopped\n")
