"""Files made to do harm, wherever files are read: a plain error, nothing run, no time and no memory lost."""

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

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save, save_file

from seppo_fast.cli import main
from seppo_fast.config import Config, read_config, to_yaml
from seppo_fast.data.scan import scan
from seppo_fast.data.sources import open_source
from seppo_fast.errors import CheckpointError, ConfigError, DataError
from seppo_fast.evaluate.judged import judged_model
from seppo_fast.journal import read_journal
from seppo_fast.saved_state import _checksum, checked_state, newest_state
from tests.runs import tiny_config
from tests.test_cache import make_folder, opened
from tests.test_shards import member, pair, write_tar
from tests.test_sources import encoded, pixels

UNSAFE = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.marker), "w"))


@pytest.fixture
def marker(tmp_path):
    """The file that a pickle would write; it was not written."""
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), "a pickle was loaded"


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "marker"))).close()
    assert (tmp_path / "marker").exists()


def payloads(marker: Path) -> list[bytes]:
    """As pickle writes it, and as torch does."""
    file = marker.with_name("payload")
    torch.save({"weight": Payload(marker)}, file)
    return [pickle.dumps(Payload(marker), protocol=2), file.read_bytes()]


def run_config(folder: Path, pipeline: Path, **sections: Any) -> Path:
    """A configuration file for a run of one update."""
    small = {"train": {"updates": 1, "pairs_per_update": 2, "micro_batch": 2}, "sampler": {"steps": 1, "batch": 2}}
    file = folder / "run.yaml"
    file.write_text(to_yaml(tiny_config(pipeline, folder, **small | sections)))
    return file


def ends(capsys: pytest.CaptureFixture[str], code: int, *words: object) -> str:
    """What `seppo-fast WORDS` says as it ends with this code."""
    assert main([str(word) for word in words]) == code
    said = capsys.readouterr().err
    said = said[said.rindex("seppo-fast: ") :]  # after the bars of those who load weights
    assert "Traceback" not in said
    assert len(said) < 5000
    return said


# pickles: the model's folder


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("suffix", UNSAFE)
def test_pickled_weights_are_refused_with_how_to_convert(tmp_path, tiny, marker, capsys, part, suffix):
    model = shutil.copytree(tiny, tmp_path / "model")
    (weights,) = (model / part).glob("*.safetensors")
    weights.unlink()
    names = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "pytorch_model"}
    for content in payloads(marker):
        (model / part / names[part]).with_suffix(suffix).write_bytes(content)
        said = ends(capsys, 2, "check", run_config(tmp_path, model))
        assert names[part] + suffix in said
        assert ".save_pretrained(NEW_FOLDER, safe_serialization=True)" in said


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_pickles_by_the_name_of_safetensors_are_refused(tmp_path, tiny, marker, capsys, part):
    model = shutil.copytree(tiny, tmp_path / "model")
    (weights,) = (model / part).glob("*.safetensors")
    for content in payloads(marker):
        weights.write_bytes(content)
        assert "safetensors" in ends(capsys, 2, "check", run_config(tmp_path, model))


@pytest.mark.parametrize("suffix", [*UNSAFE, ".safetensors"])
def test_single_files_are_refused_with_how_to_convert(tmp_path, tiny, marker, capsys, suffix):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(payloads(marker)[1])
    said = ends(capsys, 2, "check", run_config(tmp_path, file))
    assert "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER) converts" in said
    said = ends(capsys, 2, "check", run_config(tmp_path, tiny, model={"motion_adapter": str(file)}, data={"source": "shapes-motion:3"}))  # fmt: skip
    assert "MotionAdapter.from_single_file(FILE).save_pretrained(FOLDER) converts" in said


def test_pickles_beside_good_weights_are_not_looked_at(tmp_path, tiny, marker):
    model = shutil.copytree(tiny, tmp_path / "model")
    for part in ("unet", "vae", "text_encoder", "scheduler", "tokenizer", "."):
        for suffix in UNSAFE:
            for name in ("diffusion_pytorch_model", "pytorch_model", "model", "special_tokens_map", "scheduler"):
                (model / part / f"{name}{suffix}").write_bytes(payloads(marker)[1])
    assert main(["check", str(run_config(tmp_path, model))]) == 0


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_an_index_that_leads_to_pickles_is_refused(tmp_path, tiny, marker, capsys, part):
    model = shutil.copytree(tiny, tmp_path / "model")
    (weights,) = (model / part).glob("*.safetensors")
    (model / part / "part-1.bin").write_bytes(payloads(marker)[1])
    weights.rename(model / part / "part-0.safetensors")
    for name in ("part-1.bin", "../unet/part-0.safetensors", "/etc/passwd"):
        index = {"metadata": {}, "weight_map": {"conv_in.weight": name, "conv_in.bias": "part-0.safetensors"}}
        (model / part / f"{weights.name}.index.json").write_text(json.dumps(index))
        assert repr(name) in ends(capsys, 2, "check", run_config(tmp_path, model))
    for content in ("{", "[" * 100_000, "[]", '{"weight_map": 3}', '{"weight_map": {"a": {}}}'):
        (model / part / f"{weights.name}.index.json").write_text(content)
        ends(capsys, 2, "check", run_config(tmp_path, model))


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_pickled_motion_adapter_is_refused(tmp_path, tiny, adapter, marker, capsys, suffix):
    place = shutil.copytree(adapter, tmp_path / "adapter")
    (weights,) = place.glob("*.safetensors")
    weights.unlink()
    clips = {"model": {"path": str(tiny), "precision": "fp32", "motion_adapter": str(place)}}
    for content in payloads(marker):
        weights.with_suffix(suffix).write_bytes(content)
        file = run_config(tmp_path, tiny, **clips, data={"source": "shapes-motion:3", "frames": 4, "resolution": 16})
        said = ends(capsys, 2, "check", file)
        assert ("model.motion_adapter" if suffix == ".safetensors" else "pickled weights are not loaded") in said


def test_a_pickled_lora_is_refused(tmp_path, tiny, marker):
    config = tiny_config(tiny, tmp_path, model={"train": "lora"})
    for suffix in (".bin", ".safetensors"):
        for content in payloads(marker):
            folder = tmp_path / f"lora{suffix}"
            folder.mkdir(exist_ok=True)
            (folder / f"pytorch_lora_weights{suffix}").write_bytes(content)
            with pytest.raises(ConfigError, match="could not be loaded as a LoRA with safetensors weights"):
                judged_model(config, ["a red circle"], 0, folder)


# code in a model's folder

CODE = "open({marker!r}, 'w')\nclass Evil:\n    @classmethod\n    def from_pretrained(cls, *a, **k):\n        return cls()\n"


def custom_module(model: Path, index: dict[str, Any]) -> None:
    index["unet"] = ["evil", "Evil"]


def custom_module_named_as_a_library(model: Path, index: dict[str, Any]) -> None:
    (model / "unet" / "evil.py").rename(model / "unet" / "diffusers.py")
    index["unet"] = ["diffusers", "Evil"]


def one_more_part(model: Path, index: dict[str, Any]) -> None:
    (model / "extra").mkdir()
    shutil.copy(model / "unet" / "evil.py", model / "extra" / "evil.py")
    index["extra"] = ["evil", "Evil"]


def any_installed_module(model: Path, index: dict[str, Any]) -> None:
    index["vae"] = ["antigravity", "Evil"]


def strange_part(model: Path, index: dict[str, Any]) -> None:
    index["vae"] = ["diffusers"]


def custom_pipeline(model: Path, index: dict[str, Any]) -> None:
    index["_class_name"] = ["pipeline", "Evil"]


def pipeline_file(model: Path, index: dict[str, Any]) -> None:
    index["_class_name"] = "Evil"


@pytest.mark.parametrize(
    "change",
    [custom_module, custom_module_named_as_a_library, one_more_part, any_installed_module, strange_part,
     custom_pipeline, pipeline_file],
)  # fmt: skip
def test_code_in_a_models_folder_is_never_run(tmp_path, tiny, marker, capsys, change):
    model = shutil.copytree(tiny, tmp_path / "model")
    for place in ("unet/evil.py", "pipeline.py", "Evil.py"):
        (model / place).write_text(CODE.format(marker=str(marker)))
    index = json.loads((model / "model_index.json").read_text())
    change(model, index)
    (model / "model_index.json").write_text(json.dumps(index))
    assert "model.path" in ends(capsys, 2, "check", run_config(tmp_path, model))


def test_an_auto_map_is_never_followed(tmp_path, tiny, marker, capsys):
    model = shutil.copytree(tiny, tmp_path / "model")
    for place in ("text_encoder/config.json", "tokenizer/tokenizer_config.json", "unet/config.json"):
        tree = json.loads((model / place).read_text())
        names = ("AutoModel", "AutoConfig", "AutoTokenizer", "UNet2DConditionModel")
        (model / place).write_text(json.dumps(tree | {"auto_map": dict.fromkeys(names, "evil.Evil")}))
        (model / place).with_name("evil.py").write_text(CODE.format(marker=str(marker)))
    main(["check", str(run_config(tmp_path, model))])  # loaded or refused: the code was not run


def test_no_call_trusts_code_from_elsewhere():
    root = Path(__file__).parents[1]
    sources = [path for folder in ("seppo_fast", "benchmarks", "kernels") for path in (root / folder).rglob("*.py")]
    for word in ("trust_remote_code", "torch.load(", "pickle.load", "allow_pickle", "yaml.unsafe", "custom_pipeline"):
        assert [path for path in sources if word in path.read_text(encoding="utf-8")] == [], word


# pickles: data and configuration


def test_pickles_as_data_are_bad_files(tmp_path, marker):
    evil = payloads(marker)
    folder = tmp_path / "loose"
    folder.mkdir()
    for number, content in enumerate(evil):
        (folder / f"{number}.png").write_bytes(content)
        (folder / f"{number}.txt").write_text("a fox")
        (folder / f"told{number}.png").write_bytes(encoded(pixels(1)))
        (folder / f"told{number}.txt").write_bytes(content)
    assert len(scan(open_source(str(folder)))) == 4
    pq.write_table(pa.table({"image": evil, "text": ["a", "b"]}), tmp_path / "x.parquet")
    reasons = [problem.reason for problem in scan(open_source(str(tmp_path / "x.parquet")))]
    assert [reason.startswith("not an image") for reason in reasons] == [True, True]
    members = [member("x.jpg", evil[0]), member("x.txt", b"a fox"), member("y.jpg", encoded(pixels(1))), member("y.json", evil[0])]  # fmt: skip
    others = [member(f"good.{suffix}", content) for suffix in ("pyd", "pkl", "pickle", "pth", "pt", "ten", "npy") for content in evil[:1]]  # fmt: skip
    source = open_source(str(write_tar(tmp_path / "s.tar", [*pair("good", 1), *others, *members])))
    assert [problem.id for problem in scan(source)] == ["s.tar/y.jpg", "s.tar/x.jpg"]
    assert source.notes[0].startswith("7 members")
    for suffix in (*UNSAFE, ".csv", ".parquet", ".tar", ".npy"):
        for content in evil:
            (tmp_path / f"data{suffix}").write_bytes(content)
            try:
                assert len(open_source(str(tmp_path / f"data{suffix}"))) == 0
            except DataError as error:
                assert error.exit_code == 3


def test_a_pickled_listing_is_refused(tmp_path, marker):
    for content in payloads(marker):
        (tmp_path / "metadata.jsonl").write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as UTF-8 text"):
            open_source(str(tmp_path))


@pytest.mark.parametrize("name", ["index.json", "latents-00000.safetensors", "prompts-00000.safetensors"])
def test_a_pickled_cache_is_refused(tmp_path, marker, name):
    source = open_source(str(make_folder(tmp_path / "data", 3)))
    folder = opened(source, tmp_path / "cache").folder
    for content in payloads(marker):
        index = json.loads((folder / "index.json").read_text()) if name != "index.json" else None
        (folder / name).write_bytes(content)
        if index is not None:
            index["files"][name] = len(content)
            (folder / "index.json").write_text(json.dumps(index))
        with pytest.raises(DataError, match="this cache is damaged"):
            opened(source, tmp_path / "cache").winners([0])


HOSTILE_YAML: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "python object": (lambda marker: f"!!python/object/apply:builtins.open ['{marker}', 'w']".encode(), "python/object"),
    "python tag in a value": (lambda marker: f"seed: !!python/object/apply:os.system ['touch {marker}']".encode(), "python"),
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
    "a key twice": (lambda _: b"seed: 1\nseed: 2\n", "the key 'seed' is there twice"),
    "a section twice": (lambda _: b"model: {path: a}\nmodel: {path: b}\n", "the key 'model' is there twice"),
    "a key of a section twice": (lambda _: b"model: {path: a, path: b}\n", "the key 'path' is there twice"),
    "tabs": (lambda _: b"model:\n\tpath: a\n", "cannot be read as YAML"),
    "NUL": (lambda _: b"model:\n  path: a\0b\n", "cannot be read as YAML"),
    "not UTF-8": (lambda _: "model: café".encode("latin-1"), "cannot be read as YAML"),
    "a list": (lambda _: b"- 1\n- 2\n", "expected a mapping"),
    "a huge number": (lambda _: b"seed: " + b"9" * 10_000, "cannot be read as YAML|seed"),
    "infinity": (lambda _: b"train: {beta: .inf}", "finite"),
    "not a number": (lambda _: b"train: {beta: .nan}", "finite"),
    "no date": (lambda _: b"seed: 2001-99-99", "cannot be read as YAML"),
    "a list for a key": (lambda _: b"? [a]\n: b\n", "cannot be read as YAML"),
    "a long value": (lambda _: b"seed: [" + b"1," * 30_000 + b"1]", "seed = "),
    "a number for a section": (lambda _: b"model: 3", "must hold keys of its own"),
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
    """A folder with a finished run and its configuration, run.yaml; read only."""
    folder = tmp_path_factory.mktemp("hostile")
    file = run_config(
        folder, tiny, train={"updates": 1, "updates_per_iteration": 1, "pairs_per_update": 2, "micro_batch": 2}
    )
    assert main(["train", str(file)]) == 0
    return folder


@pytest.fixture
def copied(run, tmp_path):
    """A copy of it, and its one saved state."""
    folder = tmp_path / "copied"
    shutil.copytree(run, folder)
    file = folder / "run.yaml"
    file.write_text(file.read_text().replace(str(run), str(folder)).replace("updates: 1\n", "updates: 2\n", 1))
    (state,) = (folder / "run" / "state").iterdir()
    return file, state


def mend(state: Path) -> None:
    """Makes sizes and checksums of a state those of its files, as somebody would who means harm."""
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
    "duplicate keys": header(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "not UTF-8": header(b'{"\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
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
    # of a cache
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
    # of a saved state, its checksums mended
    (saved,) = (run / "run" / "state").iterdir()
    state = shutil.copytree(saved, tmp_path / "state" / saved.name)
    for name in ("policy", "optimizer"):
        (state / f"{name}.safetensors").write_bytes(content)
    mend(state)
    try:
        tensors = checked_state(state).tensors("policy")
        assert set(tensors) <= {"a"}
    except CheckpointError as error:
        assert error.exit_code == 6


@pytest.mark.parametrize("case", HOSTILE_SAFETENSORS)
@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_hostile_safetensors_of_a_model(tmp_path, tiny, part, case):
    from seppo_fast.families.sd import StableDiffusion

    model = shutil.copytree(tiny, tmp_path / "model")
    (weights,) = (model / part).glob("*.safetensors")
    weights.write_bytes(HOSTILE_SAFETENSORS[case])
    with pytest.raises(ConfigError, match=r"model\.path"):
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
        mend_pool(state)
        mend(state)
        assert Path(name).name in ends(capsys, 6, "train", file)
        ends(capsys, 6, "export", file.parent / "run") if name == "policy.safetensors" else None


def mend_pool(state: Path) -> None:
    manifest = state / "references" / "manifest.json"
    tree = json.loads(manifest.read_text())
    for row in tree["members"]:
        content = (state / "references" / row["file"]).read_bytes()
        row |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write_text(json.dumps(tree))


def test_tensors_of_another_model_are_refused(copied, capsys):
    file, state = copied
    for name in ("policy", "optimizer"):
        before = (state / f"{name}.safetensors").read_bytes()
        save_file({"a": torch.zeros(3)}, state / f"{name}.safetensors")
        mend(state)
        assert "other" in ends(capsys, 6, "train", file)
        (state / f"{name}.safetensors").write_bytes(before)


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
    "wrong types": '{"format": "1", "update": [], "files": [], "members": {}, "settings": 3, "ids": 4, "_class_name": []}',
    "huge numbers": '{"format": 1e308, "update": 123456789012345678901234567890, "members": [], "files": {"a": {"size": 1e999}}}',
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
            mend(state)
        if case == "twice" and place == "numbers.json":
            assert checked_state(state).update == 2  # the last one counts, as JSON's readers have it
        else:
            with pytest.raises(CheckpointError):
                checked_state(state)
            with pytest.raises(CheckpointError, match="none of its 1 saved states can be used"):
                newest_state(state.parents[1], print)
    (tmp_path / "log.jsonl").write_bytes(b'{"update": 1}\n' + content.replace(b"\n", b" ") + b"\n")
    assert read_journal(tmp_path)[0] == {"update": 1}
    source = open_source(str(make_folder(tmp_path / "data", 3)))
    (opened(source, tmp_path / "cache").folder / "index.json").write_bytes(content)
    with pytest.raises(DataError, match="this cache is damaged"):
        opened(source, tmp_path / "cache")
    for place in ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "tokenizer/vocab.json"):
        model = shutil.copytree(tiny, tmp_path / "models" / place)
        (model / place).write_bytes(content)
        said = ends(capsys, 2, "check", run_config(tmp_path, model))
        assert "model.path" in said or "scheduler" in said


@pytest.mark.parametrize("case", HOSTILE_JSON)
def test_a_hostile_stamp_is_no_stamp(copied, case):
    file, _ = copied
    stamp = file.parent / "run" / "weights" / "seppo_fast.json"
    content = HOSTILE_JSON[case]
    stamp.write_bytes(content if isinstance(content, bytes) else content.encode())
    from seppo_fast.trainer import _update_of

    assert _update_of(stamp.parent) in ((2,) if case == "twice" else (None, 123456789012345678901234567890))


@pytest.mark.parametrize(
    ("key", "value"),
    [("optimizer", []), ("optimizer", {"step/x": 1}), ("scaler", 3), ("added", "many"), ("fingerprints", [1]),
     ("config", []), ("asked", {"seed": "x"}), ("config", {"evil": 1}), ("skipped", None)],
)  # fmt: skip
def test_numbers_of_other_types(copied, capsys, key, value):
    file, state = copied
    numbers = json.loads((state / "numbers.json").read_text())
    assert key in numbers
    (state / "numbers.json").write_text(json.dumps(numbers | {key: value}))
    mend(state)
    code = main(["train", str(file)])
    assert "Traceback" not in capsys.readouterr().err
    assert code == 6


def test_a_cache_with_numbers_that_do_not_fit(tmp_path):
    source = open_source(str(make_folder(tmp_path / "data", 3)))
    folder = opened(source, tmp_path / "cache").folder
    index = json.loads((folder / "index.json").read_text())
    for change in (
        {"ids": ["a"]}, {"ids": 3}, {"prompt_rows": [0, 1, 99]}, {"prompt_rows": ["a"]}, {"latent_shape": 3},
        {"latent_shape": [9, 9, 9]}, {"shard_size": 0}, {"shard_size": "x"}, {"num_examples": 1e9}, {"dropped": [1]},
        {"files": {"../../../x": 3}}, {"truncated": None, "files": 7}, {"prompts": {}},
    ):  # fmt: skip
        (folder / "index.json").write_text(json.dumps(index | change))
        with pytest.raises(DataError, match="this cache is damaged"):
            opened(source, tmp_path / "cache").winners([0])
