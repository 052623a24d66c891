"""Which past policy is the reference of an update: Algorithm 1, line 3."""

from __future__ import annotations

from seppo_fast.config.schema import Config
from seppo_fast.references.pool import ReferencePool


class Draws:
    """The draws of a run; each is a function of the seed and of how many past policies there are.

    Attributes:
        pool: the past policies; None where the method has no reference.

    Args:
        config: the run's configuration.
        pool: see above.
    """

    def __init__(self, config: Config, pool: ReferencePool | None) -> None:
        self._config = config
        self.pool = pool

    def reference(self, update: int) -> int | None:
        """Returns the index of the past policy that is drawn for an update; None without a reference."""
        return None if self.pool is None else self.pool.draw(self._number(update))

    def prefetch(self, update: int) -> None:
        """Brings up the weights that an update will draw, if it draws anew and its reference is there already.

        Nothing where the policy waits in host memory during a rollout: there is no room then.
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
