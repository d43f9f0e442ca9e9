"""The scripts as a user meets them: flags, errors that are explained with exit code 2, help."""

import re
import shutil
import subprocess
import sys

import pytest
import sample
import train_jax
import train_torch
from conftest import SCRIPTS, SMALL_RUN, refused, refused_by_tyro


@pytest.mark.parametrize("trainer", [train_jax, train_torch], ids=lambda m: m.__name__)
def test_train_then_sample(call, trainer, tmp_path):
    code, out, err = call(trainer, *SMALL_RUN, "--out-dir", "runs/a")
    assert code == 0, err
    assert "val loss" in out
    command = re.search(r"sample: +(.*)", out)[1]
    assert "sample.py --checkpoint runs/a" in command
    sampling = ("--checkpoint", "runs/a", "--prompt", "the", "--max-new-tokens", "5", "--num-samples", "2", "--seed", "1")
    code, out, err = call(sample, *sampling)
    assert code == 0
    texts = re.split(r"--- sample \d ---\n", out)[1:]
    assert [len(text.removesuffix("\n")) for text in texts] == [8, 8]
    assert "tokens/s" in err
    assert call(sample, *sampling)[1] == out


def test_a_run_folder_is_not_touched_without_a_flag(call, small, tmp_path):
    shutil.copytree(small.folder, "a")
    before = {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    refused(call(train_jax, *SMALL_RUN, "--out-dir", "a"), "a exists.*--resume.*--overwrite")
    refused(call(train_jax, *SMALL_RUN, "--out-dir", "a", "--overwrite", "--resume"), "exclude")
    refused(call(train_jax, "--out-dir", "a", "--resume", "--emb-dim", "32"), "can't change model")
    refused(call(train_jax, *SMALL_RUN, "--out-dir", "a", "--overwrite", "--data", "nope"), "no corpus 'nope'")
    refused(call(train_torch, "--out-dir", "a", "--resume"), "reference can't resume")
    assert {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()} == before
    code, out, _ = call(train_jax, "--out-dir", "a", "--resume", "--max-steps", "5")
    assert code == 0
    assert "updates 3 to 4" in out
    code, out, _ = call(train_jax, *SMALL_RUN, "--out-dir", "a", "--overwrite")
    assert code == 0
    assert "updates 0 to 2" in out


def test_overwrite_deletes_nothing_but_run_folders(call, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    refused(call(train_jax, *SMALL_RUN, "--out-dir", "thesis", "--overwrite"), "not a run folder")
    assert (tmp_path / "thesis" / "thesis.tex").read_text() == "years of work"
    refused(call(train_jax, *SMALL_RUN, "--out-dir", "thesis/thesis.tex"), "is a file")
    refused(call(train_jax, *SMALL_RUN, "--out-dir", "thesis/thesis.tex/x"), "is a file")
    (tmp_path / "thesis" / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    refused(call(train_jax, *SMALL_RUN, "--out-dir", "thesis", "--overwrite"), "not a run folder")
    refused(call(train_jax, "--out-dir", "thesis", "--resume"), "not a run folder")


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (["--preset", "huge"], "unknown preset 'huge'.*tiny"),
        (["--data", "absent.txt"], "no corpus 'absent.txt'"),
        (["--data", "short.txt"], "training split has .* tokens, fewer than one window"),
        (["--data", "empty.txt"], "no text"),
        (["--data", "latin1.txt"], "not UTF-8"),
        (["--prompt", "größer"], "'ßö'.*alphabet"),
        (["--fsdp", "7", "--emb-dim", "84"], "fsdp=7 x tensor=1 does not divide"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(call, tmp_path, args, pattern):
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin1.txt").write_bytes("déjà vu ".encode("latin-1") * 99)
    refused(call(train_jax, *args, "--out-dir", "out"), pattern)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (["--warp-drive", "9"], "--warp-drive"),
        (["--max-steps", "many"], "--max-steps.*'many'"),
        (["--max-steps"], "--max-steps"),
        (["--preset"], "--preset"),
        (["--tokenizer", "words"], "words.*gpt2"),
        (["--emb-dim", "30", "--n-heads", "4"], "emb_dim=30 is not divisible by n_heads=4"),
        (["--prompt", ""], "prompt is empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_flag_that_does_not_fit_is_explained_by_tyro_and_leaves_nothing_behind(call, tmp_path, args, pattern):
    refused_by_tyro(call(train_jax, "--out-dir", "out", *args), pattern)
    assert not (tmp_path / "out").exists()


def test_a_missing_or_foreign_checkpoint_is_one_line(call, small, tmp_path):
    refused(call(sample), "--checkpoint")
    refused(call(sample, "--checkpoint", "absent", "--prompt", "the"), "not a run folder")
    shutil.copytree(small.folder, "a")
    config = tmp_path / "a" / "config.json"
    config.write_text(config.read_text().replace('"emb_dim": 16', '"emb_dim": 32'))
    refused(call(sample, "--checkpoint", "a", "--prompt", "the"), "does not fit")
    refused(call(train_jax, "--out-dir", "a", "--resume", "--max-steps", "5"), "does not fit")
    for content, pattern in (
        (b"{}", "does not fit"),
        (b'{"surprise": 1}', "surprise"),
        (b"not json", "config.json"),
        (b"\xff", "config.json"),
    ):
        config.write_bytes(content)
        refused(call(sample, "--checkpoint", "a", "--prompt", "the"), pattern)


def test_a_damaged_checkpoint_is_one_line(call, small, tmp_path):
    shutil.copytree(small.folder, "a")
    for file in (tmp_path / "a" / "checkpoints" / "3" / "params").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:100])
    refused(call(sample, "--checkpoint", "a", "--prompt", "the"), "is damaged")
    for item in (tmp_path / "a" / "checkpoints").iterdir():
        shutil.rmtree(item)
    refused(call(sample, "--checkpoint", "a", "--prompt", "the"), "no checkpoint")
    assert "begins again from its start" in call(train_jax, "--out-dir", "a", "--resume", "--max-steps", "9")[1]
    (tmp_path / "a" / "tokenizer.json").write_bytes(b"\xff")
    refused(call(sample, "--checkpoint", "a", "--prompt", "the"), "tokenizer")


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        *[(script, "--preset") for script in ("train_jax", "train_torch", "parity_report", "replay", "benchmark")],
        ("sample", "--seed"),
        ("checkpoints", "{list,verify,delete}"),
        ("inspect_logits", "--promote"),
        ("evaluate", "--stride"),
        ("prepare_data", "--shard-tokens"),
        ("convert_checkpoint", "--to {run,huggingface,nanogpt,torch,safetensors}"),
    ],
)
def test_help_teaches_and_loads_no_framework(script, flag):
    code = f"import sys, runpy; sys.argv = ['{script}.py', '--help']; runpy.run_path(r'{SCRIPTS / script}.py', run_name='__main__')"
    watched = f"""
import atexit, sys
atexit.register(lambda: print("LOADED", sorted({{"jax", "torch", "matplotlib"}} & set(sys.modules))))
{code}
"""
    out = subprocess.run([sys.executable, "-c", watched], capture_output=True, text=True, check=True).stdout
    assert "LOADED []" in out
    assert "Examples:" in out
    assert flag in out


def test_reading_a_run_folder_loads_neither_the_terminal_nor_the_pictures():
    watched = "{'flaxgpt.run.progress', 'flaxgpt.run.plots', 'matplotlib'}"
    code = f"import sys, flaxgpt.checkpoint; print(sorted({watched} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
