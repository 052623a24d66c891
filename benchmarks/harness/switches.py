"""What suite `cache` compares: ways to switch a module to another past policy, with checks of their results."""

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
    """A policy, a second module for past policies, and random weights for both.

    Args:
        machine: the machine that it runs on; on a GPU the modules are SD-1.5's UNet, else the embedded pipeline's.
        train: `full` or `lora`.
        precision: the compute precision.
        pairs: pairs per training step; halved until a step fits into memory.

    Attributes:
        policy: the policy, with trained weights in float32.
        reference: the second module; with a LoRA it shares the policy's frozen weights.
        table: the layout of a checkpoint.
        nbytes: bytes of a checkpoint's tensors in float32.
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
            print(f"{self.name}: more than {self.pairs} pairs per step do not fit into memory")
            self._inputs = self._random_inputs()

    def weights(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Yields names and float32 tensors of checkpoint `index`: reproducibly random, scaled like initial weights."""
        generator = torch.Generator(self.machine.device).manual_seed(index)
        for name, tensor in trainable_state_dict(self.policy).items():
            drawn = torch.randn(tensor.shape, generator=generator, device=tensor.device)
            yield name, drawn * math.sqrt(len(tensor) / tensor.numel())

    @torch.no_grad()
    def become(self, index: int) -> None:
        """Turns the policy into checkpoint `index`."""
        own = trainable_state_dict(self.policy)
        for name, tensor in self.weights(index):
            own[name].copy_(tensor)

    def holds(self, module: nn.Module, index: int) -> bool:
        """Returns whether a module is checkpoint `index`, bit for bit in the dtypes of its tensors."""
        own = trainable_state_dict(module)
        return all(torch.equal(own[name], tensor.to(own[name].dtype)) for name, tensor in self.weights(index))

    def prediction(self, index: int) -> Tensor:
        """Turns the policy into checkpoint `index` and returns its prediction for two latents."""
        self.become(index)
        return self._predicted(self.policy)

    def is_right(self, way: str, module: nn.Module, index: int, prediction: Tensor) -> bool:
        """Returns whether a module is checkpoint `index` and predicts `prediction`, bit for bit; if not, prints why."""
        same = {
            "tensors": self.holds(module, index),
            "predictions": torch.equal(self._predicted(module), prediction),
        }
        wrong = [what for what, right in same.items() if not right]
        if wrong:
            print(f"{self.name}, {way}: {' and '.join(wrong)} are not those of checkpoint {index}")
        return not wrong

    def step(self) -> None:
        """Runs the policy's forward and backward; its weights do not change."""
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
        """Returns random latents, timesteps, embeddings and a gradient of the prediction."""
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
    """The baselines: checkpoints as a user would keep them, float32 state dicts in host memory and in files.

    Args:
        subject: the modules whose checkpoints they are.
        count: number of checkpoints to cycle through.
        folder: a folder for the files.

    Attributes:
        right: whether each way restores what was saved.
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
            load()  # loads checkpoint 0
            self.right[way] = subject.is_right(way, self._module, 0, prediction)

    def load(self) -> None:
        """Loads the next checkpoint from host memory."""
        self._module.load_state_dict(next(self._states), strict=False)  # a LoRA's checkpoint lacks the frozen weights

    def read(self) -> None:
        """Loads the next checkpoint from a file."""
        self._module.load_state_dict(load_file(next(self._files)), strict=False)


class Kept:
    """A pool whose checkpoints are all in one tier, and the module that switches between them.

    Args:
        subject: the modules whose checkpoints they are.
        tier: the tier that holds them.
        room: how many the tier may hold.
        folder: a folder for files.

    Attributes:
        pool: the pool, which the caller closes.
        index: number of the checkpoint that was used last.
        host_bytes: bytes by which the process's own memory grew while checkpoints were added.
    """

    def __init__(self, subject: Subject, tier: Tier, room: int, folder: Path) -> None:
        budget = replace(Budget(device=0, host=0, disk=0), **{tier: room * subject.table.size})
        self.pool = ReferencePool(0, compute=subject.compute, budget=budget, folder=folder)
        self.index = 0
        self.host_bytes = 0
        self._subject = subject
        self._tier = tier

    def grow(self, count: int) -> None:
        """Adds checkpoints until there are `count`."""
        gc.collect()  # memory freed while adding would reduce the measured growth
        for index in range(len(self.pool), count):
            self._subject.become(index)
            before = host_memory()
            self.pool.add(self._subject.policy)
            self.host_bytes += host_memory() - before
        assert set(self.pool.tiers.values()) == {self._tier}
        self.pool.bind(self._subject.reference)

    def switch(self) -> None:
        """Switches the bound module to the next checkpoint, which is never the current one."""
        self.pool.load_into(self._subject.reference, self._following())

    def switch_in_place(self) -> None:
        """Switches the policy to the next checkpoint and back."""
        with self.pool.resident(self._subject.policy, self._following()):
            pass

    def prefetch(self) -> None:
        """Starts to prefetch the next checkpoint."""
        self.pool.prefetch((self.index + 1) % len(self.pool))

    def are_right(self) -> dict[str, bool]:
        """Returns whether the next switch of each kind gives the right module, and leaves the policy unchanged."""
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
    """Returns the resident bytes of this process's own memory, private and shared, but not of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":") for line in lines)
    return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))
