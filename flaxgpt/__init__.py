"""GPT-2 as pure functions: parameters, tokens and randomness in, logits out.

The public names are here, and each is loaded when it is first used: `import flaxgpt` by itself brings in no JAX.
"""

from __future__ import annotations

import importlib

_MODULES = {
    "GPTConfig": "config",
    "TrainConfig": "config",
    "SamplingConfig": "config",
    "InputError": "errors",
    "GPT": "model",
    "init_params": "model",
    "forward": "model",
    "next_token_loss": "loss",
    "activations": "interpret.activations",
    "generate": "generation.generate",
    "complete": "generation.generate",
    "complete_text": "generation.text",
    "stream": "generation.text",
    "inspect_tokens": "interpret.record",
    "Inspection": "interpret.inspection",
    "evaluate": "evaluation.evaluate",
    "load": "checkpoint",
    "load_run": "checkpoint",
    "from_torch": "convert.params",
    "to_torch": "convert.params",
    "from_huggingface": "convert.huggingface",
    "to_huggingface": "convert.huggingface",
    "get_tokenizer": "data.tokenizer",
}
"""Public name -> the module that defines it."""

__all__ = [*_MODULES]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
