"""Labels of single examples: how they are read from listings and tables, taken from pairs, and refused."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from seppo_fast.cli import main
from seppo_fast.data.cache.build import too_many
from seppo_fast.data.labels import liked, with_labels
from seppo_fast.data.sources import open_source
from seppo_fast.utils.errors import DataError
from tests.helpers.hostile import run_config

VALUES = {
    "numbers": [1, 0, 0, 1],
    "booleans": [True, False, False, True],
    "floats": [1.0, 0.0, 0.0, 1.0],
    "words": ["like", "Dislike", " dislike ", "LIKE"],
    "texts of numbers": ["1", "0", "0", "1"],
    "texts of booleans": ["true", "False", "FALSE", "True"],
}
EXPECTED = [1.0, 0.0, 0.0, 1.0]


def pictures(folder, count=4):
    draw = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(draw.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def jsonl(folder, labels):
    rows = [{"file_name": f"{n}.png", "text": f"fox {n}", "label": label} for n, label in enumerate(labels)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def table(folder, labels):
    images = [(folder / f"{n}.png").read_bytes() for n in range(len(labels))]
    for file in folder.glob("*.png"):
        file.unlink()
    columns = {"image": images, "text": [f"fox {n}" for n in range(len(labels))], "label": labels}
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    return str(folder)


def comma_separated(folder, labels):
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(
            [["file_name", "text", "label"], *([f"{n}.png", "fox", label] for n, label in enumerate(labels))]
        )
    return str(folder)


def class_labels(folder, names, labels):
    """Returns a data set whose labels are integers, with names for them in its features."""
    datasets = pytest.importorskip("datasets")
    kinds = {"image": datasets.Image(), "text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    images = [{"bytes": (folder / f"{n}.png").read_bytes(), "path": None} for n in range(len(labels))]
    columns = {"image": images, "text": ["a fox"] * len(labels), "label": labels}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def parquet_of(folder, monkeypatch, data):
    data.to_parquet(folder / "rows.parquet")
    return str(folder / "rows.parquet")


def hub(folder, monkeypatch, data):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: data)
    return "owner/labelled"


@pytest.mark.parametrize("place", [parquet_of, hub])
def test_integers_with_names_are_read_by_their_names(tmp_path, monkeypatch, place):
    """The first name is that of 0, whichever it is."""
    pictures(tmp_path)
    for names in (["like", "dislike"], ["dislike", "like"], ["0", "1"]):
        likes = names.index("like") if "like" in names else 1
        labels = [likes, likes, 1 - likes, 1 - likes]
        source = with_labels(open_source(place(tmp_path, monkeypatch, class_labels(tmp_path, names, labels))))
        assert [example.number for example in source] == [1.0, 1.0, 0.0, 0.0]
    for names, labels, message in (
        (["bad", "good"], [1, 0, 0, 1], r"4 of 4 examples \(.*:0 \(good\).* have an unknown label"),
        (["dislike", "like"], [1, -1, 0, None], r"2 of 4 examples \(.*:1, .*:3\) have no label"),
    ):
        source = open_source(place(tmp_path, monkeypatch, class_labels(tmp_path, names, labels)))
        with pytest.raises(DataError, match=message):
            with_labels(source)


@pytest.mark.parametrize("metadata", ["{", "[]", '{"info": {"features": {"label": 3}}}', '{"info": null}'])
def test_metadata_that_name_no_classes_change_nothing(tmp_path, metadata):
    file = Path(table(pictures(tmp_path), [1, 0, 0, 1])) / "rows.parquet"
    pq.write_table(pq.read_table(file).replace_schema_metadata({"huggingface": metadata}), file)
    assert [example.number for example in with_labels(open_source(str(file)))] == EXPECTED


@pytest.mark.parametrize("write", [jsonl, table, comma_separated])
@pytest.mark.parametrize("kind", VALUES)
def test_labels_of_listings_and_tables(tmp_path, write, kind):
    plain = open_source(write(pictures(tmp_path), VALUES[kind]))
    source = with_labels(plain)
    assert [example.number for example in source] == EXPECTED and len(source) == 4
    assert [example.id for example in source] == [example.id for example in plain]
    assert all(example.number is None and example.loser is None for example in plain)
    assert source.digest() != plain.digest()


def test_other_labels_are_other_data_and_without_them_nothing_changes(tmp_path):
    pictures(tmp_path)
    digests = []
    for labels in ([1, 0, 0, 1], [1, 0, 1, 1], [1, 0, 0, 1]):
        plain = open_source(jsonl(tmp_path, labels))
        digests.append((plain.digest(), with_labels(plain).digest()))
    assert len({plain for plain, _ in digests}) == 1
    assert digests[0] == digests[2] and digests[0][1] != digests[1][1]


def test_pairs_are_taken_apart():
    pairs = open_source("shapes-made:20").labelled()
    source = with_labels(open_source("shapes-made:20"))
    assert len(source) == 2 * len(pairs) > 0 and not source.has_losers and source.ties == pairs.ties
    for row, pair in enumerate(pairs):
        winner, loser = source[2 * row], source[2 * row + 1]
        assert (winner.number, loser.number) == (1.0, 0.0) and winner.loser is loser.loser is None
        assert winner.image.name == pair.image.name and loser.image.name == pair.loser.name
        assert winner.prompt == loser.prompt == pair.prompt
    assert len({example.id for example in source}) == len(source)


def labelled_pairs(folder, count, unclear=0, captionless=0):
    """Writes pairs of which the last name no winner, or have no caption, and returns the file."""
    image = (pictures(folder, 1) / "0.png").read_bytes()
    columns = {"jpg_0": [image] * count, "jpg_1": [image] * count, "label_0": [1] * count, "label_1": [0] * count}
    for row in range(count - unclear, count):
        columns["label_0"][row] = 7
    columns["caption"] = ["a fox"] * (count - captionless) + [""] * captionless
    pq.write_table(pa.table(columns), folder / "pairs.parquet")
    return str(folder / "pairs.parquet")


@pytest.mark.parametrize(("unclear", "refused"), [(2, False), (3, True)])
def test_a_pair_that_cannot_be_used_is_two_bad_pictures(tmp_path, unclear, refused):
    """More than 1 % of 200 pairs are 3, taken apart or not."""
    pairs = open_source(labelled_pairs(tmp_path, 200, unclear))
    for source, each in ((pairs, 1), (with_labels(pairs), 2)):
        total = len(source) + len(source.problems)
        assert total == 200 * each and len(source.problems) == unclear * each
        assert too_many(source.problems, total) == refused
        ids = [example.id for example in source] + [problem.id for problem in source.problems]
        assert len(set(ids)) == total
    assert [problem.id for problem in source.problems][-2:] == ["pairs.parquet:199", "pairs.parquet:199 loser"]


@pytest.mark.parametrize("kind", ["jsonl", "rows", "pairs"])
def test_without_a_usable_example_the_reasons_are_told_not_missing_labels(tmp_path, tiny, capsys, kind):
    pictures(tmp_path)
    if kind == "pairs":
        place = labelled_pairs(tmp_path, 4, captionless=4)
    elif kind == "rows":
        place = table(tmp_path, [1, 0, 0, 1]) + "/rows.parquet"
        rows = pq.read_table(place)
        pq.write_table(rows.set_column(1, "text", pa.array([""] * 4)), place)
    else:
        place, listing = jsonl(tmp_path, [1, 0, 0, 1]), tmp_path / "metadata.jsonl"
        listing.write_text(re.sub(r'"fox \d"', '""', listing.read_text()))
    source = with_labels(open_source(place))
    assert len(source) == 0 and len(source.problems) == (8 if kind == "pairs" else 4)
    config = run_config(tmp_path, tiny, objective="kto", data={"source": place, "resolution": 16})
    assert main(["check", str(config)]) == 3
    said = capsys.readouterr().out
    assert said.count(" is empty") == len(source.problems) and "a run refuses more than 1 % of bad examples" in said
    assert main(["train", str(config)]) == 3
    said = capsys.readouterr().err
    assert said.count(" is empty") == len(source.problems) and "has a label" not in said


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([1, None, 0, math.nan], r"2 of 4 examples \(b, d\) have no label"),
        ([1, "", 0, 1], r"1 of 4 examples \(b\) has no label"),
        ([None] * 4, "no example has a label. Give each row of metadata.jsonl"),
        ([1, "maybe", 0, 2], r"2 of 4 examples \(b \(maybe\), d \(2\)\) have an unknown label"),
        ([1, "like", 0, True], r"several kinds: .*1 or 0 \(a\).*Write all of them in one way"),
        ([1, 1, 1, 1], "all 4 examples are liked, the first is a.*use objective: sft"),
        ([False] * 4, "all 4 examples are disliked"),
        ([0.5, 0, 1, 1], r"a \(0.5\)"),
        ([[1], 0, 1, 1], r"a \(\[1\]\)"),
    ],
)
def test_unusable_labels_are_refused_by_name(labels, message):
    with pytest.raises(DataError, match=message) as refused:
        liked("data", list(zip("abcd", labels, strict=True)))
    assert refused.value.exit_code == 3 and str(refused.value).startswith("data: ")


def test_kinds_are_named_with_an_example_each():
    with pytest.raises(DataError) as refused:
        liked("data", [("a", 1), ("b", "dislike"), ("c", "like"), ("d", 0)])
    assert "1 or 0 (a)" in str(refused.value) and "like or dislike (b)" in str(refused.value)


def test_sources_without_labels_are_refused(tmp_path):
    with pytest.raises(DataError, match="shapes:4: no labels are read from this kind of data"):
        with_labels(open_source("shapes:4"))
    pictures(tmp_path)
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("a fox")
    with pytest.raises(DataError, match="no example has a label"):
        with_labels(open_source(str(tmp_path)))
