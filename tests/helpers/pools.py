"""Helpers for tests of the reference pool: a module with every kind of tensor, comparisons, a counter of copies."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from seppo_fast.references import ReferencePool

KEPT = (
    "fp16", "bf16", "fp64", "complex", "transposed", "gappy", "empty", "hollow", "scalar", "embedding.weight",
    "head.bias", "conv.weight", "conv.bias", "norm.weight", "norm.bias", "mask", "steps", "bytes", "norm.running_mean",
    "norm.running_var", "norm.num_batches_tracked",
)  # fmt: skip


class Odd(nn.Module):
    """A module of odd sizes, many dtypes, tied and frozen weights, all memory layouts; a pool keeps its `KEPT`."""

    def __init__(self) -> None:
        super().__init__()
        self.fp16 = nn.Parameter(torch.zeros(7, dtype=torch.float16))
        self.bf16 = nn.Parameter(torch.zeros(2, 3, dtype=torch.bfloat16))
        self.fp64 = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.complex = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
        self.transposed = nn.Parameter(torch.zeros(3, 5).t())
        self.gappy = nn.Parameter(torch.zeros(4, 6)[:, ::2])
        self.empty = nn.Parameter(torch.zeros(5, 0))
        self.hollow = nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))
        self.scalar = nn.Parameter(torch.zeros(()))
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(5)
        self.register_buffer("mask", torch.zeros(3, dtype=torch.bool))
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("bytes", torch.zeros(1, 3, dtype=torch.uint8))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def scrambled(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """Fills all parameters and buffers with random bits, NaNs included; returns copies of them by name."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            high = 2 if tensor.dtype == torch.bool else 256
            noise = torch.randint(high, (tensor.nbytes,), dtype=torch.uint8, generator=generator)
            tensor.copy_(noise.view(tensor.dtype).view(tensor.shape))
    return contents(module)


def contents(module: nn.Module) -> dict[str, Tensor]:
    """Returns copies of all parameters and buffers by name."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def bits(tensor: Tensor) -> bytes:
    """Returns a tensor's dtype, shape and bits as bytes, to be compared."""
    dense = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return repr((tensor.dtype, tuple(tensor.shape))).encode() + dense.numpy().tobytes()


def same(module: nn.Module, expected: dict[str, Tensor], names: tuple[str, ...] = KEPT) -> bool:
    """Returns whether the module's tensors of these names equal the expected ones bit for bit."""
    found = contents(module)
    return all(bits(found[name]) == bits(expected[name]) for name in names)


def filled(checkpoints: int = 3, **settings) -> tuple[ReferencePool, dict[int, dict[str, Tensor]]]:
    """Returns a pool with these settings whose checkpoints hold random bits, and each one's expected tensors."""
    pool, module, expected = ReferencePool(0, **settings), Odd(), {}
    for seed in range(checkpoints):
        tensors = scrambled(module, seed)
        expected[pool.add(module)] = tensors
    return pool, expected


def assert_holds(pool: ReferencePool, expected: dict[int, dict[str, Tensor]]) -> None:
    """Asserts that every checkpoint that the pool keeps has the expected tensors."""
    module = Odd()
    for number in pool.tiers:
        scrambled(module, 99)
        pool.load_into(module, number)
        assert same(module, expected[number]), number


class Copies(TorchDispatchMode):
    """Records the copies that this thread makes, as `(target, source)` addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.made.append((args[0].data_ptr(), args[1].data_ptr()))
        return func(*args, **(kwargs or {}))
