"""The command line: `seppo-fast train|check CONFIG.yaml [--section.key VALUE ...]` and commands about a run."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seppo_fast import __version__
from seppo_fast.utils.errors import (
    EXIT_INTERRUPTED,
    CheckpointError,
    ConfigError,
    LostProcessError,
    OutOfMemoryError,
    SeppoError,
)
from seppo_fast.utils.logging import tolerant_output

if TYPE_CHECKING:
    from seppo_fast.config.schema import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; an output that cannot be written does not end the command.

    0 ok, 2 config, 3 data, 4 out of memory, 5 non-finite, 6 checkpoint, 7 another process lost, 130 interrupted.
    """
    with tolerant_output():
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
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="train | check | report | export | score | demo | human"
    )
    for name, purpose in {
        "train": "train a model, or resume an unfinished run",
        "check": "check configuration, data and model, and estimate memory, disk and time, without training",
    }.items():
        command = commands.add_parser(
            name,
            help=purpose,
            description=purpose,
            usage=f"seppo-fast {name} CONFIG.yaml [--section.key VALUE ...]",
            add_help=False,
            prefix_chars="\0",  # no word is an option of this parser; `configure` reads the flags
        )
        command.add_argument(
            "config", nargs="?", help="a YAML file, or a recipe that ships with the package, such as sd15.yaml"
        )
        command.add_argument(
            "overrides", nargs="*", help="--section.key VALUE, instead of the file's; --help lists every key"
        )
        command.set_defaults(explain=command.print_help)
    purpose = "write one HTML page about a run, finished or not"
    report = commands.add_parser("report", help=purpose, description=purpose)
    report.add_argument("run", type=Path, help="the run's folder")
    report.add_argument(
        "--output", type=Path, help="the file to write, an older report is replaced; default: report.html in the run's"
    )
    report.add_argument(
        "--watch",
        action="store_true",
        help="rewrite the page every ten seconds while the run's log grows, until the run is finished or Ctrl-C",
    )
    purpose = "write a run's trained weights in a format that other software loads"
    export = commands.add_parser("export", help=purpose, description=purpose)
    export.add_argument("run", type=Path, help="the run's folder")
    export.add_argument(
        "--format",
        choices=("diffusers", "lora", "comfyui"),
        help="a pipeline folder with any LoRA merged in, a LoRA for diffusers, or a LoRA with kohya's key names; "
        "default: diffusers if all weights were trained, else lora",
    )
    export.add_argument("--model", dest="path", help="the base model's new place, if it was moved")
    export.add_argument("--motion-adapter", help="the motion adapter's new place, if it was moved")
    export.add_argument("--raw", action="store_true", help="the raw weights, even if the run keeps a moving average")
    export.add_argument("--output", type=Path, help="a folder that does not exist; default: export-FORMAT in the run's")
    _add_score(commands)
    demo = commands.add_parser("demo", help="align the embedded pipeline and judge the result, in minutes on a CPU")
    demo.add_argument("--clips", action="store_true", help="AnimateDiff on moving shapes instead of pictures")
    demo.add_argument(
        "--output",
        type=Path,
        help="the run's folder; default: runs/demo (with --clips: runs/demo-video), where an unfinished demo is "
        "resumed; if that is finished, the next one with a number",
    )
    _add_human(commands.add_parser("human", help="compare two models by people: write a page, tally the answers"))
    return parser


def _add_score(commands: Any) -> None:
    purpose = "generate with base and runs at the same seeds, score and compare them; rerun to resume"
    score = commands.add_parser("score", help=purpose, description=purpose)
    score.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="the folders of runs with the same base")
    score.add_argument("--prompts", type=Path, help="a .txt file with a prompt per line, or a .json list")
    score.add_argument(
        "--scorers",
        type=_names,
        default=[],
        help="scorers, separated by commas; module:function names your own; default: the published ones",
    )
    score.add_argument("--samples", type=int, default=1, help="samples per prompt; default: 1")
    score.add_argument("--seed", type=int, default=0, help="seed of the starting noise; default: 0")
    score.add_argument("--guidance", type=float, help="guidance scale; default: the protocol's")
    score.add_argument(
        "--protocol",
        default="run",
        help="sampling settings: the runs' own (run), or those of a published evaluation: paper, sdpo, spo",
    )
    score.add_argument("--batch", type=int, help="samples generated at once; default: the folder's or the runs' own")
    score.add_argument("--update", type=int, help="the saved state after this update; default: the newest")
    score.add_argument("--raw", action="store_true", help="the raw weights, even if a run keeps a moving average")
    score.add_argument("--only", choices=("generate", "score", "statistics"), help="run only this phase")
    score.add_argument("--output", type=Path, help="the folder to write; default: score in the first run's")
    score.add_argument("--weights", type=Path, help="the folder with the scorers' weights")
    score.add_argument("--real", help="a folder of real pictures or clips, or shapes: those of the embedded world")
    score.add_argument(
        "--metrics",
        type=_names,
        default=[],
        help="metrics against --real: ssim,psnr,lpips,fid,clean-fid,kid,fvd,frechet,kernel",
    )
    score.add_argument("--features", help="the features of frechet and kernel: judge, or module:function for your own")
    score.add_argument("--layout", help="chronomagic: also write clips as its official scripts read them")
    score.add_argument("--convert", type=Path, metavar="FILE", help="only write a pickle's weights as safetensors")


def _add_human(human: argparse.ArgumentParser) -> None:
    actions = human.add_subparsers(dest="action", required=True, metavar="make | tally")
    purpose = "write a page for a blind comparison of two models; it needs no server"
    make = actions.add_parser("make", help=purpose, description=purpose)
    make.add_argument("folder", type=Path, help="the output folder of seppo-fast score")
    make.add_argument("--models", type=_names, help="two models, such as base,NAME; needed if the folder has more")
    make.add_argument("--items", type=int, help="the number of items; default: all, but at most 100")
    make.add_argument("--seed", type=int, default=0, help="seed of the choice, order and sides; default: 0")
    make.add_argument("--raters", type=_names, help="names of the raters; default: rater-1,rater-2,rater-3")
    make.add_argument(
        "--questions", type=_names, help="some of overall,alignment,quality,motion; default: all, motion for clips only"
    )
    make.add_argument("--output", type=Path, help="a folder that does not exist; default: human in FOLDER")
    purpose = "tally the files of answers that raters have saved"
    tally = actions.add_parser("tally", help=purpose, description=purpose)
    tally.add_argument("folder", type=Path, help="the folder with answers-*.json, and possibly a scores.csv")
    tally.add_argument("--key", type=Path, required=True, help="the key.json that human make wrote")
    tally.add_argument("--json", type=Path, help="a file for the results, replaced if it exists")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _run(arguments: argparse.Namespace) -> int:
    # Deferred: these imports take seconds and would delay usage errors.
    from seppo_fast.utils.logging import quiet_libraries

    try:
        if arguments.command == "report":
            quiet_libraries()
            if arguments.watch:
                from seppo_fast.commands.watch import watch

                watch(arguments.run, arguments.output)
            else:
                from seppo_fast.commands.report import report

                report(arguments.run, arguments.output)
            return 0
        if arguments.command == "export":
            quiet_libraries()
            from seppo_fast.commands.export import export

            moved = {name: getattr(arguments, name) for name in ("path", "motion_adapter") if getattr(arguments, name)}
            export(arguments.run, arguments.format, raw=arguments.raw, output=arguments.output, model=moved)
            return 0
        if arguments.command == "score":
            quiet_libraries()
            return _score(arguments)
        if arguments.command == "human":
            _human(arguments)
            return 0
        if arguments.command == "demo":
            quiet_libraries()
            return _demo(arguments.clips, arguments.output)
        if arguments.config in ("-h", "--help"):
            arguments.explain()
            return 0
        config = _configured(arguments)
        quiet_libraries()
        from seppo_fast.models.registry import validate_model

        validate_model(config)
        if arguments.command == "check":
            from seppo_fast.commands.check import check

            return check(config)
        from seppo_fast.train import train

        train(config)
        return 0
    except (MemoryError, RuntimeError) as error:
        from seppo_fast.distributed.processes import is_lost_process
        from seppo_fast.utils.memory import is_out_of_memory

        if is_lost_process(error):
            raise LostProcessError(
                f"another process of this run has exited or does not respond: {str(error).splitlines()[0]}. Its own "
                "message is above; rerun the same command to resume from the last saved state"
            ) from error
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else 'allocation failed'}; "
            "to use less, set --memory low, a smaller train.micro_batch, sampler.batch or data.resolution, or "
            "model.train lora"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(f"no space left for {error.filename or 'the run'}; make room and rerun") from error
        raise


def _configured(arguments: argparse.Namespace) -> Config:
    from seppo_fast.config.load import shipped
    from seppo_fast.config.overrides import configure

    file = arguments.config
    if file is None or file.startswith("--"):
        raise ConfigError(
            f"{arguments.command}: the first word must be a YAML file or a recipe, as in: seppo-fast "
            f"{arguments.command} sd15-lora.yaml --data.source my_pictures; {shipped()}"
        )
    return configure(file, arguments.overrides)


def _score(arguments: argparse.Namespace) -> int:
    if arguments.convert is not None:
        from seppo_fast.scorers.convert import convert

        convert(arguments.convert)
        return 0
    from seppo_fast.commands.score import Options, score

    names = ("prompts", "samples", "seed", "guidance", "protocol", "batch", "update", "raw", "only", "output")
    options = {name: getattr(arguments, name) for name in (*names, "weights", "real", "features", "layout")}
    options |= {name: tuple(getattr(arguments, name)) for name in ("scorers", "metrics")}
    score(Options(tuple(arguments.runs), **options))
    return 0


def _demo(clips: bool, output: Path | None) -> int:
    from seppo_fast.commands.demo import RECIPES, demo, demo_folder
    from seppo_fast.config.load import read_config

    config = read_config(RECIPES[clips])
    demo(config.model_copy(update={"output": str(output or demo_folder(Path(config.output)))}))
    return 0


def _human(arguments: argparse.Namespace) -> None:
    from seppo_fast.commands.human import make, tally

    if arguments.action == "tally":
        tally(arguments.folder, arguments.key, arguments.json)
        return
    make(
        arguments.folder,
        models=arguments.models,
        items=arguments.items,
        seed=arguments.seed,
        raters=arguments.raters,
        questions=arguments.questions,
        output=arguments.output,
    )


if __name__ == "__main__":
    sys.exit(main())
