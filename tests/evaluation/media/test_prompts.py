"""Prompt files: their formats, and what is said about malformed ones."""

import json
from pathlib import Path

import pytest

from seppo_fast.evaluation.media.prompts import Prompt, read_prompts
from seppo_fast.utils.errors import ConfigError, DataError

ROOT = Path(__file__).parents[3]
LISTS = ROOT.parent / "shared" / "data" / "prompts"


def written(folder, name, content):
    file = folder / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def test_a_text_file_holds_a_prompt_per_line(tmp_path):
    content = "\ufeffa red fox\r\n\n  two\u2028parts \n\t\na red fox"
    found = read_prompts(written(tmp_path, "p.txt", content))
    assert found.texts == ["a red fox", "two\u2028parts", "a red fox"] and found.name == "p.txt"
    assert [prompt.id for prompt in found.prompts] == ["0", "1", "2"]


def test_a_json_list_of_strings_or_objects(tmp_path):
    rows = [
        "plain",
        {"prompt": "p", "id": 7},
        {"caption": "c\nd", "caption_id": "x", "id": 3},
        {"text": "t", "id": None},
    ]
    found = read_prompts(written(tmp_path, "P.JSON", json.dumps(rows)))
    assert found.prompts == (Prompt("0", "plain"), Prompt("7", "p"), Prompt("x", "c\nd"), Prompt("3", "t"))


def test_the_digest_covers_prompts_ids_and_order(tmp_path):
    texts = [["a", "b"], ["b", "a"], ["a", "b", "b"], ["a, b"], [{"prompt": "a", "id": 9}, "b"]]
    digests = [read_prompts(written(tmp_path, "p.json", json.dumps(rows))).digest for rows in texts]
    assert len(set(digests)) == len(texts)
    assert read_prompts(written(tmp_path, "p.txt", "a\nb\n")).digest == digests[0]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.txt", "", "holds no prompt"),
        ("p.txt", " \n\n", "holds no prompt"),
        ("p.txt", b"caf\xe9", "malformed"),
        ("p.json", "", "malformed"),
        ("p.json", "[", "malformed"),
        ("p.json", "[" * 100_000, "nested too deeply"),
        ("p.json", "[]", "holds no prompt"),
        ("p.json", '{"prompt": "a"}', "a JSON dict instead of a list"),
        ("p.json", '["a", 3]', "record 2: the prompt is 3, which is not text"),
        ("p.json", '["a", {"words": "b"}]', "record 2 has none of the keys prompt, caption, text"),
        ("p.json", '[{"prompt": null, "text": "b"}]', "record 1: the prompt is None"),
        ("p.json", '["a", " "]', "record 2: the prompt is empty"),
        ("p.json", '["\\ud800"]', "record 1: the prompt is not valid Unicode"),
    ],
)
def test_a_file_without_usable_prompts_is_named(tmp_path, name, content, says):
    file = written(tmp_path, name, content)
    with pytest.raises(DataError, match=says) as caught:
        read_prompts(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"), [("none.txt", "does not exist"), ("p.csv", "not a .txt or .json"), ("", "not a .txt")]
)
def test_a_file_that_cannot_be_a_prompt_file(tmp_path, name, says):
    written(tmp_path, "p.csv", "a")
    with pytest.raises(ConfigError, match=says):
        read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "count", "distinct", "first"),
    [("hpsv2", 3200, 3172, "0"), ("partiprompts", 1632, 1632, "0"), ("chronomagic_150", 150, 150, "3d_printing_19")],
)
def test_the_lists_of_published_benchmarks(name, count, distinct, first):
    file = LISTS / f"{name}.json"
    if not file.is_file():
        pytest.skip(f"the prompt list {name} is not beside this checkout")
    found = read_prompts(file)
    assert (len(found.prompts), len(set(found.texts)), found.prompts[0].id) == (count, distinct, first)
