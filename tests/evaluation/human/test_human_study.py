"""The study of a human comparison: which pairs, sides, checks and repeats are drawn, and what raters receive."""

import hashlib
import json
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from seppo_fast.evaluation.human.items import read_items
from seppo_fast.evaluation.human.page import write_study
from seppo_fast.evaluation.human.study import draw_study, read_key
from seppo_fast.evaluation.media.files import encode_media
from seppo_fast.utils.errors import ConfigError, DataError
from tests.helpers.study import DIGESTS, MODELS, picture, score_folder

PROMPTS = [f"a {colour} {shape}" for colour in ("red", "blue", "green") for shape in ("ring", "star", "cube", "cone")]


@pytest.fixture
def folder(tmp_path):
    return score_folder(tmp_path / "scored", PROMPTS, samples=3)


def drawn(folder, **arguments):
    return draw_study(read_items(folder), **({"raters": ["anna", "ben", "carl"]} | arguments))


def of_kind(rows, *kinds):
    return [trial for trial in rows if trial.kind in kinds]


# What is drawn


def test_every_rater_sees_the_same_pairs_in_another_order_with_balanced_sides(folder):
    study = drawn(folder, count=21)
    shown = {name: [trial.item for trial in of_kind(rows, "pair")] for name, rows in study.raters.items()}
    assert len({frozenset(items) for items in shown.values()}) == 1 and all(len(set(i)) == 21 for i in shown.values())
    assert len({tuple(items) for items in shown.values()}) == 3
    sides = []
    for rows in study.raters.values():
        pairs = of_kind(rows, "pair")
        assert all({trial.left.model, trial.right.model} == set(MODELS) for trial in pairs)
        assert all(trial.left.item == trial.right.item == trial.item and not trial.good for trial in pairs)
        assert sum(trial.left.model == MODELS[0] for trial in pairs) in (10, 11)
        sides.append(tuple(trial.left.model for trial in sorted(pairs, key=lambda trial: trial.item)))
    assert len(set(sides)) == 3


@pytest.mark.parametrize(("count", "again"), [(36, 4), (5, 3), (1, 1)])
def test_checks_and_repeats(folder, count, again):
    for rows in drawn(folder, count=count).raters.values():
        found = of_kind(rows, "noise", "mismatch")
        assert len(found) == 4 and [len(of_kind(found, kind)) for kind in ("noise", "mismatch")] == [2, 2]
        assert Counter(trial.good for trial in found) == {"left": 2, "right": 2}
        for trial in found:
            good, bad = (trial.left, trial.right) if trial.good == "left" else (trial.right, trial.left)
            assert good.item == trial.item and not good.noise and good.model == bad.model
            assert bad.noise == (trial.kind == "noise") and (bad.item == trial.item) == (trial.kind == "noise")
        places = {trial.item: place for place, trial in enumerate(rows) if trial.kind == "pair"}
        repeats = [(place, trial) for place, trial in enumerate(rows) if trial.kind == "repeat"]
        assert len(repeats) == again == len({trial.item for _, trial in repeats})
        for place, trial in repeats:
            first = rows[places[trial.item]]
            assert places[trial.item] < place and (first.left, first.right) == (trial.right, trial.left)


def test_shares_of_checks_and_repeats_of_a_large_study(tmp_path):
    """8 % of 75 is 6; with a hundred raters every number of checks and repeats is the same."""
    folder = score_folder(tmp_path, [f"prompt {index}" for index in range(80)])
    study = drawn(folder, count=75, raters=[f"r{number}" for number in range(100)])
    for rows in study.raters.values():
        assert Counter(trial.kind for trial in rows) == {"pair": 75, "repeat": 6, "noise": 3, "mismatch": 3}
        # Checks use items that are not compared, so nobody has seen their pictures.
        compared = {trial.item for trial in of_kind(rows, "pair")}
        assert not compared & {trial.item for trial in of_kind(rows, "noise", "mismatch")}
    first = Counter(rows[0].item for rows in study.raters.values())
    assert max(first.values()) < 10  # 100 raters begin with different items


def test_mismatches_are_used_only_if_alignment_is_asked_and_show_an_unlike_prompt(folder):
    assert not of_kind(drawn(folder, questions=["overall", "quality"]).raters["anna"], "mismatch")
    study = drawn(folder)
    for trial in of_kind(study.raters["anna"], "mismatch"):
        bad = trial.right if trial.good == "left" else trial.left
        # Every prompt shares only "a" with some other one.
        assert set(study.prompts[bad.item].split()) & set(study.prompts[trial.item].split()) == {"a"}


def test_equal_prompts_leave_only_noise(tmp_path):
    folder = score_folder(tmp_path, ["the same"] * 5)
    assert not of_kind(drawn(folder).raters["anna"], "mismatch")


def test_every_prompt_is_used_before_one_is_used_twice(folder):
    study = drawn(folder, count=17)
    prompts = Counter(study.prompts[trial.item] for trial in of_kind(study.raters["ben"], "pair"))
    assert len(prompts) == 12 and sorted(prompts.values()) == [1] * 7 + [2] * 5


def test_draws_repeat_and_depend_on_the_seed_and_the_folder(folder, tmp_path):
    study = drawn(folder, count=9)
    assert drawn(folder, count=9) == study and drawn(folder, count=9).id == study.id
    assert drawn(folder, count=9, seed=1).raters != study.raters
    other = score_folder(tmp_path / "other", PROMPTS, samples=3)
    tree = json.loads((other / "items.json").read_text())
    tree["models"][MODELS[0]] = "another digest"
    (other / "items.json").write_text(json.dumps(tree))
    kinds = [[trial.kind for trial in drawn(where, count=36).raters["anna"]] for where in (folder, other)]
    assert kinds[0] != kinds[1]  # raters know the seed's default and the code, but not the file


def test_by_default_all_items_up_to_100_and_motion_for_clips_only(tmp_path):
    many = score_folder(tmp_path / "many", [f"p {index}" for index in range(103)])
    study = drawn(many)
    assert len(of_kind(study.raters["anna"], "pair")) == 100 and study.questions == ("overall", "alignment", "quality")
    clips = drawn(score_folder(tmp_path / "clips", PROMPTS[:5], clips=True))
    assert len(of_kind(clips.raters["anna"], "pair")) == 5 and clips.questions[-1] == "motion"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": ["basemodelname"]}, "expected two different models"),
        ({"models": ["basemodelname"] * 2}, "expected two different models"),
        ({"models": ["basemodelname", "tuned"]}, "'tuned' is not in items.json; it has basemodelname, tunedmodelname"),
        ({"count": 0}, "--items: expected 1 to 36"),
        ({"count": 37}, "got 37"),
        ({"raters": []}, "--raters"),
        ({"raters": ["Anna", "anna"]}, "different names"),
        ({"raters": ["../x"]}, "letters, digits"),
        ({"raters": [""]}, "letters, digits"),
        ({"raters": ["basemodelname"]}, "a model's name"),
        ({"questions": []}, "--questions"),
        ({"questions": ["overall", "overall"]}, "--questions"),
        ({"questions": ["beauty"]}, "expected some of overall,alignment,quality, got 'beauty'"),
        ({"questions": ["motion"]}, "motion is for clips"),
    ],
)
def test_invalid_arguments(folder, arguments, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        drawn(folder, **arguments)


def test_more_than_two_models_must_be_chosen(tmp_path):
    folder = score_folder(tmp_path, PROMPTS, models=["base", "one", "two"])
    with pytest.raises(ConfigError, match="choose two of base, one, two"):
        drawn(folder)
    study = drawn(folder, models=["two", "base"])
    assert study.models == ("two", "base") and study.digests == ("two", "base")
    assert len(of_kind(study.raters["anna"], "pair")) == len(PROMPTS)


# items.json


def test_a_folder_without_items(tmp_path):
    with pytest.raises(ConfigError, match="not an output folder of seppo-fast score"):
        read_items(tmp_path)


def test_a_missing_medium_of_the_two_models_is_named(tmp_path):
    folder = score_folder(tmp_path, PROMPTS, models=["base", "one", "two"])
    for model in ("one", "two"):
        (folder / read_items(folder).media.items[3].files[model]).unlink()
    with pytest.raises(DataError, match=r"media/one/3-0\.png: is missing; rerun seppo-fast score"):
        drawn(folder, models=["base", "one"])
    (folder / read_items(folder).media.items[3].files["base"]).rename(folder / "media" / "one" / "3-0.png")
    with pytest.raises(DataError, match=r"media/base/3-0\.png"):
        drawn(folder, models=["base", "one"])


def test_the_digest_is_that_of_the_files_bytes(folder):
    """Keys written by earlier versions record the same digest, and the same seed draws the same study."""
    digest = hashlib.sha256((folder / "items.json").read_bytes()).hexdigest()
    assert read_items(folder).media.digest == drawn(folder).source == digest


def test_pictures_and_clips_are_not_mixed(folder):
    tree = json.loads((folder / "items.json").read_text())
    Image.fromarray(picture(1)).save(folder / "clip.webp")
    tree["items"][0]["files"][MODELS[1]] = "clip.webp"
    (folder / "items.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match="pictures and clips are mixed"):
        drawn(folder)


# The shipped folder


def shipped(folder, study):
    write_study(study, read_items(folder), folder / "human")
    return folder / "human" / "for-raters"


@pytest.mark.parametrize("clips", [False, True])
def test_nothing_shipped_names_a_model_a_digest_or_a_path(tmp_path, clips):
    folder = score_folder(tmp_path / "scored", PROMPTS[:6], clips=clips)
    source = b"".join(file.read_bytes() for file in folder.rglob("*.*") if file.name != "items.json")
    assert all(model.encode() in source for model in MODELS)  # in the metadata of the sources
    out = shipped(folder, drawn(folder))
    secret = [*MODELS, *DIGESTS.values(), "scored", str(tmp_path), "key.json", read_items(folder).media.digest]
    secret += ["noise", "mismatch", "repeat"]
    files = [file for file in out.rglob("*") if file.is_file()]
    assert len(files) > 12 and (folder / "human" / "key.json").exists()
    for file in files:
        content = file.read_bytes() + file.relative_to(out).as_posix().encode()
        page = re.sub(rb"<style>.*?</style>|<script>.*?</script>", b"", content, flags=re.DOTALL)
        for word in secret:
            # The page's own script has words such as `event.repeat`, which are the same in every study.
            assert word.encode() not in (page if word in ("noise", "mismatch", "repeat") else content), (file, word)
    ids = [item.id for item in read_items(folder).media.items]
    text = (out / "index.html").read_text()
    assert not [name for name in ids if f'"{name}"' in text]


def test_copies_have_the_pixels_of_their_source_and_no_metadata(folder):
    study = drawn(folder, count=7)
    out = shipped(folder, study)
    content = json.loads(re.search(r'id="study">(.*?)</script>', (out / "index.html").read_text())[1])
    items = {item.id: item for item in read_items(folder).media.items}
    noisy = 0
    for name, rows in study.raters.items():
        for trial, (prompt, *files) in zip(rows, content["raters"][name], strict=True):
            assert prompt == items[trial.item].prompt
            for shown, file in zip((trial.left, trial.right), files, strict=True):
                with (
                    Image.open(out / "media" / file) as copy,
                    Image.open(folder / items[shown.item].files[shown.model]) as source,
                ):
                    assert copy.info == {} and copy.mode == "RGB" and copy.size == source.size == (31, 23)
                    difference = np.abs(np.asarray(copy).astype(int) - np.asarray(source.convert("RGB")))
                assert (difference.mean() > 30) if shown.noise else (difference.max() == 0)
                noisy += shown.noise
    assert noisy >= 6 and len(list((out / "media").iterdir())) == len(study.media()) == len(content["media"])


def test_a_clip_becomes_one_picture_of_its_frames(tmp_path):
    folder = score_folder(tmp_path, PROMPTS[:5], clips=True)
    study = drawn(folder)
    out = shipped(folder, study)
    content = json.loads(re.search(r'id="study">(.*?)</script>', (out / "index.html").read_text())[1])
    assert content["milliseconds"] == 80
    trial, (_, left, _) = study.raters["anna"][-1], content["raters"]["anna"][-1]
    assert content["media"][left] == {"width": 31, "height": 23, "frames": 5, "columns": 3, "rows": 2}
    with Image.open(out / "media" / left) as sheet:
        assert sheet.format == "WEBP" and sheet.n_frames == 1 and sheet.size == (93, 46)
        tiles = np.asarray(sheet.convert("RGB")).reshape(2, 23, 3, 31, 3).swapaxes(1, 2).reshape(6, 23, 31, 3)
    index, model = int(trial.left.item.split("-")[0]), MODELS.index(trial.left.model)
    if not trial.left.noise:
        for frame in range(5):
            assert (tiles[frame] == picture(100 * (1000 * index + model) + frame)).all()
        assert (tiles[5] == 0).all()


def test_equal_frames_of_a_clip_are_shown_as_often_as_they_were_made(tmp_path):
    """The files of seppo-fast score store them once, with a longer duration."""
    folder = score_folder(tmp_path, PROMPTS[:4], clips=True)
    first, second = picture(1), picture(2)
    for item in read_items(folder).media.items:
        clips = {MODELS[0]: [first, first, second, second, first], MODELS[1]: [second] * 5}
        for model, frames in clips.items():
            (folder / item.files[model]).write_bytes(encode_media(np.stack(frames)))
    study = drawn(folder)
    content = json.loads(
        re.search(r'id="study">(.*?)</script>', (shipped(folder, study) / "index.html").read_text())[1]
    )
    assert content["milliseconds"] == 125 and {row["frames"] for row in content["media"].values()} == {5}
    rows = zip(study.raters["anna"], content["raters"]["anna"], strict=True)
    file = next(left for trial, (_, left, _) in rows if trial.left.model == MODELS[0] and not trial.left.noise)
    with Image.open(folder / "human" / "for-raters" / "media" / file) as sheet:
        tiles = np.asarray(sheet.convert("RGB")).reshape(2, 23, 3, 31, 3).swapaxes(1, 2).reshape(6, 23, 31, 3)
    assert (tiles[:5] == [first, first, second, second, first]).all()


def test_files_are_written_in_the_order_of_their_names(folder):
    out = shipped(folder, drawn(folder))
    times = [file.stat().st_mtime_ns for file in sorted((out / "media").iterdir())]
    assert times == sorted(times)


def test_the_page_needs_nothing_but_its_media(folder):
    text = (shipped(folder, drawn(folder)) / "index.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy and "*" not in policy
    assert not re.search(
        r"https?:|//[a-z]|cookie|fetch\(|XMLHttp|WebSocket|sendBeacon|\bon[a-z]+=", text.replace("// ", "")
    )


def test_a_prompt_cannot_leave_its_place(tmp_path):
    prompt = "</script><script>alert(1)</script> <!-- \u2028 \" ' &amp; ä"
    out = shipped(folder := score_folder(tmp_path, [prompt] * 3), drawn(folder))
    text = (out / "index.html").read_text()
    assert "alert(1)" in text and "<script>alert" not in text and text.count("</script>") == 2
    content = json.loads(re.search(r'id="study">(.*?)</script>', text)[1])
    assert content["raters"]["anna"][0][0] == prompt


def test_different_sizes_are_refused_because_they_tell_models_apart(folder):
    item = read_items(folder).media.items[0]
    Image.fromarray(picture(1, 24, 31)).save(folder / item.files[MODELS[1]])
    with pytest.raises(DataError, match=re.escape(f"item {item.id!r}")):
        shipped(folder, drawn(folder))
    assert not (folder / "human").exists() and not list(folder.glob(".tmp*"))


@pytest.mark.parametrize("clips", [False, True])
def test_a_damaged_medium_is_named(tmp_path, clips):
    folder = score_folder(tmp_path, PROMPTS[:4], clips=clips)
    file = folder / read_items(folder).media.items[2].files[MODELS[0]]
    file.write_bytes(file.read_bytes()[:90])
    with pytest.raises(DataError, match=re.escape(str(file))):
        shipped(folder, drawn(folder))


def test_an_existing_folder_is_not_replaced(folder):
    study = drawn(folder)
    shipped(folder, study)
    with pytest.raises(ConfigError, match="exists"):
        shipped(folder, study)


# The key


def test_a_key_is_read_as_it_was_written(folder):
    study = drawn(folder)
    shipped(folder, study)
    assert read_key(folder / "human" / "key.json") == study


def test_a_changed_key_is_refused(folder):
    study = drawn(folder)
    shipped(folder, study)
    file = folder / "human" / "key.json"
    text = file.read_text()
    file.write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(DataError, match="was changed"):
        read_key(file)
    assert replace(study, seed=1).id != study.id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.update(schema=3), "expected schema 1"),
        (lambda tree: tree.pop("models"), "'models' is missing"),
        (lambda tree: tree.update(models=["one"]), "not a key"),
        (lambda tree: tree.update(raters=[]), "not a key"),
        (lambda tree: tree.update(questions=["beauty"]), "unknown questions"),
        (lambda tree: tree["raters"]["anna"][0].update(kind="joke"), "unknown kind"),
    ],
)
def test_a_malformed_key_is_refused(folder, change, message):
    drawn(folder).write_key(file := folder / "key.json")
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=re.escape(message)):
        read_key(file)


def test_a_missing_key(tmp_path):
    with pytest.raises(ConfigError, match="is missing"):
        read_key(tmp_path / "key.json")
