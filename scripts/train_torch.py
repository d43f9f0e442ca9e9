"""Train the same GPT in the PyTorch reference, with the flags of train_jax.py (a run can't be resumed).

Examples:
  train_torch.py --preset verdict-124m     the published run, to three decimals
  train_torch.py --out-dir runs/tiny-torch
  train_torch.py --init-from gpt2 --data my.txt --context-length 256 --learning-rate 5e-5 --min-learning-rate 5e-6 --out-dir runs/tuned
"""

import sys

from flaxgpt.errors import InputError
from flaxgpt.run.cli import one_line_errors, parse_train, sample_command
from flaxgpt.run.process import keep_memory_and_programs


@one_line_errors
def main() -> None:
    """Parse the flags, load the data, train, say how to sample."""
    keep_memory_and_programs()
    args = parse_train(__doc__)
    if args.resume:
        raise InputError("the reference can't resume: its random generator depends on all that was drawn before; train_jax.py can")
    if args.profile:
        raise InputError("--profile is of JAX's profiler: train_jax.py has it")
    run, model = args.config, args.config.model
    if run.grad_accum_steps == "auto":
        raise InputError("grad_accum_steps=auto is found by compiling, in train_jax.py: pass a number")
    only = {
        "fsdp": (1,),
        "tensor": (1,),
        "dtype": ("float32",),
        "remat": ("none",),
        "attention": ("auto", "plain"),
        "loss_chunk": (None, 0),
        "vocab_multiple": (1,),
    }
    given = run.to_dict() | model.to_dict()
    if flags := [f"--{name.replace('_', '-')} {values[-1]}" for name, values in only.items() if given[name] not in values]:
        raise InputError(f"the reference trains in float32 on one device, without kernels: pass {' '.join(flags)}")

    from flaxgpt.run.log import RunLog
    from flaxgpt.run.setup import prepare

    try:
        from torch_ref.train import train
    except ModuleNotFoundError as error:
        raise InputError(f'the reference needs {error.name}: pip install -e ".[parity]" (or "flaxgpt[parity]")') from None

    cfg, corpus = prepare(args.config, args.out_dir, overwrite=args.overwrite)
    weights = None
    if args.source:
        from flaxgpt.checkpoint import load_params
        from flaxgpt.convert.params import cropped, to_torch

        weights = to_torch(cropped(load_params(args.source), cfg.model), cfg.model)
    with RunLog(args.out_dir) as log:
        train(cfg, corpus, log, weights=weights)
        log.summary(sample_command(args.out_dir))
    if log.stop.signal is not None:
        sys.exit(128 + log.stop.signal)


if __name__ == "__main__":
    main()
