"""Reads YAML restricted to what a configuration needs: plain values, no repeated keys, no aliases, at most 64 KiB."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 1 << 16  # recipes have a few thousand; PyYAML needs minutes for a mebibyte of brackets


class _Loader(yaml.SafeLoader):
    """The safe loader, which also refuses repeated keys and aliases; ten lines of aliases can make a billion values."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "aliases (*) are not accepted; write the value out", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        places: dict[Any, yaml.Mark] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in places:
                raise yaml.constructor.ConstructorError(
                    f"the key {key.value!r} is given twice, first", places[key.value], "and again", key.start_mark
                )
            places[key.value] = key.start_mark
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> Any:
    """Returns the content of a YAML file.

    Raises:
        ValueError: the file is larger than 64 KiB, not YAML, nested too deeply, or has tags of other types, aliases or
            a repeated key; for most of these the message says where.
        OSError: the file cannot be read.
    """
    with open(file, "rb") as opened:
        return parse_yaml(opened.read(MOST_BYTES + 1))


def parse_yaml(content: bytes) -> Any:
    """Returns the content of YAML in UTF-8; raises ValueError as `read_yaml` does."""
    if len(content) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES} bytes, too large for a configuration")
    try:
        return yaml.load(content.decode("utf-8-sig"), _Loader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (LookupError, AttributeError):  # PyYAML raises these for a value such as `!!float ""`
        raise ValueError("a value does not match its tag (!!)") from None
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(str(error)) from error
