"""Overrides a configuration by command-line flags: `--section.key VALUE`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_origin

from seppo_fast.config.load import parse_config, read_config
from seppo_fast.config.plain_yaml import parse_yaml
from seppo_fast.config.schema import Config, closest, keys
from seppo_fast.utils.errors import ConfigError

_ORIGIN = "command line"  # as error messages name it


def configure(file: str, overrides: Sequence[str]) -> Config:
    """Reads a configuration from a YAML file and applies flags to it; `--help` prints all flags and exits.

    A flag is `--section.key VALUE`; the section may be omitted if the key is unique (`--learning-rate 1e-5`), and the
    diffusers scripts' names are accepted. Values are read as in the file, except that a list is written as several
    words. So a mistake has the same message in the file and on the command line.

    Args:
        file: the file or recipe; see `read_config`.
        overrides: the words after it.

    Raises:
        ConfigError: the file cannot be used; a flag is unknown (a similar one is suggested) or has no value; a value is
            invalid; or settings contradict each other.
    """
    config = read_config(file)
    if "--help" in overrides or "-h" in overrides:
        _print_help(file, config)
    tree = config.model_dump()
    for key, words in _flags(overrides):
        section, _, name = key.rpartition(".")
        (tree[section] if section else tree)[name] = _value(key, words)
    return parse_config(tree, _ORIGIN)


def _print_help(file: str, config: Config) -> None:
    """Prints every flag with its description and the file's value, and exits with code 0."""
    import tyro

    tyro.cli(
        Config,
        prog=f"seppo-fast train {file}",
        description="Defaults shown are those of the file.",
        default=config,
        args=["--help"],
        config=(tyro.conf.FlagConversionOff,),
    )


def _flags(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Splits a command line into pairs (key, words of its value); `--beta_dpo=10` is ("train.beta", ["10"])."""
    flags: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags.append((_key(name), [value] if equals else []))
        elif flags:
            flags[-1][1].append(word)
        else:
            raise ConfigError(f"{_ORIGIN}: unexpected word {word!r}; settings are written --section.key VALUE")
    return flags


def _key(name: str) -> str:
    """Returns the key that a flag's name means."""
    known, name = keys(), name.replace("-", "_")
    if name in known:
        return known[name]
    similar = closest(name, known)
    advice = f", did you mean {_flag(known[similar])}?" if similar else "; --help after the file's name lists all flags"
    raise ConfigError(f"{_ORIGIN}: unknown flag {_flag(name)}{advice}")


def _flag(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _value(key: str, words: Sequence[str]) -> Any:
    """Returns the value of a key from its words, which are read as YAML unless the key holds text."""
    section, _, name = key.rpartition(".")
    holder: Any = Config.model_fields[section].annotation if section else Config
    kind = holder.model_fields[name].annotation
    if get_origin(kind) is tuple:
        return tuple(words) if kind == tuple[str, ...] else tuple(map(_plain, words))
    if not words:
        raise ConfigError(f"{_ORIGIN}: {_flag(key)} needs a value")
    if len(words) > 1:
        raise ConfigError(
            f"{_ORIGIN}: {_flag(key)} takes one value, but got {len(words)}: {' '.join(words)}; put quotes around a "
            "value with spaces"
        )
    return words[0] if kind is str else _plain(words[0])


def _plain(word: str) -> Any:
    """Returns a word as YAML reads it; Python's `None` means the same as `null`."""
    try:
        return None if word == "None" else parse_yaml(word.encode())
    except ValueError:
        return word
