"""Shards of tokens: prepare_data.py as a user meets it, and reading what it and others write."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import prepare_data as script
import pytest
from conftest import SCRIPTS, refused, refused_by_tyro

from flaxgpt.config import GPTConfig, TrainConfig
from flaxgpt.data import prepare as module
from flaxgpt.data import token_files
from flaxgpt.data.corpora import load_corpus
from flaxgpt.data.documents import Documents, chunks
from flaxgpt.data.loader import eval_batches, train_batches
from flaxgpt.data.prepare import Layout, prepare
from flaxgpt.data.token_files import Shards
from flaxgpt.data.tokenizer import END_OF_TEXT, GPT2Tokenizer
from flaxgpt.errors import InputError

END = 50256
WORDS = [
    "the",
    "value",
    "we'll",
    "Caf\u00e9",
    "\u4f60\u597d",
    "3.14",
    "!?\x1c",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "\r\n",
    "\u00a0",
    "\x85",
    "\U0001f600",
    END_OF_TEXT,
]


def some_text(n: int, seed: int = 0) -> str:
    """Words, numbers, signs and all kinds of white space in any order."""
    rng = random.Random(seed)
    return "".join(rng.choice([*WORDS, " ", " ", " a"]) for _ in range(n))


def content(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("size", [1, 7, 30, 1000])
def test_the_tokens_of_the_chunks_are_those_of_the_whole(size):
    tokenizer = GPT2Tokenizer()
    for seed in range(20):
        text = some_text(200, seed)
        parts = list(chunks([text[:100], text[100:101], text[101:]], size))
        assert "".join(parts) == text
        ids = [i for part in parts for i in tokenizer.encode(part)]
        assert ids == tokenizer.encode(text), "a text was cut inside of what GPT-2's pattern matches"
        if size == 30:
            assert np.median([len(part) for part in parts]) <= 30


def test_without_a_place_to_cut_a_chunk_grows():
    first, *rest = chunks(["x" * 50, "y" * 50, " z" * 60, " w"], 10)
    assert first.startswith("x" * 50 + "y" * 50 + " z")
    assert {len(part) for part in rest} <= {2, 4, 6, 8, 10}
    assert first + "".join(rest) == "x" * 50 + "y" * 50 + " z" * 60 + " w"


def test_documents_come_from_text_json_lines_and_folders_in_order(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n\n{"text": ""}\n{"text": "th\\u00f6ree"}')
    (tmp_path / "a.txt").write_bytes("one\r\nCaf\u00e9".encode())
    (tmp_path / "c.txt").write_bytes(b"")
    (tmp_path / "other.bin").write_bytes(b"no")
    documents = Documents([tmp_path])
    assert "".join(documents) == f"one\r\nCaf\u00e9{END_OF_TEXT}two{END_OF_TEXT}th\u00f6ree{END_OF_TEXT}"
    assert documents.read == documents.total == sum((tmp_path / name).stat().st_size for name in ("a.txt", "b.jsonl"))


def test_rows_of_parquet_are_documents(call, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = [f"row {i}" for i in range(600)]
    parquet.write_table(pyarrow.table({"body": [*texts, None], "id": range(601)}), tmp_path / "a.parquet", row_group_size=100)
    documents = Documents([tmp_path / "a.parquet"], column="body")
    assert "".join(documents) == "".join(text + END_OF_TEXT for text in texts)
    assert documents.read == documents.total
    refused(call(script, "a.parquet", "--out-dir", "out"), "no column 'text': its columns are body, id")
    refused(call(script, "a.parquet", "--out-dir", "out", "--column", "id"), "'id' holds int64, not text")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 not really")
    refused(call(script, "b.parquet", "--out-dir", "out"), "b.parquet can't be read as Parquet")


LAYOUT = Layout(val_every=4, shard_tokens=150, chunk_chars=90)


@pytest.fixture
def source(tmp_path):
    (tmp_path / "text.txt").write_bytes(some_text(900).encode())
    return tmp_path / "text.txt"


def test_shards_hold_the_documents_in_their_order_and_every_nth_chunk_is_for_validation(source, tmp_path):
    progress = prepare(Documents([source]), tmp_path / "out", LAYOUT)
    corpus = load_corpus(str(tmp_path / "out"), "gpt2", 0.9)
    parts = list(chunks(Documents([source]), 90))
    for split, which in (("val", [0]), ("train", [1, 2, 3])):
        expected = GPT2Tokenizer().encode("".join(part for i, part in enumerate(parts) if i % 4 in which))
        tokens = getattr(corpus, split)
        assert len(tokens) == progress.tokens[split] == len(expected)
        assert tokens[:].tolist() == expected
    assert corpus.train[:].tolist()[-1] == END
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert [name for name in names if name.startswith("train")] == [f"train-{i:05}.bin" for i in range(-(-progress.tokens["train"] // 150))]
    assert not (tmp_path / "out.part").exists()


def test_the_result_does_not_depend_on_processes(source, tmp_path):
    for processes in (1, 2):
        prepare(Documents([source]), tmp_path / f"out{processes}", LAYOUT, processes=processes)
    assert content(tmp_path / "out1") == content(tmp_path / "out2")


@pytest.mark.parametrize("at", [1, 2, 9, 17])
def test_what_was_stopped_anywhere_goes_on_and_is_the_same_byte_for_byte(source, tmp_path, monkeypatch, at):
    prepare(Documents([source]), tmp_path / "whole", LAYOUT)
    encode, save, calls = module._encode, module._save, []

    def stop(progress):
        if progress.n_chunks == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(Documents([source]), tmp_path / "out", LAYOUT, report=stop)
    # Killed between the writing of tokens and that of the state: the next chunk is written, and nothing says so.
    monkeypatch.setattr(module, "_save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(Documents([source]), tmp_path / "out", LAYOUT)
    monkeypatch.setattr(module, "_save", save)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(module, "_encode", lambda text: calls.append(text) or encode(text))
    prepare(Documents([source]), tmp_path / "out", LAYOUT)
    assert len(calls) == len(list(chunks(Documents([source]), 90))) - at, "tokens that were on disk were made again"
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize("at", [0, 1, 2])
def test_what_was_stopped_while_it_finished_goes_on(source, tmp_path, monkeypatch, at):
    layout = Layout(val_every=4, chunk_chars=90)
    prepare(Documents([source]), tmp_path / "whole", layout)
    rename, calls = module.Path.rename, []

    def stop(path, target):
        calls.append(path)
        if len(calls) > at:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(module.Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(Documents([source]), tmp_path / "out", layout)
    monkeypatch.undo()
    prepare(Documents([source]), tmp_path / "out", layout)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(content(tmp_path / "out")) == ["index.json", "tokenizer.json", "train.bin", "val.bin"]


def test_a_folder_that_was_stopped_at_the_very_end_is_whole(source, tmp_path, monkeypatch):
    prepare(Documents([source]), tmp_path / "whole", LAYOUT)
    monkeypatch.setattr(module.Path, "unlink", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(Documents([source]), tmp_path / "out", LAYOUT)
    assert content(tmp_path / "out").items() >= content(tmp_path / "whole").items()
    assert not (tmp_path / "out.part").exists()


def test_a_first_chunk_that_was_half_written_is_cut_off(source, tmp_path, monkeypatch):
    prepare(Documents([source]), tmp_path / "whole", LAYOUT)
    append = module._append

    def fail(*given):
        append(*given)
        raise OSError(28, "No space left on device", "val-00000.bin")

    monkeypatch.setattr(module, "_append", fail)
    with pytest.raises(InputError, match=r"can't write val-00000\.bin .*the same command goes on"):
        prepare(Documents([source]), tmp_path / "out", LAYOUT)
    monkeypatch.undo()
    prepare(Documents([source]), tmp_path / "out", LAYOUT)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_what_was_not_begun_here_is_left_alone(source, tmp_path):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "train.bin").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"out\.part is there already, and was not begun here"):
        prepare(Documents([source]), tmp_path / "out", LAYOUT)
    assert content(tmp_path / "out.part") == {"train.bin": b"mine"}


def test_a_killed_command_goes_on_and_leaves_no_processes(tmp_path):
    (tmp_path / "text.txt").write_text(some_text(300_000))
    options = ["--chunk-chars", "5000", "--shard-tokens", "30000", "--val-every", "10"]

    def command(out):
        return [sys.executable, str(SCRIPTS / "prepare_data.py"), "text.txt", "--out-dir", out, "--processes", "2", *options]

    killed = subprocess.Popen(command("out"), cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out.part" / "state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (tmp_path / "out.part").exists(), "it was done before it could be killed: make the text longer"
    subprocess.run(command("out"), cwd=tmp_path, check=True, capture_output=True)
    prepare(Documents([tmp_path / "text.txt"]), tmp_path / "whole", Layout(10, 30000, 5000))
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    while time.monotonic() < deadline:
        try:
            os.killpg(killed.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("processes of the killed command are still there")


def test_slices_of_shards_are_those_of_one_array():
    whole = np.arange(100, dtype=np.uint16)
    shards = Shards(np.split(whole, [1, 1, 40, 41, 90]))
    assert len(shards) == 100
    for start in (0, 1, 39, 40, 95, 100, -7):
        for stop in (0, 1, 41, 90, 100, 200, -1):
            for step in (1, 3, 50):
                np.testing.assert_array_equal(shards[start:stop:step], whole[start:stop:step])


def test_training_and_fingerprint_see_one_text_however_it_is_sharded(tmp_path):
    tokens = (np.arange(1000) % 97).astype(np.uint16)
    for name, parts in (("one", [tokens]), ("many", np.split(tokens, [13, 400, 401]))):
        (tmp_path / name).mkdir()
        tokens[:300].tofile(tmp_path / name / "val.bin")
        for i, part in enumerate(parts):
            part.tofile(tmp_path / name / ("train.bin" if name == "one" else f"train-{i:05}.bin"))
    one, many = (load_corpus(str(tmp_path / name), "gpt2", 0.9) for name in ("one", "many"))
    assert isinstance(many.train, Shards)
    assert one.fingerprint() == many.fingerprint()
    cfg = TrainConfig(model=GPTConfig(vocab_size=97, context_length=8, emb_dim=8, n_heads=2, n_layers=1), batch_size=4)
    for step in (0, 17, 300):
        np.testing.assert_array_equal(train_batches(one.train, cfg)[step], train_batches(many.train, cfg)[step])
    np.testing.assert_array_equal(eval_batches(one.train, cfg, "training"), eval_batches(many.train, cfg, "training"))


def test_files_with_the_header_of_llm_c_are_read(tmp_path):
    tokens = np.arange(50, dtype=np.uint16)

    def write(name, version=1, count=50):
        header = np.zeros(256, np.int32)
        header[:3] = 20240520, version, count
        (tmp_path / name).write_bytes(header.tobytes() + tokens.tobytes())

    write("fineweb_train_000001.bin")
    write("fineweb_train_000002.bin")
    write("fineweb_val_000000.bin")
    corpus = load_corpus(str(tmp_path), "gpt2", 0.9)
    assert corpus.train[:].tolist() == [*range(50), *range(50)]
    assert corpus.val[:].tolist() == [*range(50)]
    write("fineweb_val_000000.bin", count=60)
    with pytest.raises(InputError, match=r"val_000000\.bin has 1124 bytes: its header promises 60 tokens, 1144"):
        load_corpus(str(tmp_path), "gpt2", 0.9)
    write("fineweb_val_000000.bin", version=7)
    with pytest.raises(InputError, match="version 7: expected 1"):
        load_corpus(str(tmp_path), "gpt2", 0.9)
    tokens[30] = 50300
    write("fineweb_val_000000.bin")
    with pytest.raises(InputError, match=r"val_000000\.bin has the token id 50300 at token 30 \(byte 1084\)"):
        _ = load_corpus(str(tmp_path), "gpt2", 0.9).val[20:40]


def test_ids_of_a_prepared_folder_are_known_and_those_of_another_are_checked_where_they_are_read(source, tmp_path, monkeypatch):
    prepare(Documents([source]), tmp_path / "out", LAYOUT)
    checked = []
    original = token_files.Checked
    monkeypatch.setattr(token_files, "Checked", lambda tokens, size, path: checked.append(path.name) or original(tokens, size, path))
    load_corpus(str(tmp_path / "out"), "gpt2", 0.9)
    assert not checked
    with (tmp_path / "out" / "train-00001.bin").open("ab") as file:
        file.write(b"\xff\xff")
    corpus = load_corpus(str(tmp_path / "out"), "gpt2", 0.9)
    assert checked == ["train-00001.bin"]
    assert len(corpus.train[:300]) == 300
    with pytest.raises(InputError, match=r"train-00001\.bin has the token id 65535 at token 150 \(byte 300\)"):
        _ = corpus.train[290:310]
    with (tmp_path / "out" / "train-00001.bin").open("ab") as file:
        file.write(b"\xff")
    with pytest.raises(InputError, match=r"train-00001\.bin.*303 bytes, an odd number"):
        load_corpus(str(tmp_path / "out"), "gpt2", 0.9)


def test_broken_lines_are_named_or_counted(call, tmp_path):
    good = [json.dumps({"body": f"line number {i} with some words"}) for i in range(40)]
    lines = [*good[:3], "{broken", '{"other": 1}', "[1]", '{"body": "\\ud800"}', "[" * 100_000, *good[3:]]
    (tmp_path / "a.JSONL").write_text("\n".join(lines))
    common = ("a.JSONL", "--field", "body", "--out-dir", "out", "--processes", 1, "--chunk-chars", 100, "--val-every", 5)
    refused(call(script, *common), r"a\.JSONL, line 4: .*--skip-broken")
    code, out, err = call(script, *common, "--skip-broken")
    refused((code, out, err), "begun with other")  # the folder is of the documents without that flag
    code, out, err = call(script, *common[:3], "--out-dir", "out2", *common[5:], "--skip-broken")
    assert code == 0, err
    assert "5 broken lines" in out
    assert "tokens/s" in err
    assert load_corpus(str(tmp_path / "out2"), "gpt2", 0.9).train[:].tolist().count(END) == 40 * 4 // 5


@pytest.mark.parametrize(
    ("args", "pattern"),
    [
        (["absent.txt"], "absent.txt is not there"),
        (["hollow"], r"no files that end with .txt, .jsonl, .parquet"),
        (["latin1.txt"], "byte 3"),
        (["short.txt"], "single chunk"),
        (["empty.txt"], "there is no text"),
        (["short.txt", "--out-dir", "hollow"], "hollow is there already"),
        (["short.txt", "--out-dir", "short.txt/out"], "can't write"),
        (["short.txt", "--processes", "0"], "processes=0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(call, tmp_path, args, pattern):
    (tmp_path / "hollow").mkdir()
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "short.txt").write_text("short")
    (tmp_path / "empty.txt").write_text("")
    refused(
        call(script, *args, *(() if "--out-dir" in args else ("--out-dir", "out")), *(() if "--processes" in args else ("--processes", 1))),
        pattern,
    )
    assert not list(tmp_path.glob("out*")), "something was left behind"


@pytest.mark.parametrize("end", [b"\xe4\xbd", b"\xff"])
def test_text_that_ends_within_a_character_is_named_also_where_a_part_ends(tmp_path, monkeypatch, end):
    monkeypatch.setattr("flaxgpt.data.documents._READ", 8)
    for length in (6, 7, 8, 14):
        (tmp_path / "a.txt").write_bytes(b"x" * length + end)
        with pytest.raises(InputError, match=rf"a.txt is not UTF-8 text \(byte {length}\)"):
            list(Documents([tmp_path / "a.txt"]))


def test_layouts_that_make_no_sense_are_refused(call):
    for flag, value in (("val-every", 1), ("shard-tokens", 0), ("chunk-chars", 0)):
        refused_by_tyro(call(script, "x", "--out-dir", "out", f"--{flag}", value), f"{flag.replace('-', '_')}={value}: expected at least")


def test_a_folder_of_other_documents_or_with_lost_shards_is_not_gone_on_with(source, tmp_path):
    def stop(progress):
        if progress.n_chunks == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(Documents([source]), tmp_path / "out", LAYOUT, report=stop)
    with pytest.raises(InputError, match=r"begun with other files or settings.*delete .*out\.part"):
        prepare(Documents([source]), tmp_path / "out", Layout(val_every=5, shard_tokens=150, chunk_chars=90))
    os.truncate(tmp_path / "out.part" / "train-00000.bin", 20)
    with pytest.raises(InputError, match=r"train-00000\.bin is shorter than it was"):
        prepare(Documents([source]), tmp_path / "out", LAYOUT)
    (tmp_path / "out.part" / "train-00000.bin").unlink()
    with pytest.raises(InputError, match=r"shorter|lost shards"):
        prepare(Documents([source]), tmp_path / "out", LAYOUT)
    (tmp_path / "out.part" / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"state\.json is damaged"):
        prepare(Documents([source]), tmp_path / "out", LAYOUT)
