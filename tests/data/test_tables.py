"""Tables whose files store the same columns in different types, as writers do when values are missing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seppo_fast.cli import main
from seppo_fast.data.media.images import load_image
from seppo_fast.data.scan import scan
from seppo_fast.data.sources import open_source
from seppo_fast.utils.errors import DataError
from tests.helpers.cache import opened
from tests.helpers.hostile import run_config
from tests.helpers.pictures import encoded, pixels, problems_of

PNG = [encoded(pixels(i)) for i in range(4)]
STRUCTS = [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(PNG)]


def write(path: Path, **columns: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def squares(path: Path) -> list[np.ndarray]:
    return [load_image(example.image, 24) for example in open_source(str(path))]


TEXTS = {
    "string": pa.array(["a", None, " c "]),
    "large_string": pa.array(["a", None, " c "], pa.large_string()),
    "string_view": pa.array(["a", None, " c "], pa.string_view()),
    "dictionary": pa.array(["a", None, " c "]).dictionary_encode(),  # pandas calls it categorical
    "dictionary of large": pa.array(["a", None, " c "], pa.large_string()).dictionary_encode(),
    "binary": pa.array([b"a", None, b" c "]),  # from writers that do not know about UTF-8
    "large_binary": pa.array([b"a", None, b" c "], pa.large_binary()),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_every_type_of_text_is_a_caption(tmp_path, kind):
    source = open_source(str(write(tmp_path / "x.parquet", image=PNG[:3], text=TEXTS[kind])))
    assert [(example.id, example.prompt) for example in source] == [("x.parquet:0", "a"), ("x.parquet:2", "c")]
    assert problems_of(source) == {"x.parquet:1": "the caption is empty"}
    plain = open_source(str(write(tmp_path / "plain" / "x.parquet", image=PNG[:3], text=TEXTS["string"])))
    assert source._captions.equals(plain._captions)


def test_files_of_several_types_are_one_table(tmp_path):
    for number, column in enumerate([*TEXTS.values(), pa.nulls(3)]):
        write(tmp_path / f"{number}.parquet", text=column, image=PNG[:3])
    source = open_source(str(tmp_path))
    kept = [f"{number}.parquet:{row}" for number in range(7) for row in (0, 2)]
    assert [example.id for example in source] == kept
    assert [example.prompt for example in source] == ["a", "c"] * 7
    assert list(problems_of(source)) == [f"{n}.parquet:1" for n in range(7)] + [f"7.parquet:{row}" for row in range(3)]
    assert set(problems_of(source).values()) == {"the caption is empty"}
    for index, example in enumerate(source):
        np.testing.assert_array_equal(load_image(example.image, 24), pixels(2 * (index % 2))[:, 4:28])


LABELS = {
    "int": ([1, 0, 0], pa.int64()),
    "int with nulls": ([1, None, 0], pa.int8()),
    "double": ([1.0, None, 0.0], pa.float64()),
    "float": ([1.0, 0.0, 0.0], pa.float32()),
    "bool": ([True, None, False], pa.bool_()),
    "dictionary": ([1, None, 0], pa.int64()),
    "null": ([None, None, None], pa.null()),
}


def test_labels_of_several_types_are_one_table(tmp_path):
    """The rows' winners are 0, 1 (or undecided if a label is missing), and 1."""
    expected: dict[str, int | None] = {}
    for number, (kind, (first, type)) in enumerate(LABELS.items()):
        second = pa.array([0, 1, 1], pa.float64() if kind == "int" else pa.int64())
        labels = pa.array(first, type)
        if kind == "dictionary":
            labels = labels.dictionary_encode()
        columns = {"label_1": second, "label_0": labels, "caption": ["x"] * 3, "jpg_1": PNG[1:], "jpg_0": PNG[:3]}
        if number % 2:
            columns = dict(reversed(columns.items()))
        write(tmp_path / f"{number}.parquet", **columns)
        for row, winner in enumerate([0, None if None in first else 1, 1]):
            expected[f"{number}.parquet:{row}"] = None if kind == "null" else winner
    source = open_source(str(tmp_path))
    assert source.has_losers
    assert list(problems_of(source)) == [name for name, winner in expected.items() if winner is None]
    assert set(problems_of(source).values()) == {"the labels name no winner (one must be 1, the other 0)"}
    for example in source:
        row, winner = int(example.id[-1]), expected[example.id]
        np.testing.assert_array_equal(load_image(example.image, 24), pixels(row + winner)[:, 4:28])
        np.testing.assert_array_equal(load_image(example.loser, 24), pixels(row + 1 - winner)[:, 4:28])


CELLS = {
    "binary": pa.array(PNG),
    "large_binary": pa.array(PNG, pa.large_binary()),
    "binary_view": pa.array(PNG, pa.binary_view()),
    "dictionary": pa.array(PNG).dictionary_encode(),
    "struct": pa.array(STRUCTS),
    "struct of large": pa.array(STRUCTS, pa.struct({"bytes": pa.large_binary(), "path": pa.string()})),
    "struct without a path": pa.array([{"bytes": content} for content in PNG]),
}


def test_images_of_several_types_are_one_table(tmp_path):
    for number, cells in enumerate(CELLS.values()):
        write(tmp_path / f"{number}.parquet", image=cells, text=["x"] * 4)
    found = squares(tmp_path)
    assert len(found) == 4 * len(CELLS)
    for index, square in enumerate(found):
        np.testing.assert_array_equal(square, pixels(index % 4)[:, 4:28])
    assert scan(open_source(str(tmp_path))) == []


def test_columns_that_are_not_needed_may_differ(tmp_path):
    write(tmp_path / "0.parquet", image=PNG[:1], text=["a"], score=[1.0], url=["x"])
    write(tmp_path / "1.parquet", text=["b"], image=PNG[1:2], score=["none"])
    write(tmp_path / "2.parquet", width=[3], image=PNG[2:3], text=["c"])
    source = open_source(str(tmp_path))
    assert [example.prompt for example in source] == ["a", "b", "c"]
    np.testing.assert_array_equal(squares(tmp_path)[2], pixels(2)[:, 4:28])
    write(tmp_path / "3.parquet", image=PNG[:1], url=["x"])
    held = r"image, url instead of image, text, score, url\. Required are"
    with pytest.raises(DataError, match=rf"3.parquet: its columns differ from those of .*0.parquet: {held}"):
        open_source(str(tmp_path))
    (tmp_path / "3.parquet").unlink()
    write(tmp_path / "4.parquet", image=PNG[:1], caption=["d"])  # every file has a caption, but under different names
    with pytest.raises(DataError, match="parquet: its columns differ"):
        open_source(str(tmp_path))
    for name in ("0", "1", "2"):
        (tmp_path / f"{name}.parquet").unlink()
    assert [example.prompt for example in open_source(str(tmp_path))] == ["d"]


def test_the_first_column_that_holds_text_is_taken_row_by_row(tmp_path):
    columns = {
        "txt": ["never"] * 4, "prompt": ["p0", "p1", None, "p3"], "caption": [3, 3, 3, 3], "image": PNG,
        "text": ["t0", None, None, " "],
    }  # fmt: skip
    source = open_source(str(write(tmp_path / "x.parquet", **columns)))
    assert [example.prompt for example in source] == ["t0", "p1", "never", "p3"]
    assert source.problems == []
    full = open_source(str(write(tmp_path / "y.parquet", **columns | {"text": list("abcd")})))
    assert [example.prompt for example in full] == list("abcd")


def test_columns_that_hold_no_text_are_refused(tmp_path):
    for column, told in (([3], "it holds int64"), ([["a"]], "it holds list<"), ([b"caf\xe9"], "Invalid UTF8")):
        write(tmp_path / "x.parquet", image=PNG[:1], text=column)
        with pytest.raises(DataError, match=f"x.parquet: column text must hold text.*{told}"):
            open_source(str(tmp_path / "x.parquet"))
    write(tmp_path / "x.parquet", jpg_0=PNG[:1], jpg_1=PNG[:1], label_0=["best"], label_1=["worst"], caption=["x"])
    with pytest.raises(DataError, match="x.parquet: label_0 and label_1 must be numbers"):
        open_source(str(tmp_path / "x.parquet"))


def test_named_labels_of_pairs_count_by_their_names(tmp_path):
    columns = {"jpg_0": PNG[:1], "jpg_1": PNG[1:2], "label_0": [0], "label_1": [1], "caption": ["x"]}
    for names in (["1", "0"], ["win", "lose"]):
        label = {"names": names, "_type": "ClassLabel"}
        info = {"info": {"features": {"label_0": label, "label_1": label}}}
        rows = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(info)})
        pq.write_table(rows, tmp_path / f"{names[0]}.parquet")
    (pair,) = open_source(str(tmp_path / "1.parquet"))
    np.testing.assert_array_equal(load_image(pair.image, 24), pixels(0)[:, 4:28])
    with pytest.raises(DataError, match="win.parquet: label_0 and label_1 must be numbers"):
        open_source(str(tmp_path / "win.parquet"))


def test_hub_rows_of_categories_are_captions(monkeypatch):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset(pa.table({"image": PNG[:2], "text": pa.array(["a", None]).dictionary_encode()}))
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: data)
    source = open_source("owner/single")
    assert [example.prompt for example in source] == ["a"]
    assert [problem.id for problem in source.problems] == ["owner/single:1"]


def test_check_and_cache_of_what_pandas_writes(tmp_path, tiny, capsys):
    pandas = pytest.importorskip("pandas")
    for number, labels in enumerate([[1, 0], [1.0, None]]):
        frame = {"jpg_0": PNG[:2], "jpg_1": PNG[2:], "label_0": labels, "label_1": [0, 1]}
        frame["caption"] = pandas.Categorical(["a", "a"]) if number else ["a", "b"]
        (tmp_path / "d").mkdir(exist_ok=True)
        pandas.DataFrame(frame).to_parquet(tmp_path / "d" / f"{number}.parquet")
    config = run_config(tmp_path, tiny, data={"source": str(tmp_path / "d"), "resolution": 16})
    assert main(["check", str(config)]) == 3
    out = capsys.readouterr().out
    assert "data: 4 examples, 1 bad" in out
    assert "bad: 1.parquet:1: the labels name no winner (one must be 1, the other 0)" in out
    for path in (tmp_path / "d").iterdir():
        assert len(open_source(str(path))) == (2 if path.name == "0.parquet" else 1)
    assert opened(open_source(str(tmp_path / "d" / "0.parquet")), tmp_path / "cache").prompts == ["a", "b"]
