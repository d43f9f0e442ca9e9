"""Write a model in another format.

Examples:
  convert_checkpoint.py runs/tuned exported --to huggingface       # AutoModelForCausalLM.from_pretrained("exported") loads it
  convert_checkpoint.py gpt2 gpt2.safetensors --to safetensors     # the reference's names, and the config in the metadata
  convert_checkpoint.py out/ckpt.pt runs/from-nanogpt --to run     # nanoGPT's; then sample.py --checkpoint runs/from-nanogpt
  convert_checkpoint.py model.pth exported --to huggingface --n-heads 12

SOURCE is a run folder of either trainer, a Hugging Face folder or an id on its hub (gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2
or any other), nanoGPT's ckpt.pt or the folder with it, or a state_dict of the reference (torch.save or safetensors). What it is, is seen
from what is in it. TARGET is made, whole or not at all, and must not exist. Pickles (.pt, .pth) are read and written by torch
(the extra parity), and read without running anything in them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from flaxgpt.errors import InputError
from flaxgpt.run.cli import one_line_errors


@dataclass(frozen=True)
class ConvertArgs:
    """What to convert, where to, and into what."""

    source: tyro.conf.Positional[str]
    """A run folder, a Hugging Face folder, an id on its hub, nanoGPT's ckpt.pt, or a state_dict of the reference."""
    target: tyro.conf.Positional[Path]
    """The folder (run, huggingface) or file (nanogpt, torch, safetensors) to make."""
    to: Literal["run", "huggingface", "nanogpt", "torch", "safetensors"]
    """run: a run folder, for sample.py and --init-from. huggingface: config.json, model.safetensors (or several and their index),
    generation_config.json and the tokenizer's files. nanogpt: a ckpt.pt, and for a tokenizer of characters a meta.pkl beside it.
    torch: a .pth with model_state_dict, of the reference's names, and config. safetensors: the same tensors, and the config as
    metadata."""
    n_heads: int | None = None
    """Attention heads of a SOURCE that is a state_dict without a config: shapes do not imply them."""
    meta: Path | None = None
    """nanoGPT's meta.pkl, with its characters; None: the one beside SOURCE, if SOURCE is nanoGPT's."""
    shard_gb: float = 5.0
    """The most that one file of a Hugging Face folder holds, in GB; a larger model becomes several."""


@one_line_errors
def main() -> None:
    """Parse the flags, open, write, say what there is to know."""
    args = tyro.cli(ConvertArgs, description=__doc__)
    if not 0 < args.shard_gb < math.inf:
        raise InputError(f"shard_gb={args.shard_gb}: expected a positive number")

    from flaxgpt.convert.files import check_target

    check_target(args.target)

    from flaxgpt.run.export import export
    from flaxgpt.run.source import open_source

    write_pickle = None
    if args.to in ("nanogpt", "torch"):
        try:
            from torch_ref.checkpoint import write_pickle
        except ModuleNotFoundError as error:
            raise InputError(f'--to {args.to} needs {error.name}: pip install -e ".[parity]" (or "flaxgpt[parity]")') from None
    source = open_source(args.source, n_heads=args.n_heads, meta=args.meta)
    if source.params is None:  # a run of train_jax.py
        from flaxgpt.checkpoint import load_params

        source = source._replace(params=load_params(source))
    notes = export(source, args.target, args.to, shard_bytes=int(args.shard_gb * 1e9), write_pickle=write_pickle)
    if source.rounded:
        notes = [*notes, f"float64 tensors were rounded to float32: {', '.join(source.rounded)}"]
    print(f"{args.source} -> {args.target}", *notes, sep="\n")


if __name__ == "__main__":
    main()
