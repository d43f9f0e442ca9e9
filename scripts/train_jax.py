"""Train a GPT with JAX: `python scripts/train_jax.py` trains `tiny` on text that Python carries with it.

Examples:
  train_jax.py --preset shakespeare-char
  train_jax.py --data my.txt --out-dir runs/mine --max-steps 3000
  train_jax.py --out-dir runs/mine --resume --max-steps 5000
  train_jax.py --data my.txt --out-dir runs/watched --tensorboard --wandb my-project --profile 10:13
  train_jax.py --preset gpt2-1558m --fsdp 8 --coordinator host0:1234 --num-processes 4 --process-id 0   # and on the others 1, 2, 3
  train_jax.py --init-from gpt2 --data my.txt --context-length 256 --learning-rate 5e-5 --min-learning-rate 5e-6 --out-dir runs/tuned
"""

import sys

from flaxgpt.run.cli import JaxTrainArgs, one_line_errors, parse_train, parse_updates, sample_command
from flaxgpt.run.process import keep_memory_and_programs


@one_line_errors
def main() -> None:
    """Parse the flags, load the data, train, say how to go on."""
    keep_memory_and_programs()
    args = parse_train(__doc__, kind=JaxTrainArgs)
    profile = None if args.profile is None else parse_updates(args.profile)

    from flaxgpt import hosts
    from flaxgpt.checkpoint import load_params
    from flaxgpt.convert.params import cropped
    from flaxgpt.run.folder import has_run
    from flaxgpt.run.log import RunLog
    from flaxgpt.run.setup import prepare
    from flaxgpt.run.silent import SilentLog
    from flaxgpt.train import train

    with hosts.together(args.processes):
        with hosts.first_before_others():
            resume = args.resume and has_run(args.out_dir)
            cfg, corpus = prepare(args.config, args.out_dir, resume=resume, overwrite=args.overwrite)
        hosts.check_same(flags=[cfg.to_dict(), resume, args.source is None], data=corpus.fingerprint())
        if args.resume and not resume and hosts.is_first():
            print(f"{args.out_dir}: there is no run yet to go on with, so it begins")
        params = None
        if args.source:
            params = cropped(load_params(args.source) if args.source.params is None else args.source.params, cfg.model)
            hosts.check_same(init_from=hosts.first_numbers(params))
        kind = RunLog if hosts.is_first() else SilentLog
        with kind(args.out_dir, init_from=args.source and str(args.source.path.absolute())) as log:
            train(cfg, corpus, log, resume=resume, params=params, profile=profile)
            log.summary(sample_command(args.out_dir))
    if log.stop.signal is not None:
        if hosts.is_first():
            print("stopped early: the same command with --resume goes on from here")
        sys.exit(128 + log.stop.signal)


if __name__ == "__main__":
    main()
