"""The past policies from which references are drawn, kept wherever there is memory.

    pool = ReferencePool(seed=0)
    pool.add(module)                                  # checkpoint 0, the initial policy; more as training goes on
    with pool.resident(module, pool.draw(number)):    # the module is a past policy
        ...
    pool.close()

A checkpoint is one slab of bytes (see `layout`), wherever there is room (see `tiers`). The tensors of the one that is
resident are views of one more slab on the device: a switch is one copy, and their addresses stay.
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
    """Checkpoints 0..k-1 of a module's trained parameters and buffers, raw (never a moving average).

    Args:
        seed: of the draws.
        draw: `uniform` over all checkpoints so far (Algorithm 1), the `newest`, or the `initial` one.
        keep: how many checkpoints stay, the initial one always among them, at least 2; None: all.
        rule: which; see `retention.evict`.
        compute: the dtype of autocast under which references predict; see `layout.PackedLayout.of`.
        budget: how much memory the checkpoints may take.
        folder: where those go that no memory holds, as files without names; None: where temporary files go.
        node: the processes of this machine, which keep one copy; `add`, `restore` and `close` are then for all of them.
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
            raise ValueError(f"rule: a bounded pool whose newest is drawn must keep it, got {rule!r}")
        if keep is not None and (not isinstance(keep, int | np.integer) or keep < 2):
            raise ValueError(f"keep: at least 2 is needed, the initial policy and another one, got {keep!r}")
        self._seed = int(seed)
        self._draw = draw
        self._keep = None if keep is None else int(keep)
        self._rule = rule
        self._count = 0
        self._compute = compute
        self._budget = budget or Budget()
        self._folder = None if folder is None else Path(folder)
        self._node = node or Node()
        self._tiers: Tiers | None = None  # made when the first checkpoint comes
        self._slot: Resident | None = None  # made when a reference is asked for
        self._bound: nn.Module | None = None
        self._inside: nn.Module | None = None

    def __len__(self) -> int:
        """Checkpoints so far, with those that a bounded pool has dropped."""
        return self._count

    def __enter__(self) -> ReferencePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def tiers(self) -> dict[int, Tier]:
        """Where each checkpoint that is kept is: `device`, `host` or `disk`."""
        return {number: stored.tier for number, stored in self._tiers.stored.items()} if self._tiers else {}

    def add(self, module: nn.Module) -> int:
        """Copies the trained state of a module; returns the index of the new checkpoint, kept or not.

        Raises:
            ValueError: no tensors, or not those of the checkpoints before (lists names and shapes); a module that is a
                reference just now.
            PoolFullError: no tier has room for it, or the disk refuses; says how much is needed.
        """
        self._refuse_resident(module)
        tiers = self._tiers
        if tiers is None:
            state = trainable_state_dict(module)
            if not state:
                raise ValueError("module: it has no trained parameters and no buffers")
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
        """The index for draw `number`: a function of (seed, number, checkpoints so far), equal on every rank.

        A bounded pool draws the initial policy with its probability among all so far, 1/k; the others share the rest
        evenly.

        Args:
            number: of the draw.
            checkpoints: as if there were so many, to know a draw beforehand; None: those that there are. For a bounded
                pool that is a guess: what it will drop is not known.

        Raises:
            ValueError: the pool is empty; a negative number.
        """
        if number < 0:
            raise ValueError(f"number: {number} is no number of a draw, which is 0 or more")
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
        """Starts bringing a checkpoint to the device while other work goes on there; a wrong guess does no harm.

        Nothing to do for one that is there, or that is not in the pool (yet).
        """
        if index in self.tiers:
            self._resident().prefetch(index, self._checkpoint(index))

    def load_into(self, module: nn.Module, index: int) -> None:
        """Makes a module checkpoint `index`: by one copy where it is bound (see `bind`), else tensor by tensor.

        Raises:
            ValueError: no such checkpoint; tensors that are not those of the pool; a module that is resident.
        """
        self._refuse_resident(module)
        stored = self._checkpoint(index)
        if module is self._bound:
            if self._inside is not None:
                raise ValueError("module: another reference of this pool is resident")
            self._resident().switch(index, stored)
            return
        layout = self._opened().layout
        tensors = layout.find(module)
        with torch.no_grad():
            for name, view in layout.views(stored.slab).items():
                tensors[name].copy_(view)
        torch.clear_autocast_cache()  # else a caller's autocast would keep the casts of the weights before

    def bind(self, module: nn.Module) -> None:
        """From now on the module's trained tensors are views of the slab that `load_into` copies to, in its dtypes.

        For a module that is never trained, whether or not its parameters are marked so; one a pool.

        Raises:
            ValueError: tensors that are not those of the pool; another module is bound.
        """
        if self._bound not in (None, module):
            raise ValueError("module: another one is bound to this pool")
        tensors = self._opened().layout.find(module)
        swap_parameters(module, tensors, self._resident().stand_ins(module, tensors))
        self._bound = module

    @contextmanager
    def resident(self, module: nn.Module, index: int, aside: torch.device | None = None) -> Iterator[nn.Module]:
        """`module` is checkpoint `index` inside the block and itself again after it, also on an error.

        One module is enough because a drawn reference is frozen: all that depends on it is made ahead of the updates
        that use it. Nothing is copied but the checkpoint; the module's own parameters are taken out meanwhile, with
        their gradients, hooks and memory. A bound module becomes the same checkpoint.

        Args:
            module: the policy. Nothing may train it inside the block.
            index: of the checkpoint.
            aside: where the data of its own tensors wait, to free the memory of their device, and that of the slab
                after the block; None, or a device of the same kind: they stay where they are.

        Raises:
            ValueError: as `load_into`; another module is resident.
        """
        if self._inside is not None:
            raise ValueError("module: another reference of this pool is resident")
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
                    self._give_up_resident()  # first: its memory is what the module's own may need
                reload(state, copies)

    def save(self, folder: str | Path, previous: str | Path | None = None) -> None:
        """Writes all checkpoints with a manifest of checksums into a folder that appears whole or not at all.

        For one process to call.

        Args:
            folder: must not exist yet.
            previous: a folder that this pool was saved to before: what it holds is linked, not written again.

        Raises:
            ValueError: the pool is empty.
            CheckpointError: the disk refuses.
        """
        if not self._tiers or not self._count:
            raise ValueError("save: the pool is empty")
        before = None if previous is None else Path(previous)
        save_checkpoints(Path(folder), self._tiers.stored, self._tiers.layout, self._count, self._settings(), before)

    def restore(self, folder: str | Path, device: str | torch.device, like: nn.Module | None = None) -> None:
        """Takes over the checkpoints of a saved pool, each into the first tier with room; this pool must be empty.

        Args:
            folder: that `save` wrote; nothing of it is needed afterwards.
            device: of the modules that will be references.
            like: their tensors will lie in memory as this module's; None: as in the first checkpoint. Equal weights
                that lie otherwise may round otherwise.

        Raises:
            CheckpointError: checkpoints that are missing or damaged; names every one. The pool stays empty.
            PoolFullError: no tier has room.
        """
        if self._count:
            raise ValueError("restore: only an empty pool takes over another one")
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
                problem = f"{folder}: its checkpoints are of different modules"
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
        """Frees all memory and files; the pool is empty then. A bound module keeps its tensors."""
        self._give_up_resident()
        self._bound, self._count = None, 0
        if self._tiers:
            self._tiers.close()
            self._tiers = None

    def _settings(self) -> dict[str, str | int | None]:
        """What a saved pool must agree in."""
        compute = str(self._compute).removeprefix("torch.")
        return {"seed": self._seed, "draw": self._draw, "keep": self._keep, "rule": self._rule, "compute": compute}

    def _checkpoint(self, index: int) -> StoredCheckpoint:
        if not self._tiers or index not in self._tiers.stored:
            raise ValueError(f"index: {index} is not one of the checkpoints that are kept, {sorted(self.tiers)}")
        return self._tiers.stored[index]

    def _refuse_resident(self, module: nn.Module) -> None:
        if module is self._inside:
            raise ValueError("module: it is resident, a reference of this pool")

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
