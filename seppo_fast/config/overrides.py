"""The command-line spelling of the configuration: tyro on the same model."""

from __future__ import annotations

from collections.abc import Sequence

import tyro

from seppo_fast.config.contradictions import refuse_contradictions
from seppo_fast.config.load import read_config
from seppo_fast.config.schema import Config, keys


def configure(file: str, overrides: Sequence[str]) -> Config:
    """A configuration from a YAML file and flags over it.

    `--section.key VALUE`; the section may be left out where the key is unique (`--learning-rate 1e-5`), and the
    names of the diffusers scripts are accepted. Exits with code 2 and a message, as every command line does, where a
    flag is unknown (with a suggestion) or its value does not fit.

    Raises:
        ConfigError: the file, or settings that contradict each other; see `read_config`.
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


_PYTHON = {"true": "True", "false": "False", "null": "None"}  # YAML's words to those that tyro reads


def _spell_out(word: str, after: str) -> str:
    """`--learning-rate` to `--train.learning-rate`, `--beta_dpo=10` to `--train.beta=10`, `true` to `True`."""
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
