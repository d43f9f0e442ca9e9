"""Record a training run of the reference, and repeat it in flaxgpt on the same batches with the same dropout masks.

Both train side by side, an update at a time, so nothing large is kept. Losses at every evaluation and samples at the end of every
epoch are put next to each other; the exit code is 1 if an evaluation differs by more than 0.01.

Examples:
  replay.py                                            the published run, 90 updates of 124M
  replay.py --dtype float64 --emb-dim 96 --n-layers 3  a small one in float64: what is left when rounding is gone
"""

import sys

from flaxgpt.errors import InputError
from flaxgpt.run.cli import one_line_errors, parse_train

LIMIT = 0.01


@one_line_errors
def main() -> None:
    """Parse the flags, load the data, record and repeat, compare."""
    args = parse_train(__doc__, preset="verdict-124m", folder="replay-")
    if args.resume:
        raise InputError("a replay can't be resumed: the reference's generator depends on all that was drawn before")
    if args.init_from:
        raise InputError("a replay repeats a run from its random weights on: leave out --init-from")
    if args.config.model.dtype == "bfloat16" or args.config.fsdp > 1 or args.config.grad_accum_steps != 1 or not args.config.drop_last:
        raise InputError("a replay is made in float32 or float64, on one device, in whole batches of one size, without accumulation")

    from flaxgpt.run.setup import prepare

    if (args.out_dir / "metrics.jsonl").exists():
        raise InputError(f"{args.out_dir} holds a training run, which a replay does not replace: choose another --out-dir")
    cfg, corpus = prepare(args.config, args.out_dir, overwrite=args.overwrite)

    from flaxgpt.parity.flax_side import replay
    from flaxgpt.parity.replay import Comparison

    try:
        from torch_ref.parity.replay import recorded_run
    except ModuleNotFoundError as error:
        raise InputError(f'the reference needs {error.name}: pip install -e ".[parity]" (or "flaxgpt[parity]")') from None

    comparison = Comparison(args.out_dir, cfg, corpus.tokenizer)
    weights, updates = recorded_run(cfg, corpus, cfg.model.dtype)
    for repeated in replay(cfg, weights, updates, cfg.model.dtype):
        comparison.add(repeated)
    if not comparison.summary(LIMIT) <= LIMIT:  # nan is no agreement
        sys.exit(1)


if __name__ == "__main__":
    main()
