"""`model.deterministic`: what it sets, that it restores everything, and what it refuses."""

import os

import pytest
import torch

from seppo_fast.config.load import parse_config
from seppo_fast.train import train
from seppo_fast.utils.errors import ConfigError
from seppo_fast.utils.torch_modes import deterministic
from tests.helpers.runs import log_of, tiny_config


def settings():
    return {
        "strict": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "filled": torch.utils.deterministic.fill_uninitialized_memory,
        "cudnn": torch.backends.cudnn.deterministic,
        "chosen by timing": torch.backends.cudnn.benchmark,
        "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


RIGHT = {"strict": True, "warn_only": False, "filled": False, "cudnn": True, "chosen by timing": False}


def test_everything_is_set_inside_the_block_and_given_back_after_it():
    before = settings()
    with deterministic(False):
        assert settings() == before
    with deterministic(True):
        assert settings() == RIGHT | {"cublas": ":4096:8"}
    assert settings() == before


def test_what_the_user_set_of_cublas_stands(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic(True):
        assert settings() == RIGHT | {"cublas": ":16:8"}
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_an_operation_without_a_deterministic_algorithm_is_named_and_all_is_given_back():
    before, values = settings(), torch.zeros(3)
    with pytest.raises(ConfigError, match="model.deterministic = true: .*put_ does not have a deterministic"):  # noqa: SIM117
        with deterministic(True):
            values.put_(torch.tensor([0]), torch.ones(1), accumulate=False)
    assert settings() == before
    with pytest.raises(RuntimeError, match="something else"), deterministic(True):
        raise RuntimeError("something else")


def test_a_run_is_deterministic_where_it_is_requested_and_computes_the_same(tiny, tmp_path):
    seen = {}

    def observe(trainer, updates):
        seen[trainer.config.model.deterministic] = settings()

    before, logs = settings(), []
    for requested in (False, True):
        config = tiny_config(tiny, tmp_path / str(requested), model={"deterministic": requested})
        train(config, observe)
        logs.append([entry["loss"] for entry in log_of(config)])
    assert seen == {False: before, True: RIGHT | {"cublas": ":4096:8"}}
    assert settings() == before
    assert logs[0] == logs[1]


def test_xformers_is_refused(tiny, tmp_path):
    tree = tiny_config(tiny, tmp_path).model_dump(mode="json")
    tree["model"] |= {"deterministic": True, "attention": "xformers"}
    with pytest.raises(ConfigError, match="model.deterministic = true needs model.attention = sdpa"):
        parse_config(tree)
