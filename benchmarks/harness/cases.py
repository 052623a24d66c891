"""A suite is a list of cases; here they are chosen, run one after another, kept, and stopped when the time is over.

A suite's module offers `cases(machine)`, the most important first. Listing them makes nothing: what several cases
share, such as a pipeline on disk or a trainer, is a `Shared`, made when the first of them runs and ended when none of
those that are left needs it. Without the driver:

    cases = chosen(listed("kernels", Machine(device(), quick=False)), ["16 pairs, SD-1.5"])
    outcome = run_cases(cases, seconds=60)
"""

from __future__ import annotations

import gc
import importlib
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from benchmarks.harness.measure import Bench, Machine
from benchmarks.harness.rows import Row, table

T = TypeVar("T")


class LeftOut(Exception):
    """A case cannot be run here; the message says why."""


class Shared(Generic[T]):
    """Set-up that cases share; calling it makes it where it does not exist yet, and returns it.

    Args:
        make: makes it; what it enters on the stack is left when the set-up ends.
        seconds: estimate on an H200, see `benchmarks.harness.estimates`.
        needs: the set-ups that `make` calls.
    """

    def __init__(self, make: Callable[[ExitStack], T], seconds: float = 0.0, needs: Sequence[Shared[Any]] = ()) -> None:
        self._make = make
        self.seconds = seconds
        self._needs = tuple(needs)
        self._made: list[T] = []
        self._stack = ExitStack()
        self._failure = ""

    def __call__(self) -> T:
        """Returns the set-up.

        Raises:
            LeftOut: an earlier attempt to make it failed.
        """
        if self._failure:
            raise LeftOut(self._failure)
        if not self._made:
            try:
                self._made = [self._make(self._stack)]
            except Exception as error:
                known = isinstance(error, LeftOut)
                self._failure = str(error) if known else f"its set-up failed, {type(error).__name__}: {error}"
                self.end()
                raise
        return self._made[0]

    @property
    def exists(self) -> bool:
        """Whether it is made and has not ended."""
        return bool(self._made)

    def chain(self) -> list[Shared[Any]]:
        """Returns the set-ups that it needs, and itself, each after those that it needs."""
        return _unique([*(one for need in self._needs for one in need.chain()), self])

    def end(self) -> None:
        """Ends it and frees what it holds; nothing happens where it does not exist."""
        self._made = []
        self._stack.close()
        free_memory()


@dataclass(frozen=True)
class Case:
    """What a suite runs, filters, and loses at most when it is killed.

    Attributes:
        title: unique within the suite.
        run: measures and returns the case's rows.
        seconds: estimate on an H200 without set-up, see `benchmarks.harness.estimates`.
        needs: the set-ups that `run` calls.
    """

    title: str
    run: Callable[[], list[Row]]
    seconds: float = 0.0
    needs: tuple[Shared[Any], ...] = ()

    def chain(self) -> list[Shared[Any]]:
        """Returns all set-ups behind it, each after those that it needs."""
        return _unique([one for need in self.needs for one in need.chain()])

    def cost(self) -> float:
        """Returns the estimate with the set-up that does not exist yet."""
        return self.seconds + sum(one.seconds for one in self.chain() if not one.exists)


@dataclass
class Outcome:
    """What came of a suite.

    Attributes:
        rows: of all cases that ran to their end.
        missing: of the other chosen cases the titles, and why each has no rows.
        failed: titles of the missing cases that raised an error.
    """

    rows: list[Row] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


def limit_case(name: str, bench: Shared[Bench]) -> Case:
    """Returns the case whose one row is the limit that a bench compares with."""
    return Case(f"limit: {name}", lambda: [bench().limit_row], needs=(bench,))


def listed(suite: str, machine: Machine) -> list[Case]:
    """Returns all cases of a suite, the most important first; nothing is made."""
    return importlib.import_module(f"benchmarks.suites.{suite}").cases(machine)


def chosen(cases: Sequence[Case], wanted: Sequence[str]) -> list[Case]:
    """Returns the cases whose title contains one of `wanted`, in upper or lower case; without `wanted`, all.

    Raises:
        ValueError: a wanted part that no title contains; the message lists the titles.
    """
    for part in wanted:
        if not any(part.lower() in case.title.lower() for case in cases):
            titles = "\n".join(f"  {case.title}" for case in cases)
            raise ValueError(f"no case's title contains {part!r}; the titles are\n{titles}")
    return [case for case in cases if not wanted or any(part.lower() in case.title.lower() for part in wanted)]


def run_cases(
    cases: Sequence[Case],
    seconds: float | None = None,
    keep: Callable[[list[Row]], None] = lambda rows: None,
    *,
    estimated: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Runs cases in their order, prints the rows of each as it ends, and returns what came of all.

    Args:
        cases: of one suite.
        seconds: in which to end. A case begins only where its estimate, times as much as the cases before it took
            longer than theirs, fits into what is left; a later and shorter one may still fit. None: no limit.
        keep: called after each case with all rows so far.
        estimated: whether the estimates hold: on a GPU; else a case begins as long as time is left.
        clock: in seconds.
    """
    torch.backends.cudnn.allow_tf32 = False  # values are checked in float32, and TF32 is not that
    outcome, started, expected = Outcome(), clock(), 0.0
    shared = _unique([one for case in cases for one in case.chain()])
    try:
        for place, case in enumerate(cases):
            cost, spent = case.cost() if estimated else 0.0, clock() - started
            cost_now = cost * max(1.0, spent / expected) if expected else cost
            if seconds is not None and spent + max(cost_now, 1e-9) > seconds:
                outcome.missing[case.title] = _not_begun(seconds - spent, cost_now)
            else:
                expected += cost
                _attempt(case, outcome, keep)
                took = clock() - started - spent
                print(f"  {took:.0f} s" + f", {cost:.0f} s estimated" * bool(cost), flush=True)
            _end_all(shared, but_for=cases[place + 1 :])
    finally:
        _end_all(shared, but_for=())
    return outcome


def _not_begun(left: float, cost: float) -> str:
    return f"takes about {cost:.0f} s, and {left:.0f} s are left" if left > 0 else "the time is over"


def _attempt(case: Case, outcome: Outcome, keep: Callable[[list[Row]], None]) -> None:
    """Adds a case's rows to the outcome, or why it has none; one that fails does not take the others with it."""
    try:
        rows = case.run()
    except LeftOut as reason:
        outcome.missing[case.title] = str(reason)
    except torch.OutOfMemoryError:
        outcome.missing[case.title] = "does not fit into memory"
    except Exception as error:
        traceback.print_exc()
        outcome.missing[case.title] = f"failed, {type(error).__name__}: {error}"
        outcome.failed.append(case.title)
    else:
        outcome.rows += rows
        keep(outcome.rows)
        print(table(rows), flush=True)
        return
    print(f"{case.title}: left out, {outcome.missing[case.title]}", flush=True)
    free_memory()


def _end_all(shared: Sequence[Shared[Any]], but_for: Sequence[Case]) -> None:
    """Ends the set-ups that none of some cases needs, each before those that it needs."""
    needed = {id(one) for case in but_for for one in case.chain()}
    for one in reversed(shared):
        if one.exists and id(one) not in needed:
            one.end()


def free_memory() -> None:
    """Frees what nothing refers to any more, and gives a GPU's unused memory back to the driver."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _unique(shared: Sequence[Shared[Any]]) -> list[Shared[Any]]:
    return list({id(one): one for one in shared}.values())
