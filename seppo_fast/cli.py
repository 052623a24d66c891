"""The command line: `seppo-fast train|check CONFIG.yaml [--section.key VALUE ...]`, `seppo-fast demo`."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence
from pathlib import Path

from seppo_fast import __version__
from seppo_fast.errors import EXIT_INTERRUPTED, CheckpointError, OutOfMemoryError, SeppoError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0 ok, 2 config, 3 data, 4 out of memory, 5 non-finite, 6 checkpoint, 130 interrupted.
    """
    arguments = _parser().parse_args(argv)
    try:
        return _run(arguments)
    except KeyboardInterrupt as interruption:
        print(f"seppo-fast: {interruption}" if str(interruption) else "seppo-fast: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except SeppoError as error:
        print(f"seppo-fast: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="seppo-fast",
        description="SePPO: preference alignment of diffusion models from winners only.",
        epilog="seppo-fast train CONFIG.yaml --help lists every key with its default.",
    )
    parser.add_argument("--version", action="version", version=f"seppo_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | check | demo")
    for name, purpose in {
        "train": "run a whole training",
        "check": "look at configuration, data and model as training would, and train nothing",
    }.items():
        command = commands.add_parser(name, help=purpose, description=purpose, add_help=False)
        command.add_argument("config", help="a YAML file, or a recipe that ships with the package, such as sd15.yaml")
        command.add_argument("overrides", nargs=argparse.REMAINDER, help="--section.key VALUE, over what the file says")
    demo = commands.add_parser("demo", help="align the embedded pipeline and judge it, in minutes on a CPU")
    demo.add_argument("--output", type=Path, help="folder of the run; runs/demo, or the next free runs/demo-N")
    return parser


def _run(arguments: argparse.Namespace) -> int:
    # Imported where they are needed: they take seconds, and nobody should wait for them to read of a typing error.
    from seppo_fast.overrides import configure
    from seppo_fast.quiet import quiet_libraries

    try:
        config = None if arguments.command == "demo" else configure(arguments.config, arguments.overrides)
        quiet_libraries()
        if config is None:
            return _demo(arguments.output)
        if arguments.command == "check":
            from seppo_fast.check import check

            return check(config)
        from seppo_fast.train import train

        train(config)
        return 0
    except (MemoryError, RuntimeError) as error:
        from seppo_fast.memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else 'allocation failed'}; "
            "--memory low, a smaller train.micro_batch or sampler.batch, or model.train lora take less"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"no space left for {error.filename or 'the run'}; make room and start again"
            ) from error
        raise


def _demo(output: Path | None) -> int:
    from seppo_fast.config import read_config
    from seppo_fast.demo import demo
    from seppo_fast.files import free_name

    demo(read_config("demo.yaml").model_copy(update={"output": str(output or free_name(Path("runs/demo")))}))
    return 0
