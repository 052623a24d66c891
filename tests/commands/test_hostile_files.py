"""Maliciously crafted files, wherever files are read: a plain error, no code run, no time or memory wasted."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from seppo_fast.cli import main
from seppo_fast.config.load import read_config
from seppo_fast.config.schema import Config
from seppo_fast.data.sources import open_source
from seppo_fast.diffusion.schedule import NoiseSchedule
from seppo_fast.models.families.sd15 import StableDiffusion
from seppo_fast.runs.checkpoint import _checksum, checked_state, newest_state
from seppo_fast.runs.journal import read_journal
from seppo_fast.utils.errors import CheckpointError, ConfigError, DataError
from tests.helpers.cache import make_folder, opened
from tests.helpers.hostile import Payload, ends, payloads, run_config

HOSTILE_YAML: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "python object": (lambda marker: f"!!python/object/apply:builtins.open ['{marker}', 'w']".encode(), "python"),
    "python call": (lambda marker: f"seed: !!python/object/apply:os.system ['touch {marker}']".encode(), "python"),
    "python name": (lambda _: b"seed: !!python/name:os.system", "python/name"),
    "own tag": (lambda _: b"seed: !evil 1", "!evil"),
    "a pickle": (lambda marker: pickle.dumps(Payload(marker)), "cannot be read as YAML"),
    "billion laughs": (lambda _: laughs(), "aliases"),
    "an alias": (lambda _: b"model: &a {path: x}\ndata: *a\n", "aliases"),
    "merge key": (lambda _: b"model: &a {path: x}\ndata:\n  <<: *a\n", "aliases"),
    "itself": (lambda _: b"&a [*a]", "aliases"),
    "50 MB": (lambda _: b"seed: 1\n" * 6_600_000, "more than 65536 bytes"),
    "50 MB in one word": (lambda _: b"x" * 50_000_000, "more than 65536 bytes"),
    "deep lists": (lambda _: b"seed: " + b"[" * 65_000, "nested too deeply|cannot be read as YAML"),
    "deep mappings": (lambda _: b"{a: " * 16_000, "nested too deeply|cannot be read as YAML"),
    "a key twice": (lambda _: b"seed: 1\nseed: 2\n", "the key 'seed' is given twice"),
    "a section twice": (lambda _: b"model: {path: a}\nmodel: {path: b}\n", "the key 'model' is given twice"),
    "a key of a section twice": (lambda _: b"model: {path: a, path: b}\n", "the key 'path' is given twice"),
    "tabs": (lambda _: b"model:\n\tpath: a\n", "cannot be read as YAML"),
    "NUL": (lambda _: b"model:\n  path: a\0b\n", "cannot be read as YAML"),
    "not UTF-8": (lambda _: "model: café".encode("latin-1"), "cannot be read as YAML"),
    "a list": (lambda _: b"- 1\n- 2\n", "expected a mapping"),
    "a huge number": (lambda _: b"seed: " + b"9" * 10_000, "cannot be read as YAML|seed"),
    "infinity": (lambda _: b"train: {beta: .inf}", "finite"),
    "not a number": (lambda _: b"train: {beta: .nan}", "finite"),
    "no number of its tag": (lambda _: b'seed: !!int ""', "cannot be read as YAML"),
    "no date of its tag": (lambda _: b"seed: !!timestamp x", "cannot be read as YAML"),
    "no date": (lambda _: b"seed: 2001-99-99", "cannot be read as YAML"),
    "a list for a key": (lambda _: b"? [a]\n: b\n", "cannot be read as YAML"),
    "a long value": (lambda _: b"seed: [" + b"1," * 30_000 + b"1]", "seed = "),
    "a number for a section": (lambda _: b"model: 3", "must be a mapping of keys"),
}  # fmt: skip


def laughs() -> bytes:
    lines = ["a0: &a0 [lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    return "\n".join([*lines, "seed: *a11"]).encode()


@pytest.mark.parametrize("case", HOSTILE_YAML)
def test_hostile_configurations(tmp_path, marker, capsys, case):
    make, reason = HOSTILE_YAML[case]
    (tmp_path / "c.yaml").write_bytes(make(marker))
    said = ends(capsys, 2, "check", tmp_path / "c.yaml")
    assert any(part in said for part in reason.split("|")), said


@pytest.mark.parametrize("case", ["billion laughs", "50 MB in one word"])
def test_hostile_configurations_take_no_memory(tmp_path, marker, case):
    (tmp_path / "c.yaml").write_bytes(HOSTILE_YAML[case][0](marker))
    tracemalloc.start()
    with pytest.raises(ConfigError):
        read_config(tmp_path / "c.yaml")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


def test_what_json_says_of_a_run_is_still_a_configuration(tmp_path):
    (tmp_path / "c.yaml").write_text(json.dumps({"seed": 3, "log": {"sample_prompts": ["a", "b"]}}))
    assert isinstance(read_config(tmp_path / "c.yaml"), Config)
    assert read_config(tmp_path / "c.yaml").seed == 3


# saved states


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny):
    """A folder with a finished run and its configuration, run.yaml; tests must not change it."""
    folder = tmp_path_factory.mktemp("hostile")
    sizes = {"updates": 1, "updates_per_iteration": 1, "pairs_per_update": 2, "micro_batch": 2}
    file = run_config(folder, tiny, train=sizes | {"ema_decay": 0.5})
    assert main(["train", str(file)]) == 0
    return folder


@pytest.fixture
def copied(run, tmp_path):
    """A copy of the run's configuration file, and its only saved state."""
    folder = tmp_path / "copied"
    shutil.copytree(run, folder)
    file = folder / "run.yaml"
    file.write_text(file.read_text().replace(str(run), str(folder)).replace("updates: 1\n", "updates: 2\n", 1))
    (state,) = (folder / "run" / "state").iterdir()
    return file, state


def fix_checksums(state: Path) -> None:
    """Updates the sizes and checksums in a state's manifest to match its files, as an attacker would."""
    tree = json.loads((state / "manifest.json").read_text())
    for name, row in tree["files"].items():
        content = (state / name).read_bytes()
        row |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    tree["sha256"] = _checksum(tree["files"])
    (state / "manifest.json").write_text(json.dumps(tree))


def header(tree: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = tree if isinstance(tree, bytes) else json.dumps(tree).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: list[int], kind: str = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


ENTRY = json.dumps(entry(0, 4, [1])).encode()
HOSTILE_SAFETENSORS = {
    "nothing": b"",
    "seven bytes": b"\0" * 7,
    "length of the header huge": header({}, length=2**63),
    "length beyond the file": header({"a": entry(0, 4, [1])}, bytes(4), length=10_000),
    "a hundred megabytes of header": header({}, length=100_000_001),
    "negative offsets": header({"a": entry(-4, 0, [1])}, bytes(4)),
    "backward offsets": header({"a": entry(4, 0, [1])}, bytes(4)),
    "overlapping": header({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
    "beyond the end": header({"a": entry(0, 400, [100])}, bytes(4)),
    "shape too large": header({"a": entry(0, 4, [2**40, 2**40])}, bytes(4)),
    "shape overflows": header({"a": entry(0, 0, [2**32, 2**32])}),
    "wrong dtype": header({"a": entry(0, 4, [1], "OBJECT")}, bytes(4)),
    "dtype of another size": header({"a": entry(0, 4, [1], "F64")}, bytes(4)),
    "duplicate keys": header(b'{"a":%s,"a":%s}' % (ENTRY, ENTRY), bytes(4)),
    "not UTF-8": header(b'{"\xff":%s}' % ENTRY, bytes(4)),
    "deep header": header(b'{"a":' + b"[" * 100_000, bytes(4)),
    "no object": header([1, 2]),
    "no json": header(b"\x80\x04\x95"),
    "another tensor": save({"a": torch.zeros(3)}),
    "no tensor": save({}),
    "truncated": save({"a": torch.zeros(300)})[:-200],
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_SAFETENSORS)
def test_hostile_safetensors(tmp_path, tiny, run, case):
    content = HOSTILE_SAFETENSORS[case]
    # a cache
    source = open_source(str(make_folder(tmp_path / "data", 3)))
    folder = opened(source, tmp_path / "cache").folder
    index = json.loads((folder / "index.json").read_text())
    for name in ("latents-00000.safetensors", "prompts-00000.safetensors"):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(content)
        files = index["files"] | {name: len(content)}
        (folder / "index.json").write_text(json.dumps(index | {"files": files}))
        with pytest.raises(DataError, match="this cache is damaged"):
            opened(source, tmp_path / "cache").winners([0])
        (folder / name).write_bytes(before)
    # a saved state with matching checksums
    (saved,) = (run / "run" / "state").iterdir()
    state = shutil.copytree(saved, tmp_path / "state" / saved.name)
    for name in ("policy", "optimizer"):
        (state / f"{name}.safetensors").write_bytes(content)
    fix_checksums(state)
    if case in ("another tensor", "no tensor", "duplicate keys"):
        assert set(checked_state(state).tensors("policy")) <= {"a"}  # well formed, but not a policy's tensors
    else:
        with pytest.raises(CheckpointError):
            checked_state(state).tensors("policy")


@pytest.mark.parametrize("case", HOSTILE_SAFETENSORS)
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_hostile_safetensors_of_a_model(tmp_path, tiny, part, case):
    model = shutil.copytree(tiny, tmp_path / "model")
    (weights,) = (model / part).glob("*.safetensors")
    weights.write_bytes(HOSTILE_SAFETENSORS[case])
    with pytest.raises(ConfigError, match=r"model\.path"):
        StableDiffusion.load(str(model), torch.device("cpu"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_that_are_not_loaded_do_not_make_up_for_missing_ones(tmp_path, tiny, part):
    model = shutil.copytree(tiny, tmp_path / "model")
    (weights,) = (model / part).glob("*.safetensors")
    tensors = load_file(weights)
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    index = {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}
    for file, some in halves.items():
        save_file({name: tensors[name] for name in some}, model / part / file, {"format": "pt"})
    (model / part / f"{weights.name}.index.json").write_text(json.dumps(index))
    StableDiffusion.load(str(model), torch.device("cpu"))  # the single file and the shards are each complete
    # Diffusers reads the index, transformers the single file: the one that is read loses its largest tensor.
    largest = max(names, key=lambda name: tensors[name].numel())
    spoiled = weights if part == "text_encoder" else model / part / index["weight_map"][largest]
    held = load_file(spoiled)
    held.pop(largest)
    save_file(held, spoiled, {"format": "pt"})
    save_file(tensors, weights.with_suffix(".fp16.safetensors"), {"format": "pt"})
    with pytest.raises(ConfigError, match=f"{part} (holds .* of the|lacks 1 weights)"):
        StableDiffusion.load(str(model), torch.device("cpu"))


@pytest.mark.parametrize(
    "name", ["policy.safetensors", "optimizer.safetensors", "references/checkpoint-000000.safetensors"]
)
def test_pickled_states_are_refused(copied, marker, capsys, name):
    file, state = copied
    for content in payloads(marker):
        (state / name).write_bytes(content)
        said = ends(capsys, 6, "train", file)
        assert Path(name).name in said or "none of its 1 saved states" in said
        fix_pool_checksums(state)
        fix_checksums(state)
        assert Path(name).name in ends(capsys, 6, "train", file)
        ends(capsys, 6, "export", file.parent / "run") if name == "policy.safetensors" else None


def fix_pool_checksums(state: Path) -> None:
    manifest = state / "references" / "manifest.json"
    tree = json.loads(manifest.read_text())
    for row in tree["members"]:
        content = (state / "references" / row["file"]).read_bytes()
        row |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write_text(json.dumps(tree))


def test_tensors_of_another_model_are_refused(copied, capsys):
    file, state = copied
    for name in ("policy", "average", "optimizer"):
        weights = state / f"{name}.safetensors"
        before, tensors = weights.read_bytes(), load_file(weights)
        moment = next(place for place in tensors if not place.startswith("step/"))
        # A tensor of one value could be copied anywhere by broadcasting.
        for other in ({"a": torch.zeros(3)}, tensors | {moment: torch.zeros(1)}, tensors | {moment: torch.zeros(7, 7)}):
            save_file(other, weights)
            fix_checksums(state)
            assert "does not match this" in ends(capsys, 6, "train", file)
            if name == "average":
                assert "does not match this model's weights" in ends(capsys, 6, "export", state.parents[1])
        weights.write_bytes(before)


HOSTILE_JSON = {
    "nothing": "",
    "binary": b"\x80\x04\x95",
    "deep lists": "[" * 200_000,
    "deep objects": '{"a":' * 200_000,
    "a list": "[1, 2]",
    "a number": "3",
    "null": "null",
    "a huge number": "9" * 10_000,
    "twice": '{"update": 1, "update": 2, "format": 1, "format": 1}',
    "not a number": '{"format": NaN, "update": NaN, "_class_name": NaN, "format_version": NaN}',
    "infinity": '{"format": Infinity, "update": Infinity, "files": {}, "sha256": -Infinity}',
    "wrong types": '{"format": "1", "update": [], "files": [], "members": {}, "settings": 3, "_class_name": []}',
    "huge numbers": '{"format": 1e308, "update": 123456789012345678901234567890, "files": {"a": {"size": 1e999}}}',
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE_JSON)
def test_hostile_json(tmp_path, tiny, run, case, capsys):
    content = HOSTILE_JSON[case]
    content = content if isinstance(content, bytes) else content.encode()
    (saved,) = (run / "run" / "state").iterdir()
    for place in ("manifest.json", "numbers.json", "references/manifest.json"):
        state = shutil.copytree(saved, tmp_path / place.replace("/", "-") / "state" / saved.name)
        (state / place).write_bytes(content)
        if place != "manifest.json":
            fix_checksums(state)
        if case in ("twice", "huge numbers") and place == "numbers.json":
            # Of a repeated key JSON readers use the last value; a run with fewer updates does not resume from this.
            assert checked_state(state).update == (2 if case == "twice" else 123456789012345678901234567890)
        else:
            with pytest.raises(CheckpointError):
                checked_state(state)
            with pytest.raises(CheckpointError, match="none of its 1 saved states can be used|is newer than"):
                newest_state(state.parents[1])
    (tmp_path / "log.jsonl").write_bytes(b'{"update": 1}\n' + content.replace(b"\n", b" ") + b"\n")
    assert read_journal(tmp_path)[0] == {"update": 1}
    source = open_source(str(make_folder(tmp_path / "data", 3)))
    (opened(source, tmp_path / "cache").folder / "index.json").write_bytes(content)
    with pytest.raises(DataError, match="this cache is damaged"):
        opened(source, tmp_path / "cache")
    for place in ("model_index.json", "unet/config.json", "text_encoder/config.json", "tokenizer/tokenizer.json"):
        model = shutil.copytree(tiny, tmp_path / "models" / place)
        assert (model / place).is_file()
        (model / place).write_bytes(content)
        assert "model.path" in ends(capsys, 2, "check", run_config(tmp_path, model))


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler")
@pytest.mark.parametrize("case", HOSTILE_JSON)
def test_hostile_json_of_a_scheduler(tmp_path, tiny, case, capsys):
    content = HOSTILE_JSON[case]
    model = shutil.copytree(tiny, tmp_path / "model")
    file = model / "scheduler" / "scheduler_config.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    if case in ("twice", "infinity", "wrong types", "huge numbers"):  # only keys that schedulers do not have
        config = StableDiffusion.load(str(model), torch.device("cpu")).scheduler_config
        assert NoiseSchedule(config).num_timesteps == 1000
    else:
        assert "model.path" in ends(capsys, 2, "check", run_config(tmp_path, model))


@pytest.mark.parametrize(
    "change",
    [{"num_train_timesteps": 10**12}, {"num_train_timesteps": -1}, {"num_train_timesteps": 0},
     {"num_train_timesteps": "many"}, {"num_train_timesteps": None}, {"beta_start": "x"}, {"beta_end": float("nan")},
     {"beta_start": float("inf")}, {"beta_start": -3}, {"beta_schedule": []}, {"beta_schedule": "evil"},
     {"prediction_type": "sample"}, {"prediction_type": 3}, {"trained_betas": "x"}, {"timestep_spacing": {}}],
    ids=str,
)  # fmt: skip
def test_settings_of_a_scheduler_that_make_no_sense(tmp_path, tiny, change, capsys):
    model = shutil.copytree(tiny, tmp_path / "model")
    file = model / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert "model.path" in ends(capsys, 2, "check", run_config(tmp_path, model))


@pytest.mark.parametrize("case", HOSTILE_JSON)
def test_a_hostile_stamp_is_no_stamp(copied, case):
    file, _ = copied
    stamp = file.parent / "run" / "weights" / "seppo_fast.json"
    content = HOSTILE_JSON[case]
    stamp.write_bytes(content if isinstance(content, bytes) else content.encode())
    from seppo_fast.runs.weights import written_after

    assert written_after(stamp.parent) in ((2,) if case == "twice" else (None, 123456789012345678901234567890))


@pytest.mark.parametrize(
    ("key", "value"),
    [("optimizer", []), ("optimizer", {"step/x": 1}), ("added", "many"), ("fingerprints", [1]),
     ("config", []), ("asked", {"seed": "x"}), ("config", {"evil": 1})],
)  # fmt: skip
def test_numbers_of_other_types(copied, capsys, key, value):
    file, state = copied
    numbers = json.loads((state / "numbers.json").read_text())
    assert key in numbers
    (state / "numbers.json").write_text(json.dumps(numbers | {key: value}))
    fix_checksums(state)
    code = main(["train", str(file)])
    assert "Traceback" not in capsys.readouterr().err
    assert code == 6


def test_a_cache_with_numbers_that_do_not_fit(tmp_path):
    source = open_source(str(make_folder(tmp_path / "data", 3)))
    folder = opened(source, tmp_path / "cache").folder
    index = json.loads((folder / "index.json").read_text())
    for change in (
        {"ids": ["a"]}, {"ids": 3}, {"prompt_rows": [0, 1, 99]}, {"prompt_rows": ["a"]}, {"latent_shapes": 3},
        {"latent_shapes": [[9, 9, 9]]}, {"shard_size": 0}, {"shard_size": "x"}, {"num_examples": 1e9}, {"dropped": [1]},
        {"files": {"../../../x": 3}}, {"truncated": None, "files": 7}, {"prompts": {}},
    ):  # fmt: skip
        (folder / "index.json").write_text(json.dumps(index | change))
        with pytest.raises(DataError, match="this cache is damaged"):
            opened(source, tmp_path / "cache").winners([0])
