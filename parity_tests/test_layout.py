"""Where things are: public names, rooms, twins, and tables that list the same parameters."""

import ast
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest
from conftest import SMALL

import flaxgpt
from flaxgpt.convert.names import PARAMETERS, module_name, module_path
from flaxgpt.layers import INITIALISERS
from flaxgpt.model import init_params
from flaxgpt.sharding import PARTITIONS

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(path.parent.relative_to(ROOT) for side in ("flaxgpt", "torch_ref") for path in (ROOT / side).rglob("__init__.py"))


def test_the_public_names_are_loaded_when_they_are_first_used():
    program = """
import sys
import flaxgpt
heavy = {"jax", "flax", "optax", "torch", "matplotlib", "rich", "numpy"}
assert not heavy & set(sys.modules), f"import flaxgpt brings in {heavy & set(sys.modules)}"
flaxgpt.GPTConfig, flaxgpt.TrainConfig, flaxgpt.SamplingConfig, flaxgpt.InputError
assert not heavy & set(sys.modules), f"a config brings in {heavy & set(sys.modules)}"
for name in flaxgpt.__all__:
    assert getattr(flaxgpt, name).__name__ == name, name
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'generete'"):
        _ = flaxgpt.generete
    assert set(flaxgpt.__all__) <= set(dir(flaxgpt))


def test_every_package_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted([".".join(path.parts) for path in PACKAGES] + ["flaxgpt_scripts"])


@pytest.mark.parametrize("room", PACKAGES, ids=str)
def test_a_room_says_in_one_line_what_it_holds(room):
    docstring = ast.get_docstring(ast.parse((ROOT / room / "__init__.py").read_text(encoding="utf-8")))
    assert docstring, f"{room}/__init__.py has no docstring"
    assert docstring.splitlines()[0].endswith("."), f"the first line of {room}/__init__.py is no sentence"


TWINS = {
    "torch_side.py": "flax_side.py",
    "huggingface_side.py": "flax_side.py",
    "torch_recorder.py": "jax_recorder.py",
    "wide.py": "jax_recorder.py",  # which refuses a model that casts to float32 where float64 is asked for
}


def test_a_file_of_the_reference_has_its_twin_at_the_same_path():
    without = [
        path.relative_to(ROOT / "torch_ref")
        for path in (ROOT / "torch_ref").rglob("*.py")
        if not (ROOT / "flaxgpt" / str(path.relative_to(ROOT / "torch_ref")).replace(path.name, TWINS.get(path.name, path.name))).is_file()
    ]
    assert without == []


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biases", [{"bias": False}, {}, {"qkv_bias": True}], ids=str)
def test_the_tables_of_parameters_name_those_that_the_model_has(tied, biases):
    cfg = SMALL.replace(tie_embeddings=tied, **biases)
    shapes = jax.eval_shape(lambda: init_params(cfg, jax.random.key(0)))
    made = {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(shapes)}
    assert made == {row.path for row in PARAMETERS if row.exists(cfg)}


def test_the_tables_of_parameters_list_them_in_the_same_order():
    paths = [row.path for row in PARAMETERS]
    assert list(PARTITIONS) == paths
    assert list(INITIALISERS) == [path for path in paths if "norm" not in path], "only norms have no choice of initialiser"


@pytest.mark.parametrize("name", ["drop_emb", "trf_blocks.3.ff.layers.2", "trf_blocks.12.att.W_query.output", "final_norm", "trf_blocks.0"])
def test_names_of_modules_convert_both_ways(name):
    layer = int(name.split(".")[1]) if "trf_blocks" in name else 0
    assert module_name(module_path(name), layer) == name


def test_every_module_imports_by_itself():
    for side in ("flaxgpt", "torch_ref"):
        for path in (ROOT / side).rglob("*.py"):
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
