"""Recording of the loads and stores of kernels under the interpreter."""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder


class Traffic:
    """The addresses that kernels loaded and stored."""

    def __init__(self):
        self.loaded, self.stored = [], []

    @contextmanager
    def watched(self):
        """Records loads and stores inside the context, without masked lanes."""
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def watched_load(builder, pointers, mask, *rest):
            self.loaded.append(pointers.data[mask.data])
            return load(builder, pointers, mask, *rest)

        def watched_store(builder, pointers, value, mask, *rest):
            self.stored.append(pointers.data[mask.data])
            return store(builder, pointers, value, mask, *rest)

        with (
            mock.patch.object(InterpreterBuilder, "create_masked_load", watched_load),
            mock.patch.object(InterpreterBuilder, "create_masked_store", watched_store),
        ):
            yield self

    def times(self, moved, tensor):
        """Returns how often each element of a dense tensor was moved; fails unless it is the same for all elements."""
        addresses = np.concatenate([x.ravel() for x in moved])
        places = (addresses - np.uint64(tensor.data_ptr())) // np.uint64(tensor.element_size())
        counts = np.bincount(places[places < tensor.numel()].astype(np.int64), minlength=tensor.numel())
        assert counts.min() == counts.max()
        return int(counts[0])
