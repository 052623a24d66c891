"""The slab on the device: switches, prefetching, and predictions from it."""

import threading
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn

import seppo_fast.references.resident as resident
from seppo_fast.references import ReferencePool
from seppo_fast.references.layout import PackedLayout, trainable_state_dict
from seppo_fast.references.tiers import Budget
from tests.helpers.pools import KEPT, Copies, Odd, bits, contents, filled, same, scrambled
from tests.helpers.tiny import tiny_unet

SLAB = PackedLayout.of(Odd()).size
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Inline:
    """Replaces the reading thread: reads at once, in this thread, where copies are counted."""

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future

    def shutdown(self, **_):
        pass


@pytest.fixture
def counted(monkeypatch, tmp_path):
    """A pool on disk whose every copy can be counted, a module bound to it, and each checkpoint's tensors."""
    monkeypatch.setattr(resident, "reading_thread", lambda device: Inline())
    pool, expected = filled(4, budget=Budget(host=0), folder=tmp_path)
    module = Odd()
    pool.bind(module)
    yield pool, module, expected
    pool.close()


@pytest.mark.parametrize("host", [0, 9])
def test_a_switch_is_one_copy_and_none_where_it_is_that_already(tmp_path, host):
    pool, expected = filled(3, budget=Budget(host=host * SLAB), folder=tmp_path)
    bound, policy = Odd(), Odd()
    pool.bind(bound)
    own = scrambled(policy, 50)
    for index, copies in ((0, 1), (0, 0), (2, 1), (1, 1), (1, 0)):
        with Copies() as counted:
            pool.load_into(bound, index)
        assert len(counted.made) == copies
        assert same(bound, expected[index])
        with Copies() as counted, pool.resident(policy, index):
            pass
        assert counted.made == []
        assert same(policy, own)
    with Copies() as counted, pool.resident(policy, 0):
        pass
    assert len(counted.made) == 1
    pool.close()


def test_addresses_never_change(counted):
    pool, module, expected = counted
    places = {name: tensor.data_ptr() for name, tensor in trainable_state_dict(module).items()}
    for index in (3, 0, 2, 1):
        pool.prefetch(index)
        pool.load_into(module, index)
        assert {name: tensor.data_ptr() for name, tensor in trainable_state_dict(module).items()} == places
        assert same(module, expected[index])


def test_a_prefetched_checkpoint_is_read_once_and_is_what_is_switched_to(counted):
    pool, module, expected = counted
    stored = pool._tiers.stored[2].slab
    slot = pool._resident()
    with Copies() as copies:
        pool.prefetch(2)
        pool.prefetch(2)
    assert [source for _, source in copies.made] == [stored.data_ptr()]
    ahead = copies.made[0][0]
    with Copies() as copies:
        pool.load_into(module, 2)
    assert copies.made == [(slot._slab.data_ptr(), ahead)]
    assert same(module, expected[2])
    with Copies() as copies:
        pool.prefetch(2)  # it is resident already
    assert copies.made == []


def test_a_wrong_prefetch_is_harmless(counted):
    pool, module, expected = counted
    slab = pool._resident()._slab.data_ptr()
    pool.load_into(module, 0)
    for guess, index in ((1, 2), (1, 3), (2, 1), (3, 3), (0, 2)):
        pool.prefetch(guess)
        with Copies() as copies:
            pool.load_into(module, index)
        assert [target for target, _ in copies.made] == [slab]
        assert same(module, expected[index])


def test_a_prefetch_of_what_is_not_there_does_nothing(counted):
    pool, module, expected = counted
    with Copies() as copies:
        pool.prefetch(4)
        pool.prefetch(-1)
        ReferencePool(0).prefetch(0)
    assert copies.made == []
    pool.load_into(module, 3)
    assert same(module, expected[3])


def test_a_prefetch_from_host_memory_on_a_cpu_takes_no_second_slab():
    pool, _ = filled(2)
    with Copies() as copies:
        pool.prefetch(1)
    assert copies.made == [] and pool._resident()._ahead is None


def test_a_prefetch_without_memory_for_a_second_slab_warns_and_the_switch_goes_its_own_way(counted, monkeypatch):
    pool, module, expected = counted
    pool.load_into(module, 0)

    def refuse(like):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.60 GiB")

    monkeypatch.setattr(torch, "empty_like", refuse)
    with pytest.warns(RuntimeWarning, match="no memory for a second past policy"):
        pool.prefetch(2)
    pool.load_into(module, 2)
    assert same(module, expected[2])
    monkeypatch.undo()
    pool.prefetch(1)  # memory is free again
    with Copies() as copies:
        pool.load_into(module, 1)
    assert copies.made == [(pool._resident()._slab.data_ptr(), pool._resident()._ahead.data_ptr())]
    assert same(module, expected[1])


def test_another_failure_than_of_memory_is_not_taken_for_one(counted, monkeypatch):
    pool, _, _ = counted

    def fail(like):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "empty_like", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        pool.prefetch(2)


def test_the_thread_that_reads_is_on_the_slabs_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((threading.get_ident(), device)))
    with resident.reading_thread(torch.device("cuda", 3)) as reader:
        thread = reader.submit(threading.get_ident).result()
    with resident.reading_thread(torch.device("cpu")) as reader:
        reader.submit(threading.get_ident).result()
    assert chosen == [(thread, torch.device("cuda", 3))]
    assert thread != threading.get_ident()


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_prefetches_and_switches_gives_the_right_bits(tmp_path, seed):
    """With the real reading thread."""
    rng = np.random.default_rng(seed)
    pool, expected = filled(5, budget=Budget(host=2 * SLAB), folder=tmp_path)
    with pool:
        module = Odd()
        pool.bind(module)
        for _ in range(100):
            for _ in range(rng.integers(4)):
                pool.prefetch(int(rng.integers(6)))
            index = int(rng.integers(5))
            pool.load_into(module, index)
            assert same(module, expected[index])
        pool.prefetch(0)  # close() waits for it


def unet_of(kind):
    """Returns a tiny UNet whose zero-initialised weights are not zero."""
    unet = tiny_unet()
    if kind == "lora":
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=3, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    if kind == "channels_last":
        unet.to(memory_format=torch.channels_last)
    return unet


def nudged(module, seed):
    """Adds random values to every trained parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))


def predictions(unet, compute):
    """Returns predictions with and without autograd, whose kernels may differ."""
    device = next(unet.parameters()).device
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator).to(device)
    embeds = torch.randn(2, 5, 16, generator=generator).to(device)
    made = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad), torch.autocast(device.type, compute, enabled=compute != torch.float32):
            made.append(unet(latents, torch.tensor([7, 900], device=device), encoder_hidden_states=embeds).sample)
    return [bits(prediction) for prediction in made]


def check_predictions(kind, compute, device):
    unet, pool = unet_of(kind).to(device), ReferencePool(0, compute=compute)
    expected = []
    for seed in range(3):
        nudged(unet, seed)
        expected.append(predictions(unet, compute))
        pool.add(unet)
    assert len({made[0] for made in expected}) == 3
    stored = {name: view.dtype for name, view in pool._tiers.layout.views(pool._tiers.stored[0].slab).items()}
    for index in (1, 0, 2):
        with pool.resident(unet, index) as reference:
            assert predictions(reference, compute) == expected[index]
        unbound = unet_of(kind).to(device)
        unbound.load_state_dict(unet.state_dict())
        pool.load_into(unbound, index)
        assert predictions(unbound, compute) == expected[index]
    assert predictions(unet, compute) == expected[2]
    pool.close()
    return stored


@pytest.mark.parametrize("kind", ["full", "channels_last", "lora"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_unet_predicts_the_same_from_the_pool_bit_for_bit(kind, compute):
    stored = check_predictions(kind, compute, "cpu")
    norms = {name for name in stored if "norm" in name}
    assert all(stored[name] == torch.float32 for name in norms)
    assert all(dtype == compute for name, dtype in stored.items() if name not in norms)
    assert bool(norms) == (kind != "lora")


class Language(nn.Module):
    """Layers only some of which autocast casts: a head tied to an embedding, norms, a weight computed from others."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.layer_norm, self.batch_norm = nn.LayerNorm(6), nn.BatchNorm1d(6)
        self.up, self.down = nn.ConvTranspose1d(6, 6, 3, stride=2), nn.Conv1d(6, 6, 3, stride=2)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.group_norm = nn.GroupNorm(2, 6)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.layer_norm(self.embedding(tokens)).transpose(1, 2)
        x = self.group_norm(self.down(self.batch_norm(self.up(x)))).transpose(1, 2)
        return self.head(self.normed(x + self.attention(x, x, x)[0]))


def test_layers_of_all_kinds_predict_the_same_under_autocast():
    torch.manual_seed(0)
    module, tokens, expected = Language().eval(), torch.randint(11, (3, 7)), []
    with ReferencePool(0, compute=torch.bfloat16) as pool, torch.no_grad():
        for seed in range(2):
            nudged(module, seed)
            with torch.autocast("cpu", torch.bfloat16):
                expected.append(bits(module(tokens)))
            pool.add(module)
        dtypes = {slot.name: slot.dtype for slot in pool._tiers.layout.slots}
        assert {name for name, dtype in dtypes.items() if dtype == "bfloat16"} == {
            "up.weight", "up.bias", "down.weight", "down.bias", "head.bias",
        }  # fmt: skip
        for index in (0, 1):
            with pool.resident(module, index), torch.autocast("cpu", torch.bfloat16):
                assert bits(module(tokens)) == expected[index]


@needs_gpu
@pytest.mark.parametrize("kind", ["full", "channels_last", "lora"])
@pytest.mark.parametrize("compute", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_a_unet_predicts_the_same_from_the_pool_bit_for_bit(kind, compute, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    check_predictions(kind, compute, "cuda")


@needs_gpu
@pytest.mark.parametrize("seed", range(3))
def test_on_a_gpu_a_captured_graph_computes_with_the_weights_of_each_switch(tmp_path, seed):
    """It is replayed right after each switch, whatever is prefetched on the other stream, from all three tiers."""
    torch.manual_seed(seed)
    module = nn.Linear(257, 129).cuda()
    slab, expected = PackedLayout.of(module).size, []
    budget = Budget(device=slab, host=2 * slab, disk=2 * slab)
    with ReferencePool(0, budget=budget, folder=tmp_path) as pool, torch.no_grad():
        for number in range(5):
            nudged(module, number)
            expected.append(bits(2 * module.weight))
            pool.add(module)
        pool.bind(module)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = 2 * module.weight
        for _ in range(60):
            pool.prefetch(int(torch.randint(6, ())))
            index = int(torch.randint(5, ()))
            pool.load_into(module, index)
            graph.replay()
            assert bits(y) == expected[index]


@needs_gpu
def test_on_a_gpu_the_policy_waits_aside_and_comes_back_bit_for_bit():
    module, source = Odd().cuda(), Odd()
    expected = scrambled(source, 0)
    module.load_state_dict(source.state_dict())
    with ReferencePool(0) as pool:
        pool.add(module)
        later = scrambled(source, 1)
        module.load_state_dict(source.state_dict())
        with pool.resident(module, 0, aside=torch.device("cpu")):
            assert same(module, expected, KEPT)
            assert all(tensor.is_cuda for tensor in contents(module).values())
        assert same(module, later, KEPT)
        assert all(tensor.is_cuda for tensor in contents(module).values())
