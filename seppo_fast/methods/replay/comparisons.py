"""Which comparisons an update makes: DITTO's shares of new samples, samples of earlier iterations, and both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from seppo_fast.config.schema import Config
from seppo_fast.methods.pairs import PairMaker
from seppo_fast.methods.replay.buffer import Key
from seppo_fast.utils.random import keyed_rng


def shares(pairs: int) -> tuple[int, int, int]:
    """Returns how many of an update's pairs compare what, as in DITTO: 70, 20 and 10 %.

    Args:
        pairs: the pairs of an update.

    Returns:
        The numbers of demonstrations against new samples, of demonstrations against samples of an earlier iteration,
        and of newer against older samples. The last two are rounded, halves up; the first is the rest.
    """
    replayed, newer = (2 * pairs + 5) // 10, (pairs + 5) // 10
    return pairs - replayed - newer, replayed, newer


@dataclass(frozen=True)
class Comparison:
    """A pair: the sample `loser` against the demonstration, or against the newer sample `winner` for the same example.

    Attributes:
        sample_id: the id of the pair, from which its example, time and noise follow.
        loser: the loser's key.
        winner: the winner's key; None: the example's demonstration.
        replayed: whether the loser is a sample of an earlier iteration.
    """

    sample_id: int
    loser: Key
    winner: Key | None = None
    replayed: bool = False


class Comparisons:
    """Draws the comparisons of each update, as a function of the seed and the update, equal in all processes.

    Each of an update's sample ids is used once at most. As in DITTO's code, an update makes as many comparisons of each
    kind as `shares` says, if so many exist: with examples that no earlier iteration sampled, as in the first, only
    demonstrations against new samples are left, so that the update is smaller.

    Args:
        config: the run's configuration.
        maker: gives the sample ids of all processes.
    """

    def __init__(self, config: Config, maker: PairMaker) -> None:
        self._seed = config.seed
        self._length = config.train.updates_per_iteration
        self._maker = maker
        # By example: the samples of all finished iterations up to the one before `_known`.
        self._earlier: dict[int, list[Key]] = {}
        self._known = 0

    def of(self, update: int) -> list[Comparison]:
        """Returns an update's comparisons, in the order of its sample ids."""
        self._learn(update // self._length)
        ids = self._maker.all_sample_ids(update)
        fresh, replayed, newer = shares(len(ids))
        order = keyed_rng(self._seed, "comparisons", update).permutation(len(ids)).tolist()
        earlier = [self._earlier.get(example, []) for example in self._maker.examples(ids)]
        again = [place for place in order if earlier[place]][: replayed + newer]
        first = [place for place in order if place not in set(again)][:fresh]
        made = {place: Comparison(ids[place], Key(update, place)) for place in first}
        for number, place in enumerate(again):
            made[place] = self._replayed(Key(update, place), ids[place], earlier[place], newer=number >= replayed)
        return [made[place] for place in sorted(made)]

    def _replayed(self, own: Key, sample_id: int, earlier: Sequence[Key], newer: bool) -> Comparison:
        """Returns a comparison with an earlier sample, drawn uniformly, as the loser.

        With `newer`, the winner is drawn from the samples of later iterations than the loser's, the new one included.
        """
        rng = keyed_rng(self._seed, "replay", own.update, sample_id)
        loser = earlier[int(rng.integers(len(earlier)))]
        if not newer:
            return Comparison(sample_id, loser, replayed=True)
        later = [key for key in earlier if key.update // self._length > loser.update // self._length] + [own]
        return Comparison(sample_id, loser, later[int(rng.integers(len(later)))], replayed=True)

    def _learn(self, iteration: int) -> None:
        """Adds the samples of all iterations before this one to what is known."""
        if iteration < self._known:
            self._earlier, self._known = {}, 0
        for update in range(self._known * self._length, iteration * self._length):
            for place, example in enumerate(self._maker.examples(self._maker.all_sample_ids(update))):
                self._earlier.setdefault(example, []).append(Key(update, place))
        self._known = iteration
