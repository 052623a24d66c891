"""Draws of the past policy that is an update's reference: Algorithm 1, line 3."""

from __future__ import annotations

from seppo_fast.config.schema import Config
from seppo_fast.references.pool import ReferencePool


class Draws:
    """Draws each update's reference, as a function of the seed, the update and the number of past policies so far.

    Attributes:
        pool: the past policies; None if the method has no reference.

    Args:
        config: the run's configuration.
        pool: see above.
    """

    def __init__(self, config: Config, pool: ReferencePool | None) -> None:
        self._config = config
        self.pool = pool

    def reference(self, update: int) -> int | None:
        """Returns the index of the past policy drawn for an update, or None if the method has no reference."""
        return None if self.pool is None else self.pool.draw(self._number(update))

    def prefetch(self, update: int) -> None:
        """Starts copying a coming update's reference to the device, if that update draws anew and the pool holds it.

        Does nothing with `reference.park`: the policy is moved to host memory for rollouts because room is short.
        """
        config, length = self._config, self._config.train.updates_per_iteration
        begins = update % length == 0
        drawn = config.reference.redraw == "update" or begins
        if self.pool is None or not drawn or update >= config.train.updates or config.reference.park:
            return
        grows = begins and config.row.draw != "initial"
        self.pool.prefetch(self.pool.draw(self._number(update), len(self.pool) + grows))

    def _number(self, update: int) -> int:
        by_iteration = self._config.reference.redraw == "iteration"
        return update // self._config.train.updates_per_iteration if by_iteration else update
