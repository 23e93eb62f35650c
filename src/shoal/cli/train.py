"""`shoal train`: train what a YAML or JSON file describes."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from shoal.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `shoal train`."""
    parser.add_argument("file", type=Path, help="YAML or JSON: GRPOTrainer's arguments, and fields of GRPOConfig")
    parser.add_argument("--trainer-processes", type=int, metavar="N", help="start N of them, with torchrun")
    parser.add_argument("--resume", action="store_true", help="go on from the newest complete checkpoint")
    parser.add_argument("--check", action="store_true", help="check everything that can be without training")


def run(args: argparse.Namespace) -> int:
    """Train, and save the model to `model/` in the run's output_dir.

    Raises:
        ShoalError: Something cannot work.
    """
    from shoal.trainer.run_file import read_run_file

    run_file = read_run_file(args.file)  # a slip is told once, not by every process
    if args.trainer_processes is not None:
        _launch(args)
    from shoal.trainer.run_parts import make_trainer

    trainer = make_trainer(run_file)
    try:
        if args.check:
            batch = f"{trainer.args.prompts_per_batch} prompts x {trainer.args.num_generations}"
            print(f"{args.file} is fine: {batch} at a time")
            return 0
        trainer.train(resume_from_checkpoint=args.resume or None)
        folder = Path(trainer.args.output_dir) / "model"
        trainer.save_model(str(folder))
        if trainer.is_world_process_zero():
            print(f"The trained model is in {folder}")
    finally:
        trainer.close()
    return 0


def _launch(args: argparse.Namespace) -> None:
    """Become torchrun, which runs this command once for each process; return only inside of it.

    Raises:
        ConfigError: The number makes no sense, or a launcher has started this process already.
    """
    if args.trainer_processes < 1:
        raise ConfigError(f"--trainer-processes={args.trainer_processes} trains nothing. Give at least 1.")
    if "WORLD_SIZE" in os.environ:
        raise ConfigError("--trainer-processes starts torchrun, which has started this process already. Leave it out.")
    words = ["train", str(args.file), *(["--resume"] if args.resume else []), *(["--check"] if args.check else [])]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.trainer_processes)]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *launcher, "-m", "shoal", *words])
