"""Damaged or forged saved pools: every damage is named, and nothing worse happens."""

import json
import os
import random

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import seppo_fast.utils.manifest as manifest
from seppo_fast.references import ReferencePool
from seppo_fast.references.layout import PackedLayout, trainable_state_dict
from seppo_fast.references.storage import map_checkpoint, write_checkpoint
from seppo_fast.utils.errors import CheckpointError
from tests.helpers.pools import Odd, assert_holds, filled

CPU = torch.device("cpu")
NAMES = [f"checkpoint-{number:06d}.safetensors" for number in range(3)]


@pytest.fixture
def saved(tmp_path):
    pool, expected = filled()
    pool.save(tmp_path / "pool")
    return tmp_path / "pool", expected


def truncated(file):
    os.truncate(file, file.stat().st_size - 1)


def emptied(file):
    os.truncate(file, 0)


def longer(file):
    file.write_bytes(file.read_bytes() + b"\0")


def flipped(file, place=-1):
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)


def flipped_in_its_header(file):
    flipped(file, 20)


def missing(file):
    file.unlink()


def a_folder(file):
    file.unlink()
    file.mkdir()


DAMAGES = [truncated, emptied, longer, flipped, flipped_in_its_header, missing, a_folder]


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_checkpoint_is_named_and_no_other(saved, damage):
    folder, expected = saved
    whole = {name: (folder / name).read_bytes() for name in NAMES}
    for damaged in ({0}, {1}, {0, 2}, {0, 1, 2}):
        for number in damaged:
            damage(folder / NAMES[number])
        pool = ReferencePool(0)
        with pytest.raises(CheckpointError) as raised:
            pool.restore(folder, CPU)
        assert {number for number in range(3) if NAMES[number] in str(raised.value)} == damaged
        for number in damaged:
            if damage is a_folder:
                (folder / NAMES[number]).rmdir()
            (folder / NAMES[number]).write_bytes(whole[NAMES[number]])
        pool.restore(folder, CPU)  # the pool stayed empty, and loads the intact folder
        assert_holds(pool, expected)


def test_a_disk_that_fails_to_read_names_the_checkpoint(saved, monkeypatch):
    digest = manifest.digest

    def read(file):
        if file.name == NAMES[1]:
            raise OSError(5, "Input/output error")
        return digest(file)

    monkeypatch.setattr(manifest, "digest", read)
    message = f"1 of 3 checkpoints cannot be used: {NAMES[1]} cannot be read.*Input/output"
    with pytest.raises(CheckpointError, match=message):
        ReferencePool(0).restore(saved[0], CPU)


def changed(**keys):
    return lambda tree: json.dumps({**tree, **keys})


def with_row(**keys):
    return lambda tree: json.dumps({**tree, "members": [{**tree["members"][0], **keys}, *tree["members"][1:]]})


MANIFESTS = {
    "empty": lambda tree: "",
    "cut": lambda tree: json.dumps(tree)[:-9],
    "not text": lambda tree: "\udcff",
    "a list": lambda tree: json.dumps([tree]),
    "deep": lambda tree: "[" * 100_000,
    "no format": lambda tree: json.dumps({key: tree[key] for key in ("count", "members")}),
    "infinite format": changed(format=float("inf")),
    "no checkpoints": changed(members=[]),
    "members of another kind": changed(members={"0": 1}),
    "checkpoint 0 not among them": lambda tree: json.dumps({**tree, "members": tree["members"][1:]}),
    "count too small": changed(count=2),
    "count infinite": changed(count=float("inf")),
    "count negative": changed(count=-1),
    "number negative": with_row(number=-1),
    "number too large": with_row(number=3),
    "number infinite": with_row(number=float("inf")),
    "size no number": with_row(size="many"),
    "no checksum": lambda tree: json.dumps({**tree, "members": [{"number": 0, "size": 1}]}),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_a_manifest_that_is_none_is_named(saved, change):
    file = saved[0] / "manifest.json"
    tree = json.loads(file.read_text())
    file.write_text(change(tree), encoding="utf-8", errors="surrogateescape")
    with pytest.raises(CheckpointError, match="manifest.json: not a valid manifest"):
        ReferencePool(0).restore(saved[0], CPU)


def test_a_missing_manifest_and_one_of_a_newer_format_are_named(saved):
    file = saved[0] / "manifest.json"
    file.write_text(changed(format=2)(json.loads(file.read_text())))
    with pytest.raises(CheckpointError, match="manifest.json: format 2 is newer"):
        ReferencePool(0).restore(saved[0], CPU)
    file.unlink()
    with pytest.raises(CheckpointError, match="manifest.json: not a valid manifest"):
        ReferencePool(0).restore(saved[0], CPU)


def test_paths_in_a_manifest_lead_nowhere(saved, tmp_path):
    folder, expected = saved
    file = folder / "manifest.json"
    (tmp_path / "elsewhere").write_bytes(b"secret")
    file.write_text(with_row(file="../elsewhere")(json.loads(file.read_text())))
    pool = ReferencePool(0)
    pool.restore(folder, CPU)
    assert_holds(pool, expected)


def test_checkpoints_of_different_modules_are_no_pool(saved, tmp_path):
    """Each is intact and has the right checksum."""
    folder, _ = saved
    other = ReferencePool(0)
    other.add(nn.Linear(2, 2))
    other.save(tmp_path / "other")
    tree, row = (json.loads((place / "manifest.json").read_text()) for place in (folder, tmp_path / "other"))
    os.replace(tmp_path / "other" / NAMES[0], folder / NAMES[1])
    tree["members"][1] |= {key: row["members"][0][key] for key in ("size", "sha256")}
    (folder / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(CheckpointError, match="pool: its checkpoints come from different modules"):
        ReferencePool(0).restore(folder, CPU)


def table_of(**keys):
    """Returns the header, with `keys` changed, of a slab of 256 bytes with one tensor."""
    slot = {"name": "a", "shape": [4], "stride": [1], "dtype": "float32", "offset": 128}
    size = keys.pop("size", 256)
    return {"table": json.dumps({"size": size, "entries": [{**slot, **keys}]})}


SLAB = torch.zeros(256, dtype=torch.uint8)
HEADERS = {
    "no header": (SLAB, None),
    "no table": (SLAB, {"format": "pt"}),
    "no JSON": (SLAB, {"table": "{"}),
    "deep JSON": (SLAB, {"table": "[" * 100_000}),
    "a list": (SLAB, {"table": "[]"}),
    "smaller slab": (SLAB[:128], table_of()),
    "larger slab": (torch.zeros(384, dtype=torch.uint8), table_of()),
    "other dtype": (torch.zeros(256, dtype=torch.int8), table_of()),
    "other shape": (SLAB.view(2, 128), table_of()),
    "exabytes": (SLAB, table_of(size=2**62)),
    "exabytes of one tensor": (SLAB, table_of(shape=[2**60])),
    "more bytes than can be counted": (SLAB, table_of(size=2**70)),
    "infinite": (SLAB, table_of(offset=float("inf"))),
    "before the slab": (SLAB, table_of(offset=-128)),
    "behind the slab": (SLAB, table_of(shape=[33])),
    "strides behind the slab": (SLAB, table_of(stride=[9])),
    "negative stride": (SLAB, table_of(stride=[-1])),
    "one place for all": (SLAB, table_of(stride=[0])),
    "unknown dtype": (SLAB, table_of(dtype="float99")),
    "no dtype": (SLAB, table_of(dtype="Tensor")),
}


@pytest.mark.parametrize(("slab", "header"), HEADERS.values(), ids=HEADERS.keys())
def test_a_made_up_header_is_refused(tmp_path, slab, header):
    """Nothing of the size that it claims is allocated: exabytes would raise another exception."""
    file = tmp_path / "made-up.safetensors"
    save_file({"slab": slab}, file, metadata=header)
    with pytest.raises(CheckpointError, match="made-up.safetensors: "):
        map_checkpoint(file)


def test_files_of_another_kind_are_refused(tmp_path):
    file = tmp_path / "file"
    save_file({"weight": SLAB}, file, metadata=table_of())
    for content in (file.read_bytes(), b"", b"PK\3\4", (2**60).to_bytes(8, "little") + b"{}", b"\0" * 64):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="file: not a valid checkpoint"):
            map_checkpoint(file)
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match=f"{place.name}: not a valid checkpoint"):
            map_checkpoint(place)


def test_no_change_of_a_header_does_worse_than_being_refused(tmp_path):
    """Changes one byte, 500 times: a header is refused, or its layout fits into the slab."""
    module, file = Odd(), tmp_path / "file"
    layout = PackedLayout.of(module)
    slab = torch.zeros(layout.size, dtype=torch.uint8)
    layout.fill(slab, trainable_state_dict(module))
    write_checkpoint(file, slab, layout)
    whole = file.read_bytes()
    header, rng, refused = 8 + int.from_bytes(whole[:8], "little"), random.Random(0), 0
    for _ in range(500):
        content = bytearray(whole)
        content[rng.randrange(header)] = rng.choice((*b'0123456789-"{}[],:.eE\\ ', rng.randrange(256)))
        file.write_bytes(content)
        try:
            found, layout = map_checkpoint(file)
            assert all(view.nbytes <= len(found) for view in layout.views(found).values())
        except CheckpointError:
            refused += 1
    assert 250 < refused < 500
