"""A run computes the same whichever torch mode its caller has entered."""

import contextlib

import pytest
import torch

from seppo_fast.train import train
from seppo_fast.utils.torch_modes import outside_modes
from tests.helpers.runs import tiny_config, weights_of


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "default dtype": lambda: default_dtype(torch.bfloat16),
}


def weights_within(mode, kind, tiny, folder):
    seen = {}
    config = tiny_config(tiny, folder, model={"precision": "bf16", "train": kind}, sampler={"steps": 1})
    with mode:
        train(config, lambda trainer, _: seen.update(weights_of(trainer)))
    return seen


@pytest.fixture(scope="module")
def plain(tiny, tmp_path_factory):
    """Weights of runs outside any torch mode, by `model.train`."""
    folder, mode = tmp_path_factory.mktemp("plain"), contextlib.nullcontext
    return {kind: weights_within(mode(), kind, tiny, folder / kind) for kind in ("full", "lora")}


@pytest.mark.parametrize(("mode", "kind"), [("autocast", "full"), *((mode, "lora") for mode in MODES)])
def test_a_callers_modes_change_nothing(tiny, tmp_path, plain, mode, kind):
    """Without isolation, training would reuse casts that sampling or the previous update left in autocast's cache."""
    found = weights_within(MODES[mode](), kind, tiny, tmp_path)
    assert all(torch.equal(weight, found[name]) for name, weight in plain[kind].items())


def test_a_callers_modes_are_there_again():
    one = torch.ones(1, 1)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), default_dtype(torch.float64):
        with outside_modes():
            assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
            assert torch.get_default_dtype() == torch.float32 and torch.mm(one, one).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float64 and torch.mm(one, one).dtype == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
