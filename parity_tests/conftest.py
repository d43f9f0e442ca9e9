"""Fixtures that several files of tests share. Nothing here downloads anything."""

import contextlib
import gc
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser

from flaxgpt import model as lesson
from flaxgpt.config import GPTConfig, TrainConfig
from flaxgpt.convert.params import from_torch
from flaxgpt.data.corpora import cache_dir, download
from flaxgpt.parity.compare import Result
from torch_ref.model import GPTModel

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, which happens in files of tests
jax.config.update("jax_default_matmul_precision", "float32")
# Many tests compile the same small programs: all processes of a session share them, through a folder of its own if none is named.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    PROGRAMS = tempfile.TemporaryDirectory(prefix="flaxgpt-tests-")  # removed when this process ends
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
gc.set_threshold(700, 10, 100)  # for 10 at the end: a full collection takes 0.3 s with all that is imported, and tracing has many made
torch.set_num_threads(1)  # small models gain nothing by more, and wait for each other when other processes want the cores

SCRIPTS = Path(__file__).parent.parent / "scripts"
SMALL = GPTConfig(vocab_size=97, context_length=16, emb_dim=32, n_heads=4, n_layers=2, drop_rate=0.0)
ONE_LAYER = SMALL.replace(n_layers=1)  # where depth is not what is tested: on a CPU each layer is written out, and takes as long to compile
SMALL_MODEL = ["--n-layers", "1", "--n-heads", "2", "--emb-dim", "16", "--context-length", "8"]
SMALL_RUN = [*SMALL_MODEL, "--batch-size", "2", "--max-steps", "3", "--eval-batches", "1", "--sample-tokens", "4"]
TEXT = "the cat sat on the mat and the dog sat on the log; " * 40
CONFIG = TrainConfig(
    model=SMALL.replace(drop_rate=0.2),
    tokenizer="char",
    batch_size=4,
    max_steps=12,
    decay_steps=60,  # for all numbers of steps: the schedule is part of the compiled update
    warmup_steps=2,
    learning_rate=1e-2,
    min_learning_rate=1e-3,
    log_every=3,
    eval_every=5,
    eval_batches=2,
    checkpoint_every=5,
    sample_tokens=4,
)
SMALLEST = {"model": ONE_LAYER, "sample_tokens": 0}
"""Of CONFIG, for an update that no other test compiles: dropout doubles the time of that."""
UPDATES = "--context-length 8 --drop-rate 0.1 --batch-size 2 --warmup-steps 1 --decay-steps 8 --max-steps 4 --checkpoint-every 2"
LOOKS = "--eval-every 2 --eval-batches 1 --sample-tokens 0 --log-every 1 --data text.txt"
FLAGS = f"--tokenizer char --emb-dim 16 --n-heads 2 --n-layers 1 {UPDATES} {LOOKS}".split(" ")
forward = jax.jit(lesson.forward, static_argnames="cfg")
"""One program in place of one for each operation, and of one for the scan at each call."""


COMPILED: list[str] = []
"""What JAX has reported since this process began, of its programs: an event each."""
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: COMPILED.append(event) if "compile" in event else None)


@pytest.fixture(autouse=True)
def programs_forgotten_in_time() -> Iterator[None]:
    """Drop what was compiled before a process holds too much of it: a small ladder's programs take 6,500 mappings of memory, and Linux
    ends a process that asks for more than 65,530 (vm.max_map_count)."""
    before = len(COMPILED)
    yield
    mappings = Path("/proc/self/maps")
    if len(COMPILED) > before and mappings.exists() and mappings.read_bytes().count(b"\n") > 20_000:  # reading it takes 20 ms
        jax.clear_caches()
        gc.collect()  # of what is in cycles


@pytest.fixture(scope="module")
def all_cores() -> Iterator[None]:
    """For models of 124M parameters: all that the other processes of pytest-xdist leave. (OpenMP's threads wait for a core by spinning.)"""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))
    yield
    torch.set_num_threads(1)


@pytest.fixture
def verdict() -> str:
    path = cache_dir() / "the-verdict.txt"
    if not path.is_file():
        pytest.skip(f"{path} is not there, and tests don't download: scripts/train_jax.py --data the-verdict --max-steps 1 does")
    return download("the-verdict").read_text(encoding="utf-8")


@pytest.fixture
def private_cache(tmp_path, monkeypatch):
    """A cache folder that is empty, so that a test neither sees nor changes the user's."""
    monkeypatch.setenv("FLAXGPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def call(monkeypatch, capsys, private_cache, tmp_path):
    """Run a script's main in this process, in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(script, *args):
        monkeypatch.setattr(sys, "argv", [str(SCRIPTS / f"{script.__name__}.py"), *map(str, args)])
        code = 0
        try:
            script.main()
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return run


def run_to_the_end(cfg, out_dir, **options):
    from flaxgpt.run.log import RunLog
    from flaxgpt.run.setup import prepare
    from flaxgpt.train import train  # in a second, which not all tests have to wait

    cfg, corpus = prepare(cfg, out_dir, **options)
    with RunLog(out_dir) as log:
        state = train(cfg, corpus, log, resume=options.get("resume", False))
        log.summary("a command")
    return state


@pytest.fixture
def config(private_cache, tmp_path) -> TrainConfig:
    (tmp_path / "text.txt").write_text(TEXT)
    return CONFIG.replace(data=str(tmp_path / "text.txt"))


def trained(root: Path, cfg: TrainConfig) -> SimpleNamespace:
    """A run on TEXT, if on no other, in a folder of its own: that, the state it came to and what it printed."""
    said = io.StringIO()
    (root / "text.txt").write_text(TEXT)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setenv("FLAXGPT_CACHE", str(root / "cache"))
        patch.chdir(root)
        cfg = cfg.replace(data=str(Path(cfg.data).absolute())) if cfg.data.endswith(".txt") else cfg
        state = run_to_the_end(cfg, root / "run")
    return SimpleNamespace(folder=root / "run", state=state, said=said.getvalue())


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> SimpleNamespace:
    """The run of CONFIG, from its start to its end."""
    return trained(tmp_path_factory.mktemp("whole"), CONFIG.replace(data="text.txt"))


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> SimpleNamespace:
    """The run of SMALL_RUN."""
    from flaxgpt.run.cli import parse_train

    return trained(tmp_path_factory.mktemp("small"), parse_train("", SMALL_RUN).config)


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """The folder of a run of FLAGS, but of 6 updates, with the checkpoints 4 and 6: to be copied."""
    from flaxgpt.run.cli import parse_train

    cfg = parse_train("", FLAGS).config.replace(max_steps=6, eval_every=3)
    return trained(tmp_path_factory.mktemp("saved"), cfg).folder


@pytest.fixture
def run(whole, config, tmp_path) -> Path:
    """A copy of its folder, as if it had been a run of `config`."""
    folder = shutil.copytree(whole.folder, tmp_path / "run")
    text = json.loads((folder / "config.json").read_text()) | {"data": config.data}
    (folder / "config.json").write_text(json.dumps(text))
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Path:
    """Folders that transformers wrote, by name."""
    from hugging_face import save_folders

    root = tmp_path_factory.mktemp("huggingface")
    save_folders(root)
    return root


@pytest.fixture
def plain(folders, tmp_path) -> Path:
    """One of them, which a test may spoil."""
    shutil.copytree(folders / "plain", tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip("no chromium, chromium-browser or google-chrome is installed")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def refused(result, pattern):
    """What a person can mend is said in one line."""
    code, _, err = result
    assert code == 2
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1, err
    assert re.search(pattern, err), err


def refused_by_tyro(result, pattern):
    """What is wrong with a flag itself is said by tyro, in a frame as wide as the terminal."""
    code, _, err = result
    assert code == 2
    assert "Traceback" not in err
    text = " ".join(err.translate(dict.fromkeys(map(ord, "│╭╮╰╯─"), " ")).split())
    assert re.search(pattern, text), err


def random_pair(cfg: GPTConfig, seed: int = 0) -> tuple[GPTModel, dict]:
    """A torch model in eval mode with nothing at its default (zeros and ones hide bugs), and its parameters for flaxgpt."""
    torch.manual_seed(seed)
    model = GPTModel(cfg).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("scale", "shift", "bias")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model, from_torch(model.state_dict(), cfg)


def random_ids(cfg: GPTConfig, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, shape)


def assert_equal_bits(a, b):
    for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = (jax.random.key_data(v) if jax.dtypes.issubdtype(v.dtype, jax.dtypes.prng_key) else v for v in (x, y))
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


MEASURED: dict[str, tuple[int, float, str, float]] = {}
"""What is compared -> tensors compared, worst difference, where, bound: printed at the end of a test run."""


def assert_close(what: str, a, b, bound: float, *, scale: float | None = None, where: str = "") -> None:
    """Assert ||a - b|| / ||b|| < bound (or / scale), and remember the worst for the table.

    Bounds are within ten times of what was measured on an x86-64 CPU, so that a real fault has no room in them.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    error = float(np.linalg.norm(a - b) / (np.linalg.norm(b) if scale is None else scale))
    measured(what, 1, error, where, bound)
    assert error < bound, f"{what}: {where or 'the two sides'} differ by {error:.1e}, more than {bound:.0e}"


def remember(what: str, result: Result) -> None:
    """Add a rung of the ladder to the table: its worst difference and the bound of the row that came closest to its own."""
    compared = [row for row in result.rows if row.difference is not None]
    if compared and result.passed:
        worst = max(compared, key=lambda row: row.share_of_bound)
        measured(what, len(compared), worst.difference, worst.name, worst.bound)


def measured(what: str, count: int, difference: float, where: str, bound: float) -> None:
    """Keep what came closest to its bound. (A bound of 0 is met exactly.)"""
    before, *worst = MEASURED.get(what, (0, -1.0, "", 1.0))
    if bound == 0 or worst[2] == 0 or difference / bound > worst[0] / worst[2]:
        worst = difference, where, bound
    MEASURED[what] = (before + count, *worst)


def pytest_terminal_summary(terminalreporter) -> None:
    if MEASURED:
        terminalreporter.section("parity: flaxgpt against torch_ref, or what is named")
        terminalreporter.line(f"{'compared':<48}{'tensors':>8}{'worst':>10}{'bound':>10}  where")
        for what, (count, worst, place, bound) in MEASURED.items():
            terminalreporter.line(f"{what:<48}{count:>8}{worst:>10.1e}{bound:>10.0e}  {place}")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads it
def pytest_cmdline_main(config) -> None:
    """Run the whole suite on all cores, where pytest-xdist is installed: most of the time is compiling, which takes one core.

    Not so where files or tests are named, nor in the processes that pytest-xdist starts, which come here too.
    """
    option = config.option
    named = config.args_source != pytest.Config.ArgsSource.TESTPATHS
    if not named and "PYTEST_XDIST_WORKER" not in os.environ and getattr(option, "numprocesses", 0) is None and not option.usepdb:
        option.numprocesses, option.maxprocesses, option.dist = "auto", 4, "worksteal"


def pytest_sessionfinish(session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["measured"] = json.dumps(MEASURED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    for what, row in json.loads(getattr(node, "workeroutput", {}).get("measured", "{}")).items():
        measured(what, *row)
