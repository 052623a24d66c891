"""A model family and a method from outside the package work in the ordinary training loop."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import seppo_fast.methods.registry as method_registry
import seppo_fast.models.registry as model_registry
from seppo_fast.commands.export import export
from seppo_fast.config.objectives import OBJECTIVES, Objective
from seppo_fast.diffusion.conditioning import Conditioning
from seppo_fast.methods.registry import register as register_method
from seppo_fast.models.registry import family_of, load_family, register
from seppo_fast.runs.checkpoint import newest_state
from seppo_fast.train import train
from seppo_fast.utils.errors import ConfigError
from tests.helpers.runs import log_of, tiny_config, weights_of

CPU = torch.device("cpu")
FILE = Path(__file__).parents[1] / "helpers" / "toy_family.py"


@pytest.fixture(scope="module", autouse=True)
def toys():
    """Registers the toys only while these tests run: other tests go through everything that is registered."""
    known = [(table, dict(table)) for table in (OBJECTIVES, method_registry._METHODS, model_registry._FAMILIES)]
    module = importlib.import_module("tests.helpers.toy_family")
    yield module
    del sys.modules[module.__name__]
    for table, before in known:
        table.clear()
        table.update(before)


@pytest.fixture(scope="module")
def toy(toys, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("toy")
    toys.ToyFamily(toys.ToyNetwork(), CPU).save(folder)
    return folder


def toy_config(toy, tmp_path, **sections):
    sections["train"] = {"updates": 2, "micro_batch": 3} | sections.get("train", {})
    sections["model"] = {"train": "full"} | sections.get("model", {})
    return tiny_config(toy, tmp_path, **sections)


class Ended(Exception):
    """Ends a run from outside."""


@pytest.mark.parametrize(
    ("objective", "round_trip"), [("toy", False), ("sft", False), ("seppo", False), ("seppo", True)]
)
def test_a_toy_trains_is_saved_resumes_and_is_exported(toys, toy, tmp_path, objective, round_trip):
    """Bit for bit, with a method of its own, and with the package's, whose rollout uses the toy's solver."""
    save, sampler = {"minutes": 0}, {"round_trip": round_trip}
    settings = {"objective": objective, "save": save, "sampler": sampler, "log": {"sample_every": 1}}
    straight = toy_config(toy, tmp_path, output=str(tmp_path / "straight"), **settings)
    seen = []
    train(straight, lambda trainer, updates: seen.append(weights_of(trainer)))
    assert [entry["update"] for entry in log_of(straight)] == [1, 2]
    assert any(not torch.equal(seen[0][name], value) for name, value in seen[-1].items())

    broken = straight.model_copy(update={"output": str(tmp_path / "broken")})

    def end(trainer, updates):
        if updates == 1:
            trainer.saver.wait()
            raise Ended

    with pytest.raises(Ended):
        train(broken, end)
    assert newest_state(Path(broken.output)).update == 1
    train(broken, lambda trainer, updates: seen.append(weights_of(trainer)))
    assert all(torch.equal(seen[-1][name], value) for name, value in seen[2].items())

    for folder in (export(Path(broken.output)), Path(broken.output) / "weights"):
        again = load_family(toy_config(folder, tmp_path), CPU)
        assert type(again) is toys.ToyFamily
        state = again.model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in seen[2].items())
        assert load_file(folder / "toy.safetensors").keys() == state.keys()
    assert (Path(straight.output) / "samples" / "update-000002.png").exists()


def test_conditions_of_different_lengths_are_kept_as_long_as_they_are(toy, tmp_path):
    config = toy_config(toy, tmp_path, objective="toy")
    held = {}
    train(config, lambda trainer, updates: held.update(cache=trainer.cache, family=trainer.family))
    cache, family = held["cache"], held["family"]
    lengths = [len(prompt.split()) for prompt in cache.prompts]
    assert len(set(lengths)) > 1
    for row, length in enumerate(lengths):
        alone = cache.conditioning([row])
        assert alone["letters"].shape == (1, length, 3) and alone["mask"].sum() == length
        assert torch.equal(alone["letters"], family.encode_prompts([cache.prompts[row]])[0]["letters"])
    together = cache.conditioning([None, *range(len(cache))])
    assert together["letters"].shape == (len(cache) + 1, max(lengths), 3)
    assert together["mask"].sum(1).tolist() == [1, *lengths]
    with pytest.raises(ValueError, match="rows of different shapes"):
        Conditioning.cat(family.encode_prompts(["a", "a b"]))


def test_the_toys_file_is_small_and_takes_public_names():
    tree = ast.parse(FILE.read_text())
    lines = {node.name: node.end_lineno - node.lineno + 1 for node in tree.body if isinstance(node, ast.ClassDef)}
    assert lines["ToyFamily"] <= 80 and lines["ToyNetwork"] <= 20 and lines["ToyMethod"] <= 20
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert not [name for name in names if name.startswith("_")]
    asked = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {name for name in asked if name.startswith("_")} == {"__init__"}


def test_names_that_are_taken_are_refused(toys, toy, tmp_path):
    class Other(toys.ToyFamily):
        pass

    with pytest.raises(ValueError, match="'ToyPipeline' already belongs to ToyFamily"):
        register(Other)
    Other.pipelines = ()
    with pytest.raises(ValueError, match="must name at least one"):
        register(Other)
    with pytest.raises(ValueError, match="'sft' is already registered"):
        register_method("sft", Objective("never", None, None, "preferred", ""), toys.ToyMethod)
    assert register(toys.ToyFamily) is toys.ToyFamily  # again
    assert family_of(toy_config(toy, tmp_path).model) is toys.ToyFamily


def test_what_the_toy_lacks_is_refused_by_name(toy, tmp_path):
    for sections, said in (
        ({"model": {"train": "lora"}}, "model.train = lora: ToyFamily does not support this"),
        ({"model": {"gradient_checkpointing": True}}, "model.gradient_checkpointing = true: ToyFamily"),
        ({"model": {"compile": True}}, "model.compile = true: ToyFamily"),
        ({"model": {"attention": "xformers"}}, "model.attention = xformers: ToyFamily"),
        ({"data": {"frames": 4}}, "data.frames = 4 is for clips only"),
    ):
        with pytest.raises(ConfigError, match=said):
            train(toy_config(toy, tmp_path, **sections))


def test_without_the_toy_its_folder_is_refused(toy, tmp_path):
    code = (
        "import sys\nfrom seppo_fast.cli import main\n"
        f"sys.exit(main(['check', 'sft.yaml', '--model.path', {str(toy)!r}, '--data.source', 'shapes:4', "
        f"'--output', {str(tmp_path / 'run')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "unet/ holds no safetensors weights" in done.stderr
