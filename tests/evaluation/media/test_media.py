"""Media files: what is written is read back, damage is noticed, and processes share the work through files alone."""

import json
import os
import re

import numpy as np
import pytest

from seppo_fast.evaluation.media import files, items, work
from seppo_fast.evaluation.media.prompts import Prompt, PromptList
from seppo_fast.utils.errors import ConfigError, DataError
from seppo_fast.utils.files import remove_temporary, write_atomically


@pytest.mark.parametrize("shape", [(5, 7, 3), (1, 5, 7, 3), (6, 9, 11, 3)])
def test_pixels_are_read_back_exactly(shape):
    picture = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    assert np.array_equal(files.decode_media(files.encode_media(picture), "x"), picture)


def test_equal_frames_of_a_clip_are_kept():
    """The encoder merges them into one frame that is shown for longer."""
    frames = np.random.default_rng(1).integers(0, 256, (3, 8, 6, 3)).astype(np.uint8)
    clip = frames[[0, 0, 0, 1, 2, 2, 1, 1]]
    assert np.array_equal(files.decode_media(files.encode_media(clip), "x"), clip)
    still = frames[[0] * 5]
    assert np.array_equal(files.decode_media(files.encode_media(still), "x"), still)


@pytest.mark.parametrize("shape", [(9, 9, 3), (4, 9, 9, 3)])
def test_damage_is_noticed(tmp_path, shape):
    content = files.encode_media(np.random.default_rng(2).integers(0, 256, shape).astype(np.uint8))
    file = tmp_path / ("x.png" if len(shape) == 3 else "x.webp")
    assert not files.is_intact(file)
    for damaged in (b"", content[:-20], content[: len(content) // 2], b"text" * 99):
        file.write_bytes(damaged)
        assert not files.is_intact(file)
        with pytest.raises(DataError, match="not an intact picture or clip"):
            files.decode_media(damaged, "x")
    file.write_bytes(content)
    assert files.is_intact(file)


def test_a_flipped_byte_of_a_picture_is_noticed(tmp_path):
    content = bytearray(files.encode_media(np.random.default_rng(3).integers(0, 256, (9, 9, 3)).astype(np.uint8)))
    content[60] ^= 1
    (tmp_path / "x.png").write_bytes(content)
    assert not files.is_intact(tmp_path / "x.png")


PROMPTS = PromptList("p.txt", (Prompt("0", "a"), Prompt("1", "b"), Prompt("2", "a")))


def test_ids_are_unique():
    prompts = PromptList("p.json", tuple(Prompt(name, "a") for name in ("x", "x", "x-1", "y")))
    ids = [item.id for item in items.media_of(prompts, {"base": "0a"}, 2, 0, clips=False).items]
    assert ids == ["x", "x.2", "x-1", "y", "x-1.2", "x-1.3", "x-1-1", "y-1"]


def test_items_are_listed_and_read_back(tmp_path):
    made = items.media_of(PROMPTS, {"base": "0a", "run": "1b"}, 2, 5, clips=False)
    assert [(item.sample, item.prompt_index) for item in made.items] == [(s, p) for s in range(2) for p in range(3)]
    names = [item.files["run"] for item in made.items]
    assert len(set(names)) == 6 and names[4].startswith("media/1b/") and names[4].endswith("-1-5-1.png")
    made.write(tmp_path)
    read = items.read_media(tmp_path)
    assert read == made and (made.digest, len(read.digest)) == ("", 64)
    tree = json.loads((tmp_path / "items.json").read_text())
    assert set(tree) == {"schema", "models", "items"} and tree["models"] == {"base": "0a", "run": "1b"}
    assert set(tree["items"][0]) == {"id", "prompt", "prompt_index", "sample", "seed", "files"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.update(schema=9), "expected schema 1, got 9"),
        (lambda tree: tree.update(models={}), "models"),
        (lambda tree: tree.update(models={"base": 3}), "models"),
        (lambda tree: tree.update(items={}), "items must be of type list"),
        (lambda tree: tree.update(items=[]), "it lists no item"),
        (lambda tree: tree["items"].append(3), "items[3]: expected an object, got int"),
        (lambda tree: tree["items"].append(tree["items"][0]), "the id '0' occurs twice"),
        (lambda tree: tree["items"][1].pop("prompt"), "items[1]: prompt must be of type str"),
        (lambda tree: tree["items"][1].update(id=""), "items[1].id is empty"),
        (lambda tree: tree["items"][1].update(seed=True), "seed must be of type int, got True"),
        (lambda tree: tree["items"][1].update(sample=-1), "items[1]: prompt_index, sample and seed"),
        (lambda tree: tree["items"][1].update(files=[]), "files must be of type dict"),
        (lambda tree: tree["items"][2].update(files={}), "items[2].files: expected a file of each of base, got"),
        (lambda tree: tree["items"][2]["files"].update(other="x.png"), "expected a file of each of base, got base, o"),
        (lambda tree: tree["items"][2]["files"].update(base="x.gif"), "ending in .png or .webp, got 'x.gif'"),
        (lambda tree: tree["items"][2]["files"].update(base=3), "got 3"),
        (lambda tree: tree["items"][2]["files"].update(base="a\0.png"), "not a path inside the folder"),
        (lambda tree: tree["items"][2]["files"].update(base="/tmp/x.png"), "items[2].files['base']: '/tmp/x.png'"),
        (lambda tree: tree["items"][2]["files"].update(base="a/../../x.png"), "not a path inside the folder"),
    ],
)
def test_a_malformed_list_of_items_is_refused(tmp_path, change, message):
    items.media_of(PROMPTS, {"base": "0a"}, 1, 0, clips=False).write(tmp_path)
    file = tmp_path / "items.json"
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=rf"items\.json: malformed \(.*{re.escape(message)}"):
        items.read_media(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"[]", b"3"])
def test_a_list_of_items_that_is_no_json_object_is_refused(tmp_path, content):
    (tmp_path / "items.json").write_bytes(content)
    with pytest.raises(DataError, match=r"items\.json: malformed"):
        items.read_media(tmp_path)


def test_a_folder_without_a_list_of_items_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="generate first"):
        items.read_media(tmp_path)


def test_the_name_of_a_model_folder_covers_all_settings():
    settings = {"weights": "a", "protocol": {"steps": 2}}
    digests = {items.model_digest(settings), items.model_digest(settings | {"weights": "b"})}
    assert len(digests) == 2 and items.model_digest(dict(reversed(settings.items()))) in digests


def test_pieces_are_taken_from_a_processs_own_share_first(tmp_path):
    done = set()
    taken = []
    for number in work.unfinished(tmp_path / "x" / ".lock", 5, done.__contains__, rank=1, world=2):
        taken.append(number)
        done |= {number, 2}  # another process does piece 2 meanwhile
    assert taken == [1, 3, 0, 4]
    assert list(work.unfinished(tmp_path / "x" / ".lock", 5, done.__contains__)) == []


def test_a_piece_of_a_process_that_ends_is_taken_over(tmp_path):
    """A child locks piece 0 and ends without doing it; the parent, which waits for it, then does it."""
    lock = tmp_path / ".lock"
    holds, ends = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        pieces = work.unfinished(lock, 2, lambda number: False)
        os.write(holds[1], bytes([next(pieces)]))
        os.read(ends[0], 1)
        os._exit(0)
    assert os.read(holds[0], 1) == b"\0"
    taken = []
    for number in work.unfinished(lock, 2, lambda number: False):
        taken.append(number)
        if number == 1:  # piece 0 was locked; from here on the parent waits for it
            os.write(ends[1], b".")
    os.waitpid(child, 0)
    assert taken == [1, 0]


def test_files_are_replaced_atomically_and_leftovers_are_removed(tmp_path):
    file = tmp_path / "new" / "a.json"
    write_atomically(file, b"1", ConfigError)
    write_atomically(file, b"22", ConfigError)
    assert file.read_bytes() == b"22" and os.listdir(file.parent) == ["a.json"]
    for left in (".tmp-a.json-01ab", ".tmp-b.json-01ab", ".tmp-a.json-x-02"):
        file.with_name(left).write_bytes(b"")
    remove_temporary(file.parent, {"a.json"})
    assert sorted(os.listdir(file.parent)) == [".tmp-a.json-x-02", ".tmp-b.json-01ab", "a.json"]
    with pytest.raises(ConfigError, match="cannot be written"):
        write_atomically(file / "below", b"", ConfigError)
