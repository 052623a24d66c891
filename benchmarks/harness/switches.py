"""What the suite `cache` compares: the ways in which a module becomes another past policy, and if they are right."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.harness.counters import SD15
from benchmarks.harness.measure import Machine
from benchmarks.harness.models import second
from seppo_fast import shapes
from seppo_fast.config.schema import ModelConfig
from seppo_fast.models.trainable import DTYPES, make_trainable
from seppo_fast.models.unet import UNetFamily
from seppo_fast.references import ReferencePool
from seppo_fast.references.layout import PackedLayout, trainable_state_dict
from seppo_fast.references.storage import Tier
from seppo_fast.references.tiers import Budget

COPY = "plain copy"
LOAD, READ = "load_state_dict", "load_state_dict, from a file"
SWITCH, IN_PLACE = "switch", "switch, in place"
ALONE, AHEAD = "no switch", "switch, prefetched"


class Subject:
    """A policy, a second module for its past selves, and random weights for both.

    Args:
        machine: where; on a GPU they are SD-1.5's UNet.
        train: `full` or `lora`.
        precision: of the computation.
        pairs: of a training step; halved until one fits into memory.

    Attributes:
        policy: float32 where it is trained.
        reference: the second module; of a LoRA it shares the frozen weights.
        table: of a checkpoint.
        nbytes: of its tensors in float32.
    """

    def __init__(self, machine: Machine, train: str, precision: str, pairs: int) -> None:
        torch.manual_seed(0)
        if machine.device.type == "cuda":
            with machine.device:
                unet = UNet2DConditionModel(**SD15)
        else:
            unet = UNet2DConditionModel.from_pretrained(shapes.PIPELINE, subfolder="unet")
        make_trainable(unet, ModelConfig(train=train, precision=precision), 0, UNetFamily)
        self.name = f"{train} {precision}"
        self.machine = machine
        self.compute = DTYPES[precision]
        self.policy = unet.to(machine.device, memory_format=torch.channels_last)
        self.reference = second(unet)
        self.table = PackedLayout.of(unet, self.compute)
        self.nbytes = sum(tensor.nbytes for tensor in trainable_state_dict(unet).values())
        self.pairs = pairs
        self._inputs = self._random_inputs()
        while not self._fits():
            self.pairs //= 2
            print(f"{self.name}: more than {self.pairs} pairs a step do not fit into memory")
            self._inputs = self._random_inputs()

    def weights(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Names and float32 tensors of checkpoint `index`, a function of it; sized as an initialisation sizes them."""
        generator = torch.Generator(self.machine.device).manual_seed(index)
        for name, tensor in trainable_state_dict(self.policy).items():
            drawn = torch.randn(tensor.shape, generator=generator, device=tensor.device)
            yield name, drawn * math.sqrt(len(tensor) / tensor.numel())

    @torch.no_grad()
    def become(self, index: int) -> None:
        """The policy is checkpoint `index`."""
        own = trainable_state_dict(self.policy)
        for name, tensor in self.weights(index):
            own[name].copy_(tensor)

    def holds(self, module: nn.Module, index: int) -> bool:
        """Whether a module is checkpoint `index`, bit for bit in the dtypes that its tensors have."""
        own = trainable_state_dict(module)
        return all(torch.equal(own[name], tensor.to(own[name].dtype)) for name, tensor in self.weights(index))

    def prediction(self, index: int) -> Tensor:
        """What checkpoint `index` predicts of two latents; the policy is it from now on."""
        self.become(index)
        return self._predicted(self.policy)

    def is_right(self, way: str, module: nn.Module, index: int, prediction: Tensor) -> bool:
        """Whether a module is checkpoint `index` and predicts so, bit for bit; where not, a line says what differs."""
        same = {
            "tensors": self.holds(module, index),
            "predictions": torch.equal(self._predicted(module), prediction),
        }
        wrong = [what for what, right in same.items() if not right]
        if wrong:
            print(f"{self.name}, {way}: {' and '.join(wrong)} are not those of checkpoint {index}")
        return not wrong

    def step(self) -> None:
        """The policy's forward and backward; its weights stay."""
        *inputs, grad = self._inputs
        self._predict(self.policy, *inputs).backward(grad)
        self.policy.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _predicted(self, module: nn.Module) -> Tensor:
        return self._predict(module, *(part[:2] for part in self._inputs[:3]))

    def _predict(self, module: nn.Module, latents: Tensor, timesteps: Tensor, embeds: Tensor) -> Tensor:
        with torch.autocast(self.machine.device.type, self.compute, enabled=self.compute != torch.float32):
            return module(latents, timesteps, encoder_hidden_states=embeds, return_dict=False)[0]

    def _random_inputs(self) -> tuple[Tensor, ...]:
        """Latents, timesteps, embeddings and the gradient of the prediction."""
        config, device, rows = self.policy.config, self.machine.device, 2 * self.pairs
        shape = rows, config.in_channels, config.sample_size, config.sample_size
        latents, grad = (torch.randn(shape, device=device) for _ in range(2))
        embeds = torch.randn(rows, 77, config.cross_attention_dim, device=device)
        return latents, torch.randint(1000, (rows,), device=device), embeds, grad.to(self.compute)

    def _fits(self) -> bool:
        try:
            self.step()
        except torch.OutOfMemoryError:
            if self.pairs == 1:
                raise
            return False
        return True


class StateDicts:
    """The baselines: checkpoints as a user keeps them, in host memory and in files, float32.

    Args:
        subject: whose.
        count: how many; they take turns.
        folder: of the files.

    Attributes:
        right: whether each way gives what was kept.
    """

    def __init__(self, subject: Subject, count: int, folder: Path) -> None:
        self._module = subject.policy
        states, files = [], []
        for index in range(count):
            subject.become(index)
            live = trainable_state_dict(self._module).items()
            states.append({name: tensor.detach().to("cpu", copy=True) for name, tensor in live})
            files.append(folder / f"{index}.safetensors")
            save_file({name: tensor.contiguous() for name, tensor in states[-1].items()}, files[-1])
        self._states, self._files = itertools.cycle(states), itertools.cycle(files)
        self.right = {}
        for way, load in ((LOAD, self.load), (READ, self.read)):
            prediction = subject.prediction(0)
            subject.become(count)
            load()  # the first of them
            self.right[way] = subject.is_right(way, self._module, 0, prediction)

    def load(self) -> None:
        """The next one from host memory."""
        self._module.load_state_dict(next(self._states), strict=False)  # a LoRA's frozen weights are not in it

    def read(self) -> None:
        """The next one from a file."""
        self._module.load_state_dict(load_file(next(self._files)), strict=False)


class Kept:
    """A pool whose checkpoints are all in one tier, and the module that becomes one after another.

    Args:
        subject: whose past selves they are.
        tier: where they are.
        room: for how many.
        folder: for files.

    Attributes:
        pool: open until it is closed.
        index: of the checkpoint that was asked for last.
        host_bytes: by which this process's own memory has grown.
    """

    def __init__(self, subject: Subject, tier: Tier, room: int, folder: Path) -> None:
        budget = replace(Budget(device=0, host=0, disk=0), **{tier: room * subject.table.size})
        self.pool = ReferencePool(0, compute=subject.compute, budget=budget, folder=folder)
        self.index = 0
        self.host_bytes = 0
        self._subject = subject
        self._tier = tier

    def grow(self, count: int) -> None:
        """More checkpoints, up to `count`."""
        gc.collect()  # what is freed in between would be missing from the growth
        for index in range(len(self.pool), count):
            self._subject.become(index)
            before = host_memory()
            self.pool.add(self._subject.policy)
            self.host_bytes += host_memory() - before
        assert set(self.pool.tiers.values()) == {self._tier}
        self.pool.bind(self._subject.reference)

    def switch(self) -> None:
        """The bound module becomes the next checkpoint, which it never is already."""
        self.pool.load_into(self._subject.reference, self._following())

    def switch_in_place(self) -> None:
        """The policy becomes the next checkpoint, and itself again."""
        with self.pool.resident(self._subject.policy, self._following()):
            pass

    def prefetch(self) -> None:
        """The next checkpoint starts to come up."""
        self.pool.prefetch((self.index + 1) % len(self.pool))

    def are_right(self) -> dict[str, bool]:
        """Whether the next switch of each kind is right, and leaves the policy alone."""
        subject, right = self._subject, {}
        prediction = subject.prediction((self.index + 1) % len(self.pool))
        self.switch()
        right[SWITCH] = subject.is_right(SWITCH, subject.reference, self.index, prediction)
        before, after = self.index, self._following()
        prediction = subject.prediction(after)
        subject.become(before)
        with self.pool.resident(subject.policy, after) as reference:
            placed = subject.is_right(IN_PLACE, reference, after, prediction)
        right[IN_PLACE] = placed and subject.holds(subject.policy, before)
        return right

    def _following(self) -> int:
        self.index = (self.index + 1) % len(self.pool)
        return self.index


def host_memory() -> int:
    """Bytes of this process's own memory, private and shared, that are there; the system's cache of files is not."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":") for line in lines)
    return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))
