"""A file of prompts as data: its examples, its mistakes, and which objectives it serves."""

import json

import pytest

from seppo_fast.cli import main
from seppo_fast.config.load import to_yaml
from seppo_fast.data.media.images import load_image
from seppo_fast.data.sources import open_source
from seppo_fast.utils.errors import DataError
from tests.helpers.runs import tiny_config


def test_each_line_is_an_example_with_a_grey_picture(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa red fox\r\n\n  träume \na red fox\u2028in one line\nnul\0\n".encode())
    source = open_source(str(file))
    assert [(example.id, example.prompt) for example in source] == [
        ("prompts.txt:1", "a red fox"), ("prompts.txt:3", "träume"), ("prompts.txt:4", "a red fox\u2028in one line"),
    ]  # fmt: skip
    assert [problem.id for problem in source.problems] == ["prompts.txt:5"] and source.prompts_only
    assert not source.has_losers and not source.clips
    picture = load_image(source[0].image, 16)
    assert picture.shape == (16, 16, 3) and (picture == 127).all()
    before = source.digest()
    (tmp_path / "elsewhere").mkdir()
    other = tmp_path / "elsewhere" / "prompts.txt"
    other.write_bytes(file.read_bytes())
    assert open_source(str(other)).digest() == before
    renamed = tmp_path / "others.txt"
    renamed.write_bytes(b"\n" + file.read_bytes())
    assert open_source(str(renamed)).digest() == before
    other.write_text("a blue fox\n")
    assert open_source(str(other)).digest() != before


def test_a_file_that_is_not_utf8_is_refused_with_the_command_that_converts_it(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("une forêt enneigée".encode("cp1252"))
    with pytest.raises(DataError, match=r"not UTF-8 text; it looks like WINDOWS-1252; to convert it: iconv"):
        open_source(str(file))


def test_objectives_with_a_reward_train_on_it_and_no_other(tiny, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a red fox\na green door\n\na blue shed")
    config = tiny_config(
        tiny,
        tmp_path,
        objective="grpo",
        data={"source": str(tmp_path / "prompts.txt"), "prompt_dropout": 0.0},
        train={"pairs_per_update": 4, "updates": 2},
        rl={"reward": "brightness", "samples_per_prompt": 2},
    )
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    assert "reward" in capsys.readouterr().out
    entry = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert entry["kept"] == 1.0 and entry["grad_norm"] > 0
    words = ["check", str(tmp_path / "run.yaml"), "--objective", "sft", "--rl.reward", "null"]
    assert main([*words, "--rl.samples_per_prompt", "null"]) == 2
    assert "holds prompts without pictures, from which objective 'sft' cannot learn" in capsys.readouterr().err
