"""Overrides a configuration by command-line flags, which tyro derives from the schema."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from seppo_fast.config.contradictions import refuse_contradictions
from seppo_fast.config.load import read_config
from seppo_fast.config.schema import Config, keys


def configure(file: str, overrides: Sequence[str]) -> Config:
    """Reads a configuration from a YAML file and applies flags to it.

    A flag is `--section.key VALUE`; the section may be omitted if the key is unique (`--learning-rate 1e-5`), and the
    diffusers scripts' names are accepted. Exits with code 2 and a message, as command lines usually do, if a flag is
    unknown (a similar one is suggested) or its value is invalid.

    Raises:
        ConfigError: the file cannot be used (see `read_config`), or settings contradict each other.
    """
    config = tyro.cli(
        Config,
        prog=f"seppo-fast train {file}",
        description="Defaults shown are those of the file.",
        default=read_config(file),
        args=[_spell_out(word, after) for after, word in zip(["", *overrides], overrides, strict=False)],
        config=(tyro.conf.FlagConversionOff,),
    )
    refuse_contradictions(config)
    return config


_PYTHON = {"true": "True", "false": "False", "null": "None"}  # from YAML's words to those that tyro accepts


def _spell_out(word: str, after: str) -> str:
    """Turns `--learning-rate` into `--train.learning-rate`, `--beta_dpo=10` into `--train.beta=10`, `true` into `True`.

    Args:
        word: the word to translate.
        after: the word before it.
    """
    if word in _PYTHON:
        return _PYTHON[word]
    if word == "no" and after == "--mixed_precision":
        return "fp32"
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    full = keys().get(name.replace("-", "_"))
    if full is None:
        return word
    return f"--{full.replace('_', '-')}{equals}{value}"
