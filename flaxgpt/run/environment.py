"""What a run is made with: its command, versions, and the commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import flaxgpt

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "torch", "numpy")


def environment() -> dict[str, str]:
    """What to know for making a run once more, in words."""
    packages = ["flaxgpt", *(name for name in _PACKAGES if name.split("-")[0] in sys.modules)]
    found = {
        "command": shlex.join(sys.argv),
        "commit": _commit(),
        "versions": ", ".join(filter(None, map(_version, packages))),
        "Python": platform.python_version(),
        "machine": f"{platform.platform()}, {os.cpu_count()} CPU cores",
    }
    return {name: said for name, said in found.items() if said}


def _version(package: str) -> str | None:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of the checkout that flaxgpt is imported from, if it is one; "-dirty" follows where files have changed."""
    root = Path(flaxgpt.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or not a checkout that it would read
        return None
