"""Pickles and code under every file name and in every place: refused with a message that helps, never loaded."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seppo_fast.cli import main
from seppo_fast.data.scan import scan
from seppo_fast.data.sources import open_source
from seppo_fast.evaluation.judged import judged_model
from seppo_fast.utils.errors import ConfigError, DataError
from tests.helpers.cache import make_folder, opened
from tests.helpers.hostile import UNSAFE, Payload, ends, payloads, run_config
from tests.helpers.pictures import encoded, pixels
from tests.helpers.runs import tiny_config
from tests.helpers.tars import member, pair, write_tar


def test_the_payload_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "marker"))).close()
    assert (tmp_path / "marker").exists()


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
    model = {"path": str(tiny), "motion_adapter": str(file)}
    said = ends(capsys, 2, "check", run_config(tmp_path, tiny, model=model, data={"source": "shapes-motion:3"}))
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
        assert (
            "model.motion_adapter" if suffix == ".safetensors" else "MotionAdapter.from_pretrained(FOLDER).save"
        ) in said


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

CODE = """open({marker!r}, "w")
class Evil:
    @classmethod
    def from_pretrained(cls, *_, **__):
        return cls()
"""


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
    main(["check", str(run_config(tmp_path, model))])  # may succeed or fail; `marker` checks that no code ran


# The one explicit conversion of a published scorer's pickle, which reads tensors alone.
CONVERSION = 'torch.load(file, map_location="cpu", weights_only=True)'


def test_no_call_trusts_code_from_elsewhere():
    root = Path(__file__).parents[2]
    sources = [path for folder in ("seppo_fast", "benchmarks", "kernels") for path in (root / folder).rglob("*.py")]
    texts = {path: path.read_text(encoding="utf-8") for path in sources}
    for word in ("trust_remote_code", "torch.load(", "pickle.load", "allow_pickle", "yaml.unsafe", "custom_pipeline"):
        assert [path for path in sources if word in texts[path].replace(CONVERSION, "")] == [], word
    assert [path.name for path in sources if CONVERSION in texts[path]] == ["convert.py"]


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
    picture = member("y.jpg", encoded(pixels(1)))
    members = [member("x.jpg", evil[0]), member("x.txt", b"a fox"), picture, member("y.json", evil[0])]
    others = [member(f"good.{suffix}", evil[0]) for suffix in ("pyd", "pkl", "pickle", "pth", "pt", "ten", "npy")]
    source = open_source(str(write_tar(tmp_path / "s.tar", [*pair("good", 1), *others, *members])))
    assert [problem.id for problem in scan(source)] == ["s.tar/y.jpg", "s.tar/x.jpg"]
    assert source.notes[0].startswith("7 members")
    for suffix in (*UNSAFE, ".csv", ".parquet", ".tar", ".npy"):
        for content in evil:
            (tmp_path / f"data{suffix}").write_bytes(content)
            if suffix == ".tar":
                assert len(open_source(str(tmp_path / "data.tar"))) == 0
                continue
            with pytest.raises(DataError):
                open_source(str(tmp_path / f"data{suffix}"))


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
