"""Mistakes of a first-time user at the command line: each message says what is wrong, where, and what to do."""

import pytest
import torch
from PIL import Image

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


def test_check_ends_with_the_bad_files_and_counts_that_agree(file, tmp_path, capsys):
    """One example has no caption, one is no picture, one of the four others is small; estimates stand before that."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(6):
        Image.new("RGB", (7 if index == 5 else 40, 40)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a picture that has the number {index}")
    (folder / "0.txt").unlink()
    (folder / "1.png").write_bytes(b"no picture")
    assert main(["check", str(file), "--data.source", str(folder)]) == 3
    *above, small, cropped, caption, unread, counts, refused = capsys.readouterr().out.splitlines()
    assert small.startswith("1 of 4 images is enlarged more than twofold") and cropped.startswith("1 of 4 images loses")
    assert caption.startswith("bad: 0.png: no caption") and unread.startswith("bad: 1.png: not an image")
    assert counts == "data: 6 examples, 2 bad, 4 usable"
    assert refused == "a run refuses more than 1 % of bad examples: fix or remove them"
    assert above[-1].startswith("eta: about ") and above[-1].endswith("extrapolated from a few timed forwards")
    assert any(line.startswith("4 of 4 prompts have more tokens") for line in above)


def test_check_reads_the_data_even_if_the_model_cannot_be_loaded(file, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "0.png").write_bytes(b"no picture")
    (folder / "0.txt").write_text("a caption")
    assert main(["check", str(file), "--data.source", str(folder), "--model.path", "nobody/no-such-model"]) == 2
    said = capsys.readouterr()
    assert "bad: 0.png: not an image" in said.out and "data: 1 examples, 1 bad, 0 usable" in said.out
    assert said.err.startswith("seppo-fast: model.path = 'nobody/no-such-model' could not be loaded")
