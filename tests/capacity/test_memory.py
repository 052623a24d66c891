"""Counted memory against what a profiler sees at the allocator, and free memory computed from fake cgroups."""

import functools
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.resnet import Downsample2D, Upsample2D
from peft import LoraConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import seppo_fast.utils.memory as memory
from seppo_fast.capacity.footprint import Footprint, sampling_footprint, training_footprint
from seppo_fast.models.fake import follow_cuda
from seppo_fast.utils.memory import free_bytes
from tests.helpers.calls import denoise_unet, inputs_of
from tests.helpers.tiny import tiny_unet
from tests.helpers.tracing import traced_peak

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LATENT, PROMPT = (4, 16, 16), (7, 16)
INPUTS = inputs_of(LATENT, PROMPT)
FP32, BF16 = torch.float32, torch.bfloat16

native_bf16 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"),
    reason="bfloat16 convolutions on this CPU unfold their inputs into scratch space",
)


def with_lora(unet, dtype):
    unet.requires_grad_(False)
    for parameter in unet.parameters():
        parameter.data = parameter.data.to(dtype)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for parameter in unet.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    return unet


def unet_of(kind, dtype):
    unet = tiny_unet()
    if "lora" in kind:
        unet = with_lora(unet, dtype)
    if "channels_last" in kind:
        unet.to(memory_format=torch.channels_last)
    if "checkpointing" in kind:
        unet.enable_gradient_checkpointing()
    return unet


@functools.cache
def counted_training(kind, dtype):
    return training_footprint(unet_of(kind, dtype), denoise_unet, INPUTS, dtype, CPU)


def allocated_at_peak(call, folder):
    """Returns `traced_peak` of a second call; the first call allocates what stays: gradients and caches."""
    call()
    return traced_peak(call, folder)


def autocast(dtype):
    return torch.autocast("cpu", dtype, enabled=dtype != FP32)


def assert_counts(footprint, rows, real):
    """Asserts that a count is at most 2 % too low and 8 % too high; between 1 and 256 rows its line is above the peaks.

    Real kernels also use scratch space per thread, and checkpointing stores the state of the random generator, 5 kB per
    block (a few bytes on CUDA).
    """
    scratch = 2**17 * torch.get_num_threads()
    assert 0.98 * real - scratch < footprint.fixed + rows * footprint.per_row < 1.08 * real


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("full", FP32),
        ("full channels_last", FP32),
        pytest.param("full channels_last", BF16, marks=native_bf16),
        ("full checkpointing", FP32),
        pytest.param("lora checkpointing", BF16, marks=native_bf16),
    ],
)
def test_training_takes_what_is_counted(tmp_path, kind, dtype):
    unet = unet_of(kind, dtype)
    gradients = sum(4 * parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)

    def train(rows):
        latents, target = torch.randn(2, 2 * rows, *LATENT).unbind()
        embeds = torch.randn(2 * rows, *PROMPT)
        with autocast(dtype):
            prediction = unet(latents, torch.arange(2 * rows), encoder_hidden_states=embeds).sample
        (prediction.float() - target).square().mean().backward()

    for rows in (1, 4):
        real = allocated_at_peak(lambda rows=rows: train(rows), tmp_path)
        assert_counts(counted_training(kind, dtype), rows, real + gradients)


@pytest.mark.parametrize(
    ("guided", "dtype"),
    [
        (True, FP32),
        (False, FP32),
        pytest.param(True, BF16, marks=native_bf16),
        pytest.param(False, BF16, marks=native_bf16),
    ],
)
def test_sampling_takes_what_is_counted(tmp_path, guided, dtype):
    unet = tiny_unet()
    footprint = sampling_footprint(unet, denoise_unet, INPUTS, dtype, CPU, guided)

    def sample(rows):
        latents, timesteps, embeds = torch.randn(rows, *LATENT), torch.arange(rows), torch.randn(rows, *PROMPT)
        with torch.no_grad(), autocast(dtype):
            if guided:
                latents, timesteps, embeds = latents.repeat(2, 1, 1, 1), timesteps.repeat(2), embeds.repeat(2, 1, 1)
            unet(latents, timesteps, encoder_hidden_states=embeds)

    for rows in (4, 32):
        assert_counts(footprint, rows, allocated_at_peak(lambda rows=rows: sample(rows), tmp_path))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("kind", ["full channels_last", "lora", "lora checkpointing"])
def test_training_on_a_gpu_takes_what_is_counted(kind, dtype):
    """Within a fifth: blocks are rounded up, and convolutions may take scratch space."""
    unet, rows = unet_of(kind, dtype).to(CUDA), 64
    footprint = training_footprint(unet, denoise_unet, inputs_of((4, 32, 32), PROMPT), dtype, CUDA)

    def train():
        latents, target = torch.randn(2, 2 * rows, 4, 32, 32, device=CUDA).unbind()
        embeds = torch.randn(2 * rows, *PROMPT, device=CUDA)
        with torch.autocast("cuda", BF16, enabled=dtype != FP32):
            prediction = unet(latents, torch.arange(2 * rows, device=CUDA), encoder_hidden_states=embeds).sample
        (prediction.float() - target).square().mean().backward()

    train()
    start = torch.cuda.memory_allocated()  # includes the gradients
    torch.cuda.reset_peak_memory_stats()
    train()
    gradients = sum(4 * parameter.numel() for parameter in unet.parameters() if parameter.requires_grad)
    real = torch.cuda.max_memory_allocated() - start + gradients
    assert footprint.fixed + rows * footprint.per_row == pytest.approx(real, rel=0.2)


def test_rows_grow_with_pixels_not_with_their_square():
    """Attention is counted as a fused kernel; as an N x N matrix the factor would be well above 4."""
    unet = tiny_unet()
    small, large = (
        sampling_footprint(unet, denoise_unet, inputs_of((4, side, side), PROMPT), BF16, CUDA, False).per_row
        for side in (32, 64)
    )
    assert large / small == pytest.approx(4, rel=0.02)
    trained = training_footprint(unet, denoise_unet, inputs_of((4, 32, 32), PROMPT), FP32, CPU).per_row
    assert trained / counted_training("full", FP32).per_row == pytest.approx(4, rel=0.02)


def test_checkpointing_lowers_a_row_and_a_lora_the_fixed_part():
    full = counted_training("full", FP32)
    assert counted_training("full checkpointing", FP32).per_row < 0.6 * full.per_row
    assert counted_training("lora checkpointing", BF16).fixed < 0.2 * full.fixed


def test_the_unet_is_left_as_it_was():
    unet = unet_of("lora channels_last checkpointing", BF16)
    before = {name: (p, p.data_ptr(), p._version, p.stride(), p.requires_grad) for name, p in unet.named_parameters()}
    weights = {name: weight.clone() for name, weight in unet.state_dict().items()}
    processors = unet.attn_processors
    random = torch.get_rng_state()
    training_footprint(unet, denoise_unet, INPUTS, BF16, CUDA)
    sampling_footprint(unet, denoise_unet, INPUTS, BF16, CUDA, True)
    assert torch.equal(torch.get_rng_state(), random)
    for name, p in unet.named_parameters():
        assert before[name] == (p, p.data_ptr(), p._version, p.stride(), p.requires_grad)
        assert p.grad is None
    assert all(torch.equal(weight, weights[name]) for name, weight in unet.state_dict().items())
    assert unet.attn_processors == processors
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in unet.modules())
    assert unet.is_gradient_checkpointing


class Recorder(TorchDispatchMode):
    """Records every operation with the dtypes and shapes of its results."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            dtypes = [(leaf.dtype, leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.seen.append((str(func), dtypes))
        return result


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.GroupNorm(4, 16), (2, 16, 8, 8)),
        (lambda: nn.LayerNorm(16), (2, 5, 16)),
        (lambda: Upsample2D(16, use_conv=True), (2, 16, 8, 8)),
        (lambda: Downsample2D(16, use_conv=True), (2, 16, 8, 8)),
    ],
    ids=["group norm", "layer norm", "up", "down"],
)
def test_autocast_follows_the_rules_of_cuda(make, shape):
    """Compares with torch's own autocast for CUDA, on fake tensors whose device is a GPU."""
    seen = {}
    for device in ("cpu", "cuda"):
        with FakeTensorMode(), torch.no_grad():
            module = make()
            for parent in module.modules():
                for name, weight in list(parent.named_parameters(recurse=False)):
                    setattr(parent, name, nn.Parameter(torch.empty(weight.shape, device=device), requires_grad=False))
            x = torch.empty(shape, device=device, dtype=BF16)
            if device == "cpu":
                follow_cuda(module)
            # torch.autocast("cuda") disables itself without a GPU.
            torch.set_autocast_dtype(device, BF16)
            torch.set_autocast_enabled(device, True)
            try:
                with Recorder() as recorder:
                    module(x)
            finally:
                torch.set_autocast_enabled(device, False)
                torch.clear_autocast_cache()
            seen[device] = recorder.seen
    assert seen["cpu"] == seen["cuda"]
    assert len(seen["cuda"]) > 1


@pytest.mark.parametrize(
    ("budget", "cap", "rows"),
    [
        (109, 64, 0), (110, 64, 1), (139, 64, 2), (140, 64, 4), (179, 64, 4), (180, 64, 8), (10**9, 64, 64),
        (10**9, 63, 32), (10**9, 1, 1), (10**9, 0, 0), (0, 64, 0), (-5, 64, 0),
    ],
)  # fmt: skip
def test_largest_is_a_power_of_two_that_fits(budget, cap, rows):
    assert Footprint(fixed=100, per_row=10).largest(budget, cap) == rows


@pytest.fixture
def ram(monkeypatch):
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=10_000))
    return 10_000


def cgroup_files(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def own_cgroup(folder, *lines):
    (folder / "cgroup").write_text("".join(f"{line}\n" for line in lines))
    return folder / "cgroup"


STAT = "anon 1000\ninactive_file 300\nactive_file 5"


def test_free_bytes_in_a_cgroup_v2(tmp_path, ram):
    cgroup_files(tmp_path / "job", memory__max=5000, memory__current=2000, memory__stat=STAT)
    assert free_bytes(CPU, own_cgroup(tmp_path, "0::/job"), tmp_path) == 5000 - 2000 + 300


def test_free_bytes_where_the_outer_cgroup_is_tighter(tmp_path, ram):
    cgroup_files(tmp_path / "outer" / "job", memory__max=5000, memory__current=2000, memory__stat=STAT)
    cgroup_files(tmp_path / "outer", memory__max=6000, memory__current=5500, memory__stat=STAT)
    assert free_bytes(CPU, own_cgroup(tmp_path, "0::/outer/job"), tmp_path) == 6000 - 5500 + 300


def test_free_bytes_without_a_limit(tmp_path, ram):
    cgroup_files(tmp_path / "job", memory__max="max", memory__current=2000, memory__stat=STAT)
    assert free_bytes(CPU, own_cgroup(tmp_path, "0::/job"), tmp_path) == ram


def test_free_bytes_in_a_cgroup_v1(tmp_path, ram):
    stat = "inactive_file 0\ntotal_inactive_file 300"
    limit, use = "memory__limit_in_bytes", "memory__usage_in_bytes"
    cgroup_files(tmp_path / "memory", **{limit: 2**63 - 4096, use: 9000, "memory__stat": stat})
    own = own_cgroup(tmp_path, "9:cpu,cpuacct:/a", "4:memory:/a/b", "0::/")
    assert free_bytes(CPU, own, tmp_path) == ram
    cgroup_files(tmp_path / "memory" / "a" / "b", **{limit: 4000, use: 1000, "memory__stat": stat})
    assert free_bytes(CPU, own, tmp_path) == 4000 - 1000 + 300


def test_free_bytes_in_a_container_that_hides_its_path(tmp_path, ram):
    cgroup_files(tmp_path, memory__max=7000, memory__current=1000, memory__stat=STAT)
    assert free_bytes(CPU, own_cgroup(tmp_path, "0::/not/here"), tmp_path) == 7000 - 1000 + 300


def test_free_bytes_beyond_the_limit_is_nothing(tmp_path, ram):
    cgroup_files(tmp_path, memory__max=700, memory__current=1100, memory__stat=STAT)
    assert free_bytes(CPU, own_cgroup(tmp_path, "0::/"), tmp_path) == 0


def test_free_bytes_where_there_are_no_cgroups(tmp_path, ram):
    assert free_bytes(CPU, tmp_path / "missing", tmp_path) == ram


def test_free_bytes_of_this_machine():
    assert 0 < free_bytes(CPU) <= memory.psutil.virtual_memory().total


def test_free_bytes_on_cuda_include_what_the_allocator_holds_unused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert free_bytes(CUDA) == 1200


class Runtime:
    """A fake CUDA runtime in which a refused registration also makes the next launch fail."""

    def __init__(self, code):
        self.code, self.error = code, 0

    def cudaHostRegister(self, place, size, flags):
        self.error = self.code
        return self.code

    def launch(self, value):
        error, self.error = self.error, 0
        if error:
            raise RuntimeError("CUDA error: out of memory")


def test_memory_that_is_not_pinned_leaves_no_error_to_the_next_kernel(monkeypatch):
    runtime = Runtime(2)

    def check_error(code):
        raise RuntimeError(f"cuda runtime error ({code})")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", check_error)
    monkeypatch.setattr(torch, "empty", lambda size, device: SimpleNamespace(fill_=runtime.launch))
    with pytest.raises(RuntimeError, match=r"error \(2\)"):
        memory.page_locked(memory.host_bytes(4096))
    runtime.launch(0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_memory_that_is_not_pinned_leaves_no_error_to_the_next_kernel():
    host = memory.host_bytes(4096)
    pinned = memory.page_locked(host)
    with pytest.raises(RuntimeError):
        memory.page_locked(host)  # registered already
    assert float(torch.ones(3, device="cuda").sum()) == 3
    assert pinned.nbytes == 4096
