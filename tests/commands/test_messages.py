"""Mistakes of a first-time user at the command line: each message says what is wrong, where, and what to do."""

import pytest

from seppo_fast.cli import main


@pytest.fixture
def ends(capsys):
    """A function that runs a command, asserts its exit code, and returns the only line that it prints to stderr."""

    def ends(code, *words):
        assert main([str(word) for word in words]) == code
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return ends


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize("words", [[], ["--data.source", "my_pictures"]], ids=["nothing", "a flag"])
def test_without_a_recipe_the_recipes_are_listed(ends, command, words):
    said = ends(2, command, *words)
    assert said.startswith(f"seppo-fast: {command}: the first word must be a YAML file or a recipe, as in: seppo-fast ")
    assert f"{command} sd15-lora.yaml --data.source my_pictures; recipes that ship with seppo_fast: " in said
    assert "sd15.yaml" in said


@pytest.mark.parametrize("command", ["train", "check"])
def test_help_before_a_recipe_says_what_to_give(capsys, command):
    assert main([command, "--help"]) == 0
    assert f"usage: seppo-fast {command} CONFIG.yaml [--section.key VALUE ...]" in capsys.readouterr().out
