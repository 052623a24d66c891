"""YAML as a configuration needs it: plain values, each key once, nothing that grows when it is read."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 1 << 16  # a recipe has some thousands; PyYAML needs minutes for a mebibyte of brackets


class _Loader(yaml.SafeLoader):
    """The safe loader without aliases, of which ten lines can make a billion values, and without repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "aliases (*) are not read; write the value out", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        places: dict[Any, yaml.Mark] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in places:
                raise yaml.constructor.ConstructorError(
                    f"the key {key.value!r} is there twice, first", places[key.value], "and again", key.start_mark
                )
            places[key.value] = key.start_mark
        return super().construct_mapping(node, deep)


def read_yaml(file: Path) -> Any:
    """What a YAML file holds.

    Raises:
        ValueError: larger than 64 KiB, not YAML, tags, aliases, a key twice, nested too deeply; says where.
        OSError: it cannot be read.
    """
    with open(file, "rb") as opened:
        return parse_yaml(opened.read(MOST_BYTES + 1))


def parse_yaml(content: bytes) -> Any:
    """What YAML in UTF-8 holds; raises ValueError as `read_yaml` does."""
    if len(content) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES} bytes: no configuration")
    try:
        return yaml.load(content.decode("utf-8-sig"), _Loader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (LookupError, AttributeError):  # of PyYAML, over a value such as `!!float ""`
        raise ValueError("a value that is not what its tag (!!) says") from None
    except (yaml.YAMLError, OverflowError) as error:
        raise ValueError(str(error)) from error
