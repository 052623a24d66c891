"""The pool of past policies from which references are drawn.

    pool = ReferencePool(seed=0)
    pool.add(module)                                  # checkpoint 0, the initial policy; add more during training
    with pool.resident(module, pool.draw(number)):    # inside the block the module is a past policy
        ...
    pool.close()

A checkpoint is one contiguous slab of bytes (see `layout`), in device memory, in host memory or on disk, wherever there
is room (see `tiers`). The tensors of the resident checkpoint are views of one more slab on the device: a switch is one
copy, and their addresses never change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn

from seppo_fast.config.vocabulary import Draw, KeepRule
from seppo_fast.distributed.machine import Node
from seppo_fast.references.layout import PackedLayout, trainable_state_dict
from seppo_fast.references.resident import Resident
from seppo_fast.references.retention import evict
from seppo_fast.references.storage import StoredCheckpoint, Tier, checked_checkpoints, map_checkpoint, save_checkpoints
from seppo_fast.references.swap import Place, offload, reload, restore_parameters, swap_parameters
from seppo_fast.references.tiers import Budget, PoolFullError, Tiers
from seppo_fast.utils.errors import CheckpointError
from seppo_fast.utils.random import keyed_rng


class ReferencePool:
    """A pool of checkpoints, each a copy of a module's trained parameters and buffers.

    Checkpoints are numbered 0..k-1 in the order in which they are added; 0 is the initial policy. They hold the weights
    themselves, never a moving average. The pool is a context manager that calls `close` at the end of its block.

    Args:
        seed: seed of the draws, and of the reservoir that bounds the pool.
        draw: what `draw` returns: a `uniform` draw from all checkpoints so far (Algorithm 1), always the `newest`, or
            always the `initial` one.
        keep: number of checkpoints to keep, at least 2, the initial one always included; None keeps all.
        rule: which checkpoints a bounded pool keeps; see `retention.evict`.
        compute: the autocast dtype in which references predict, which decides the dtypes in which checkpoints are
            stored; see `layout.PackedLayout.of`.
        budget: the memory that checkpoints may take; see `tiers.Budget` for the defaults.
        folder: the folder for checkpoints that no memory has room for, as files without a name; None: the directory for
            temporary files.
        node: the run's processes; None: only this one. Those on one machine share one copy of each checkpoint in host
            memory and on disk. All of the run's processes must call `add`, `restore` and `close` together.

    Raises:
        ValueError: an invalid `draw`, `rule` or `keep`, or a `rule` that would drop the newest checkpoint although
            `draw` is `newest`.
    """

    def __init__(
        self,
        seed: int,
        draw: Draw = "uniform",
        *,
        keep: int | None = None,
        rule: KeepRule = "reservoir",
        compute: torch.dtype = torch.float32,
        budget: Budget | None = None,
        folder: str | Path | None = None,
        node: Node | None = None,
    ) -> None:
        if draw not in get_args(Draw):
            raise ValueError(f"draw: {draw!r} is unknown, use one of {', '.join(get_args(Draw))}")
        if rule not in get_args(KeepRule):
            raise ValueError(f"rule: {rule!r} is unknown, use one of {', '.join(get_args(KeepRule))}")
        if draw == "newest" and keep is not None and rule != "newest":
            raise ValueError(f"rule: a bounded pool that draws the newest checkpoint needs 'newest', got {rule!r}")
        if keep is not None and (not isinstance(keep, int | np.integer) or keep < 2):
            raise ValueError(f"keep: must be at least 2 (the initial policy and another one), got {keep!r}")
        self._seed = int(seed)
        self._draw = draw
        self._keep = None if keep is None else int(keep)
        self._rule = rule
        self._count = 0
        self._compute = compute
        self._budget = budget or Budget()
        self._folder = None if folder is None else Path(folder)
        self._node = node or Node()
        self._tiers: Tiers | None = None  # created with the first checkpoint
        self._slot: Resident | None = None  # created when a reference is first needed
        self._bound: nn.Module | None = None
        self._inside: nn.Module | None = None

    def __len__(self) -> int:
        """Returns the number of checkpoints added so far, including those that a bounded pool has dropped."""
        return self._count

    def __enter__(self) -> ReferencePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def tiers(self) -> dict[int, Tier]:
        """The tier of each kept checkpoint, by its number: `device`, `host` or `disk`."""
        return {number: stored.tier for number, stored in self._tiers.stored.items()} if self._tiers else {}

    def add(self, module: nn.Module) -> int:
        """Adds a copy of the module's trained parameters and buffers as a new checkpoint.

        Args:
            module: the policy. Its trained parameters are those with `requires_grad`; of its buffers, those in its
                `state_dict` are copied.

        Returns:
            The new checkpoint's number, whether a bounded pool keeps it or not.

        Raises:
            ValueError: the module has no such tensors, they differ in name or shape from those of the pool (the message
                lists how), or the module is resident.
            PoolFullError: no tier has room for it, or the disk refuses the write; the message says how much is needed.
                The pool is unchanged.
        """
        self._refuse_resident(module)
        tiers = self._tiers
        if tiers is None:
            state = trainable_state_dict(module)
            if not state:
                raise ValueError("module: has no trained parameters and no buffers")
            device = next(iter(state.values())).device
            tiers = Tiers(PackedLayout.of(module, self._compute), device, self._budget, self._folder, self._node)
        state = tiers.layout.check(module)
        number, goes = self._count, None
        if self._keep is not None:
            goes = evict(self._rule, list(tiers.stored), number, self._keep, self._seed)
        if goes is None:
            tiers.put(number, state)
        elif goes != number:
            tiers.replace(goes, number, state)
        self._tiers = tiers
        self._count += 1
        return number

    def draw(self, number: int, checkpoints: int | None = None) -> int:
        """Draws a checkpoint, as a function of (seed, number, checkpoints so far) that is equal on all ranks.

        Uniform draws from a bounded pool return the initial policy with its probability among all k checkpoints so far,
        1/k; the other kept ones share the rest evenly.

        Args:
            number: the draw's number, 0 or more.
            checkpoints: the number of checkpoints to assume, to know a draw in advance; None: the current number. For a
                bounded pool the result is then a guess, since what it will drop is not known yet.

        Returns:
            The checkpoint's number.

        Raises:
            ValueError: the pool is empty, or `number` is negative.
        """
        if number < 0:
            raise ValueError(f"number: must be 0 or more, got {number}")
        count = self._count if checkpoints is None else checkpoints
        if not count:
            raise ValueError("draw: the pool is empty; add checkpoint 0, the initial policy, first")
        if self._draw == "initial":
            return 0
        if self._draw == "newest":
            return count - 1
        rng = keyed_rng(self._seed, "reference", number)
        index, others = int(rng.integers(count)), list(self.tiers)[1:]
        dropped = index and index < self._count and index not in others
        return others[int(rng.integers(len(others)))] if dropped else index

    def prefetch(self, index: int) -> None:
        """Starts copying a checkpoint to the device while other work runs there; a wrong guess does no harm.

        Does nothing for a checkpoint that is on the device already, or that the pool does not hold (yet).
        """
        if index in self.tiers:
            self._resident().prefetch(index, self._checkpoint(index))

    def load_into(self, module: nn.Module, index: int) -> None:
        """Overwrites the module's trained tensors with checkpoint `index`.

        That is one copy if the module is bound (see `bind`); otherwise it is done tensor by tensor.

        Args:
            module: the module to overwrite.
            index: the checkpoint's number.

        Raises:
            ValueError: the pool does not hold the checkpoint, the module's tensors do not match the pool's, or the
                module is resident. For a bound module also: another module is resident.
        """
        self._refuse_resident(module)
        stored = self._checkpoint(index)
        if module is self._bound:
            if self._inside is not None:
                raise ValueError("module: another reference of this pool is resident; leave its block first")
            self._resident().switch(index, stored)
            return
        layout = self._opened().layout
        tensors = layout.find(module)
        with torch.no_grad():
            for name, view in layout.views(stored.slab).items():
                tensors[name].copy_(view)
        torch.clear_autocast_cache()  # else a surrounding autocast would reuse its casts of the old weights

    def bind(self, module: nn.Module) -> None:
        """Replaces the module's trained tensors, for good, with views of the slab that `load_into` copies to.

        They get the dtypes of the slab. Meant for a second module that is never trained, whether or not its parameters
        require gradients. A pool can have one bound module.

        Args:
            module: the module to bind; binding it again changes nothing.

        Raises:
            ValueError: the module's tensors do not match the pool's, the pool is empty, or another module is bound.
        """
        if self._bound not in (None, module):
            raise ValueError("module: another module is already bound to this pool")
        tensors = self._opened().layout.find(module)
        swap_parameters(module, tensors, self._resident().stand_ins(module, tensors))
        self._bound = module

    @contextmanager
    def resident(self, module: nn.Module, index: int, aside: torch.device | None = None) -> Iterator[nn.Module]:
        """Makes `module` checkpoint `index` inside the block, and itself again afterwards, also after an exception.

        So one module serves as policy and reference: a drawn reference is frozen, and all that depends on it can be
        computed ahead of the updates that use it. Only the checkpoint is copied. The module's own parameters are
        swapped out meanwhile and keep their gradients, hooks and memory. A bound module becomes the same checkpoint.

        Args:
            module: the policy. It must not be trained inside the block.
            index: the checkpoint's number.
            aside: the device to which the data of the module's own tensors are moved meanwhile. That frees their memory
                during the block, and after it the memory of the slab, unless a module is bound. None, or a device of
                the pool's type: they stay where they are.

        Yields:
            The module.

        Raises:
            ValueError: the pool does not hold the checkpoint, the module's tensors do not match the pool's, or a module
                is resident already.
        """
        if self._inside is not None:
            raise ValueError("module: another reference of this pool is resident; leave its block first")
        stored, tiers = self._checkpoint(index), self._opened()
        state = tiers.layout.check(module)
        copies: dict[str, Tensor] = {}
        if aside is not None and aside.type != tiers.device.type:
            copies = offload(state, aside)
        places: list[Place] = []
        self._inside = module
        try:
            self._resident().switch(index, stored)
            places = swap_parameters(module, state, self._resident().stand_ins(module, state))
            yield module
        finally:
            self._inside = None
            restore_parameters(places)
            if copies:
                if self._bound is None:
                    self._give_up_resident()  # first, since the module's own tensors may need its memory
                reload(state, copies)

    def save(self, folder: str | Path, previous: str | Path | None = None) -> None:
        """Writes all checkpoints and a manifest with checksums into a folder that appears complete or not at all.

        Only one process should call this.

        Args:
            folder: the new folder; must not exist yet.
            previous: a folder to which this pool was saved before; checkpoints in it are linked, not written again.

        Raises:
            ValueError: the pool is empty.
            CheckpointError: the folder exists, the disk refuses the write, or `previous` was not saved by a pool with
                these settings.
        """
        if not self._tiers or not self._count:
            raise ValueError("save: the pool is empty")
        before = None if previous is None else Path(previous)
        save_checkpoints(Path(folder), self._tiers.stored, self._tiers.layout, self._count, self._settings(), before)

    def restore(self, folder: str | Path, device: str | torch.device, like: nn.Module | None = None) -> None:
        """Loads the checkpoints of a saved pool into this empty one, each into the first tier with room.

        Args:
            folder: a folder that `save` wrote; it is not needed afterwards.
            device: the device of the modules that will be references.
            like: a module whose memory layout the tensors get; None: that of the first saved checkpoint. Equal weights
                in another memory layout may round differently.

        Raises:
            ValueError: this pool is not empty.
            CheckpointError: checkpoints are missing or damaged (the message names each of them), come from other
                modules, or were saved by a pool with other settings. This pool stays empty.
            PoolFullError: no tier has room. This pool stays empty.
        """
        if self._count:
            raise ValueError("restore: only an empty pool can load a saved one")
        folder, device = Path(folder), torch.device(device)
        problem, count = None, 0
        files: dict[int, Path] = {}
        try:
            files, count = checked_checkpoints(folder, self._settings())
            checkpoints = {number: map_checkpoint(file) for number, file in files.items()}
            layout = (
                next(iter(checkpoints.values()))[1].repacked() if like is None else PackedLayout.of(like, self._compute)
            )
            if any(other.tensors != layout.tensors for _, other in checkpoints.values()):
                problem = f"{folder}: its checkpoints come from different modules"
        except CheckpointError as error:
            problem = str(error)
        problem = self._node.agree(problem)
        if problem is not None:
            raise CheckpointError(problem)
        tiers = Tiers(layout, device, self._budget, self._folder, self._node)
        try:
            for number, (slab, theirs) in checkpoints.items():
                tiers.put(number, slab if theirs == layout else theirs.views(slab))
        except PoolFullError:
            tiers.close()
            raise
        self._tiers, self._count = tiers, count

    def close(self) -> None:
        """Frees all memory and files, and leaves the pool empty and reusable. A bound module keeps its tensors."""
        self._give_up_resident()
        self._bound, self._count = None, 0
        if self._tiers:
            self._tiers.close()
            self._tiers = None

    def _settings(self) -> dict[str, str | int | None]:
        """Returns the settings that a saved pool and the one that restores it must share."""
        compute = str(self._compute).removeprefix("torch.")
        return {"seed": self._seed, "draw": self._draw, "keep": self._keep, "rule": self._rule, "compute": compute}

    def _checkpoint(self, index: int) -> StoredCheckpoint:
        if not self._tiers or index not in self._tiers.stored:
            raise ValueError(f"index: {index} is not one of the kept checkpoints, {sorted(self.tiers)}")
        return self._tiers.stored[index]

    def _refuse_resident(self, module: nn.Module) -> None:
        if module is self._inside:
            raise ValueError("module: is resident, so it holds a reference's weights; leave the block first")

    def _opened(self) -> Tiers:
        if not self._tiers:
            raise ValueError("module: the pool is empty; add checkpoint 0, the initial policy, first")
        return self._tiers

    def _resident(self) -> Resident:
        assert self._tiers
        if self._slot is None:
            self._slot = Resident(self._tiers.layout, self._tiers.device)
        return self._slot

    def _give_up_resident(self) -> None:
        if self._slot is not None:
            self._slot.close()
            self._slot = None
