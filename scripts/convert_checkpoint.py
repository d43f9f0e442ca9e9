"""Write a model in another format.

Examples:
  convert_checkpoint.py runs/tuned exported --to huggingface     # AutoModelForCausalLM.from_pretrained("exported") loads it

SOURCE is a run folder of either trainer, a Hugging Face folder, or an id on its hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2
or any other). TARGET is made, whole or not at all, and must not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from flaxgpt.run.cli import one_line_errors


@dataclass(frozen=True)
class ConvertArgs:
    """What to convert, where to, and into what."""

    source: tyro.conf.Positional[str]
    """A run folder, a Hugging Face folder, or an id on its hub."""
    target: tyro.conf.Positional[Path]
    """The folder to make."""
    to: Literal["huggingface"]
    """huggingface: config.json, model.safetensors, generation_config.json and, of the tokenizer gpt2, its files."""


@one_line_errors
def main() -> None:
    """Parse the flags, load, write, say what was left out."""
    args = tyro.cli(ConvertArgs, description=__doc__)

    from flaxgpt.convert.files import check_target, write_folder

    check_target(args.target)

    from flaxgpt.checkpoint import load
    from flaxgpt.convert.huggingface import to_huggingface
    from flaxgpt.data.tokenizer_files import tokenizer_files

    params, cfg, tokenizer = load(args.source)
    texts = tokenizer_files(tokenizer)
    write_folder(args.target, to_huggingface(params, cfg), cfg, texts)
    print(f"{args.source} -> {args.target}")
    if not cfg.qkv_bias:
        print("it has no biases on query, key and value, and GPT-2 has them: they were written as zeros")
    if not texts:
        print(f"its tokenizer ({tokenizer.kind}) was not exported: only gpt2 is")


if __name__ == "__main__":
    main()
