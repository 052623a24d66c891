"""The slab whose views are the reference's tensors, and the prefetching of the next checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from seppo_fast.references.layout import PackedLayout
from seppo_fast.references.storage import StoredCheckpoint
from seppo_fast.utils.memory import is_out_of_memory


def reading_thread(device: torch.device) -> ThreadPoolExecutor:
    """Returns an executor with one thread, whose current device is `device` if that is a GPU.

    By default it would be GPU 0, and leaving a stream creates a context on the thread's current device: 0.5 GB of GPU 0
    for each other process of a run.
    """
    if device.type != "cuda":
        return ThreadPoolExecutor(1, thread_name_prefix="seppo-prefetch")
    return ThreadPoolExecutor(1, "seppo-prefetch", initializer=torch.cuda.set_device, initargs=(device,))


class Resident:
    """A slab on the device whose address never changes: a switch is one copy, and CUDA graphs stay valid.

    Call `prefetch` and `switch` on the CUDA stream of the forward.

    Args:
        layout: the slab's layout.
        device: the device of the slab.

    Attributes:
        views: the tensors in the slab, by name.
    """

    def __init__(self, layout: PackedLayout, device: torch.device) -> None:
        self._slab = torch.zeros(layout.size, dtype=torch.uint8, device=device)
        self.views = layout.views(self._slab)
        self._index: int | None = None
        self._version = 0
        self._stand_ins: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()
        self._ahead: Tensor | None = None
        self._ahead_index: int | None = None
        self._coming: Future[torch.cuda.Event | None] | None = None
        self._stream = torch.cuda.Stream(self._slab.device) if device.type == "cuda" else None
        self._reader = reading_thread(self._slab.device)

    def stand_ins(self, module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns a view of the slab for each of a module's tensors, of its kind; the same objects on every call."""
        if module not in self._stand_ins:
            self._stand_ins[module] = {
                name: nn.Parameter(self.views[name], tensor.requires_grad)
                if isinstance(tensor, nn.Parameter)
                else self.views[name]
                for name, tensor in state.items()
            }
        return self._stand_ins[module]

    def prefetch(self, index: int, stored: StoredCheckpoint) -> None:
        """Starts copying a checkpoint into a second slab; the next `switch` may be to another one.

        Warns and does nothing if the device has no memory for a second slab.
        """
        near = stored.tier == "device" or (self._stream is None and stored.tier == "host")
        if near or index in (self._index, self._ahead_index):
            return
        self._settle()
        if self._ahead is None and not self._make_room():
            return
        if self._stream is not None:
            # The last switch may still be reading from the second slab.
            self._stream.wait_stream(torch.cuda.current_stream(self._slab.device))
        self._ahead_index = index
        self._coming = self._reader.submit(self._bring, stored.slab)

    def switch(self, index: int, stored: StoredCheckpoint) -> None:
        """Makes the slab checkpoint `index`, by one copy, or by none if it is that checkpoint already.

        Changes made to its tensors since the last switch are noticed, except those made through `.data`.
        """
        if index == self._index and self._slab._version == self._version:
            return
        source = stored.slab
        if index == self._ahead_index and self._settle():
            assert self._ahead is not None
            source = self._ahead
        self._index = None  # in case the copy fails
        self._slab.copy_(source, non_blocking=True)
        self._index, self._version = index, self._slab._version  # tells whether a module has written to its buffers
        torch.clear_autocast_cache()  # else autocast would reuse its casts of the last reference's weights

    def close(self) -> None:
        """Waits for all copies, since the memory that they use is about to be freed."""
        self._reader.shutdown()
        if self._stream is not None:
            self._stream.synchronize()
            torch.cuda.current_stream(self._slab.device).synchronize()

    def _make_room(self) -> bool:
        """Allocates the second slab; returns False, with a warning, if the device has no memory for it."""
        try:
            self._ahead = torch.empty_like(self._slab)
        except RuntimeError as problem:
            if not is_out_of_memory(problem):
                raise
            warnings.warn(
                f"{self._slab.device} has no memory for a second past policy of {self._slab.nbytes / 2**30:.3g} GiB: "
                "references are copied when they are needed, not ahead of time",
                RuntimeWarning,
                stacklevel=3,
            )
            return False
        return True

    def _bring(self, slab: Tensor) -> torch.cuda.Event | None:
        assert self._ahead is not None
        if self._stream is None:
            self._ahead.copy_(slab)
            return None
        with torch.cuda.stream(self._stream):
            self._ahead.copy_(slab, non_blocking=True)  # with a mapped file as source, this blocks only this thread
            return self._stream.record_event()

    def _settle(self) -> bool:
        """Waits for a prefetch, on the host and the current stream; returns whether the second slab is a checkpoint."""
        coming, self._coming = self._coming, None
        if coming is None:
            return self._ahead_index is not None
        try:
            event = coming.result()
        except (RuntimeError, OSError) as problem:
            warnings.warn(f"a reference could not be copied ahead of time: {problem}", RuntimeWarning, stacklevel=2)
            self._ahead_index = None
            return False
        if event is not None:
            event.wait(torch.cuda.current_stream(self._slab.device))
        return True
