"""Mistakes of a first-time user at the command line: each message says what is wrong, where, and what to do."""

import pytest
import torch

from seppo_fast.cli import main
from seppo_fast.config.load import to_yaml
from seppo_fast.models.families.sd15 import StableDiffusion
from tests.helpers.runs import tiny_config


@pytest.fixture
def ends(capsys):
    """A function that runs a command, asserts its exit code, and returns the only line that it prints to stderr."""

    def ends(code, *words):
        assert main([str(word) for word in words]) == code
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return ends


@pytest.fixture
def file(tiny, tmp_path):
    """A configuration file of a small run below `tmp_path`."""
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(tiny_config(tiny, tmp_path)))
    return file


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


@pytest.mark.parametrize("command", ["train", "check"])
@pytest.mark.parametrize("flag", ["--output", "--data.cache"])
def test_a_file_in_place_of_a_folder_is_named(ends, file, command, flag):
    key = flag.removeprefix("--")
    said = ends(2, command, file, flag, file)
    assert said == f"seppo-fast: {key} = {str(file)!r} is a file; choose another folder"
    said = ends(2, command, file, flag, file / "below")
    assert said == f"seppo-fast: {key} = {str(file / 'below')!r}: {file} is a file; choose another folder"


@pytest.mark.parametrize("command", ["report", "export"])
def test_a_run_that_is_absent_a_file_or_without_results_yet(ends, file, tmp_path, command):
    absent = tmp_path / "absent"
    assert (
        ends(2, command, absent) == f"seppo-fast: {absent}: does not exist; name the folder of a run, such as runs/demo"
    )
    assert ends(2, command, file) == f"seppo-fast: {file}: is a file; name the folder of a run, such as runs/demo"
    assert f"{tmp_path}: not the folder of a run" in ends(2, command, tmp_path)
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / ".lock").write_text("a run of seppo_fast\n")
    not_yet = {"report": "add --watch, which waits for it", "export": "has no saved state yet; it saves one every"}
    assert not_yet[command] in ends(2, command, begun)


def test_out_of_memory_while_encoding_names_the_resolution(ends, file, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "encode_images", lambda family, images: torch.empty(1 << 55))
    said = ends(4, "train", file)
    assert said.startswith("seppo-fast: out of memory while encoding data.source at data.resolution = 16: ")
    assert "allocate" in said and "; set a smaller data.resolution" in said and "micro_batch" not in said
