"""The loss's checks of its arguments and their messages, and what must be installed to use it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import seppo_fast._loss_arguments as loss_arguments
import seppo_fast.kernels.eager as eager
from seppo_fast.loss import denoising_errors, loss_and_grad, preference_loss

X, R = torch.zeros(4, 3, 5), torch.zeros(4)
GOOD = {"model_pred": X, "target": X, "ref_pred": X}
BAD = [
    ({"model_pred": torch.zeros(3, 3, 5)}, "model_pred", "even number.*3"),
    ({"model_pred": torch.zeros(0, 3, 5)}, "model_pred", r"\(0, 3, 5\)"),
    ({"model_pred": torch.zeros(4, 0)}, "model_pred", r"\(4, 0\)"),
    ({"model_pred": torch.zeros(4)}, "model_pred", r"\(4,\)"),
    ({"model_pred": X.long()}, "model_pred", "float32.*int64"),
    ({"model_pred": X.cfloat()}, "model_pred", "float32.*complex64"),
    ({"model_pred": None}, "model_pred", "expected a dense torch tensor, got NoneType"),
    ({"model_pred": X.to_sparse()}, "model_pred", "dense torch tensor.*sparse_coo"),
    ({"target": X.numpy()}, "target", "expected a dense torch tensor, got ndarray"),
    ({"ref_pred": [1.0]}, "ref_pred", "expected a dense torch tensor, got list"),
    ({"weights": 1.0}, "weights", "expected a dense torch tensor, got float"),
    ({"flipper": []}, "flipper", "unknown"),
    ({"beta": 10**400}, "beta", "finite"),
    ({"beta": 1e39}, "beta", "finite"),
    ({"target": torch.zeros(4, 3, 6)}, "target", r"\(4, 3, 5\).*\(4, 3, 6\)"),
    ({"target": torch.zeros(1, 3, 5)}, "target", r"\(1, 3, 5\)"),
    ({"target": torch.zeros(4, 15)}, "target", r"\(4, 15\)"),
    ({"target": X.int()}, "target", "int32"),
    ({"target": X.to("meta")}, "target", "cpu.*meta"),
    ({"ref_pred": torch.zeros(2, 3, 5)}, "ref_pred", r"\(2, 3, 5\)"),
    ({"ref_pred": X.bool()}, "ref_pred", "bool"),
    ({"ref_pred": X.to("meta")}, "ref_pred", "cpu.*meta"),
    ({"ref_pred": None}, "ref_pred, ref_error", "neither"),
    ({"ref_error": R}, "ref_pred, ref_error", "both"),
    ({"ref_pred": None, "ref_error": torch.zeros(2)}, "ref_error", r"\(4,\).*\(2,\)"),
    ({"ref_pred": None, "ref_error": R.half()}, "ref_error", "float32.*float16"),
    ({"ref_pred": None, "ref_error": R.to("meta")}, "ref_error", "cpu.*meta"),
    ({"beta": -1.0}, "beta", "-1.0"),
    ({"beta": math.inf}, "beta", "inf"),
    ({"beta": math.nan}, "beta", "nan"),
    ({"beta": "2000"}, "beta", "'2000'"),
    ({"beta": torch.tensor(1.0)}, "beta", "tensor"),
    ({"tie_tol": -1e-6}, "tie_tol", "-1e-06"),
    ({"tie_tol": math.nan}, "tie_tol", "nan"),
    ({"sft_weight": -0.5}, "sft_weight", "-0.5"),
    ({"sft_weight": math.inf}, "sft_weight", "inf"),
    ({"safeguard": 1.0}, "safeguard", r"\[0, 1\).*1.0"),
    ({"safeguard": -0.1}, "safeguard", "-0.1"),
    ({"safeguard": math.nan}, "safeguard", "nan"),
    ({"safeguard": "0.9"}, "safeguard", "'0.9'"),
    ({"flipper": "flip"}, "flipper", "'flip'.*adaptive, indicator, never"),
    ({"backend": "cuda"}, "backend", "'cuda'.*auto, triton, torch"),
    ({"weights": torch.zeros(4)}, "weights", r"\(2,\).*\(4,\)"),
    ({"weights": torch.zeros(2, 1)}, "weights", r"\(2, 1\)"),
    ({"weights": torch.zeros(2).int()}, "weights", "int32"),
]


@pytest.mark.parametrize(("change", "name", "says"), BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_arguments_are_named(change, name, says):
    with pytest.raises(ValueError, match=f"^{name}: .*{says}"):
        preference_loss(**{**GOOD, **change})


def test_bad_arguments_of_denoising_errors():
    for pred, target, name in (
        (X.int(), X, "pred"),
        (torch.zeros(0, 3), X, "pred"),
        (X, torch.zeros(3, 3, 5), "target"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            denoising_errors(pred, target)
    with pytest.raises(ValueError, match="^target: "):
        denoising_errors(torch.zeros(3, 5), torch.zeros(1, 5))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter takes CPU tensors")
def test_triton_refuses_cpu_tensors():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"^backend: .*TRITON_INTERPRET=1.*use 'torch', or 'auto'"):
        preference_loss(X, X, X, backend="triton")


def test_triton_missing(monkeypatch):
    monkeypatch.setattr(loss_arguments, "_HAS_TRITON", False)
    assert preference_loss(X, X, X).loss.item() == pytest.approx(math.log(2.0))
    with pytest.raises(ValueError, match="^backend: .*pip install 'triton>=3.6'"):
        preference_loss(X, X, X, backend="triton")


class _Gpus:
    """Fake GPUs of one kind; records the devices whose properties were requested."""

    def __init__(self):
        self.properties, self.asked = SimpleNamespace(major=7, minor=5, name="Tesla T4"), []

    def get_device_properties(self, device):
        self.asked.append(device)
        return self.properties


@pytest.fixture
def gpus(monkeypatch):
    pytest.importorskip("triton")
    made = _Gpus()
    monkeypatch.setattr(torch.cuda, "get_device_properties", made.get_device_properties)
    loss_arguments._kept_gpu_obstacle.cache_clear()
    yield made
    loss_arguments._kept_gpu_obstacle.cache_clear()


@pytest.mark.parametrize("major", [7, 8])
def test_gpus_that_are_too_old(major, gpus):
    gpus.properties.major = major
    device = torch.device("cuda", 0)
    if major == 8:
        assert loss_arguments.kernels_for("auto", device).__name__.endswith("preference")
        return
    assert loss_arguments.kernels_for("auto", device) is eager
    with pytest.raises(ValueError, match=r"^backend: .*8\.0 or newer, got 7\.5 \(Tesla T4\); use 'torch'"):
        loss_arguments.kernels_for("triton", device)


def test_torch_is_asked_once_for_each_gpu(gpus):
    first, second, current = torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cuda")
    for _ in range(3):
        for device in (first, second):
            assert loss_arguments.kernels_for("auto", device) is eager
    assert gpus.asked == [first, second]
    # Not cached for plain "cuda": another GPU may be the current one by now.
    assert loss_arguments.kernels_for("auto", current) is eager
    gpus.properties.major = 9
    assert loss_arguments.kernels_for("auto", current) is not eager


def test_compiled_step_asks_without_a_warning(gpus, recwarn):
    @torch.compile(fullgraph=True, backend="eager")
    def step(x):
        return x + (loss_arguments.kernels_for("auto", torch.device("cuda", 0)) is eager)

    torch._dynamo.reset()
    assert step(torch.zeros(1)).item() == 1.0
    torch._dynamo.reset()
    assert not [warning for warning in recwarn if "lru_cache" in str(warning.message)]


def test_import_needs_torch_alone():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import seppo_fast.loss\n"
        "assert not {'diffusers', 'transformers', 'pydantic', 'seppo_fast.train'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int64, np.uint8])
def test_numbers_of_numpy_are_numbers(kind):
    generator = torch.Generator().manual_seed(0)
    pred, ref_pred, target = (torch.randn(4, 3, 5, generator=generator) for _ in range(3))

    def results(beta, tie_tol, scale):
        options = {"beta": beta, "tie_tol": tie_tol, "backend": "torch"}
        lost, grad = loss_and_grad(pred, target, ref_pred, **options, grad_scale=scale)
        return [preference_loss(pred, target, ref_pred, **options).loss, lost.loss, grad]

    for ours, expected in zip(results(kind(50), kind(0), kind(2)), results(50.0, 0.0, 2.0), strict=True):
        assert torch.equal(ours, expected)
