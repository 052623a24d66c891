"""Selects and runs the cases of a suite, keeps their rows, and stops when the time budget is used up.

A suite is a module whose function `cases(machine)` lists its cases, the most important first. Listing creates nothing:
what several cases share, such as a pipeline on disk or a trainer, is a `Shared`. It is created when the first case that
needs it runs, and ended once no remaining case needs it. Without the driver:

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
    """Raised when a case cannot run on this machine; the message says why."""


class Shared(Generic[T]):
    """A set-up that cases share. Calling it creates the set-up on first use, and returns it.

    Args:
        make: creates the set-up; contexts that it enters on the stack are exited when the set-up ends.
        seconds: estimated time to create it on an H200, see `benchmarks.harness.estimates`.
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
        """Returns the set-up, and creates it if necessary.

        Raises:
            LeftOut: an earlier attempt to create it failed.
        """
        if self._failure:
            raise LeftOut(self._failure)
        if not self._made:
            try:
                self._made = [self._make(self._stack)]
            except Exception as error:
                known = isinstance(error, LeftOut)
                self._failure = str(error) if known else f"its set-up failed with {type(error).__name__}: {error}"
                self.end()
                raise
        return self._made[0]

    @property
    def exists(self) -> bool:
        """Whether it has been created and has not ended."""
        return bool(self._made)

    def chain(self) -> list[Shared[Any]]:
        """Returns this set-up and all that it depends on, each after its own dependencies."""
        return _unique([*(one for need in self._needs for one in need.chain()), self])

    def end(self) -> None:
        """Ends the set-up, if it exists, and frees its memory."""
        self._made = []
        self._stack.close()
        free_memory()


@dataclass(frozen=True)
class Case:
    """The unit in which a suite is selected and run; a killed run loses at most one case.

    Attributes:
        title: a title that is unique within the suite.
        run: measures and returns the case's rows.
        seconds: estimated time on an H200 without set-up, see `benchmarks.harness.estimates`.
        needs: the set-ups that `run` calls.
    """

    title: str
    run: Callable[[], list[Row]]
    seconds: float = 0.0
    needs: tuple[Shared[Any], ...] = ()

    def chain(self) -> list[Shared[Any]]:
        """Returns all set-ups that it depends on, each after its own dependencies."""
        return _unique([one for need in self.needs for one in need.chain()])

    def cost(self) -> float:
        """Returns the estimated seconds, including the set-ups that do not exist yet."""
        return self.seconds + sum(one.seconds for one in self.chain() if not one.exists)


@dataclass
class Outcome:
    """The result of running cases.

    Attributes:
        rows: rows of all cases that completed.
        missing: titles of the other cases, each with the reason why it has no rows.
        failed: titles of the missing cases that failed with an error other than `LeftOut` or lack of memory.
    """

    rows: list[Row] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)


def limit_case(name: str, bench: Shared[Bench]) -> Case:
    """Returns a case whose only row is the limit that the bench compares with."""
    return Case(f"limit: {name}", lambda: [bench().limit_row], needs=(bench,))


def listed(suite: str, machine: Machine) -> list[Case]:
    """Returns all cases of a suite, the most important first, without creating any set-up."""
    return importlib.import_module(f"benchmarks.suites.{suite}").cases(machine)


def chosen(cases: Sequence[Case], wanted: Sequence[str]) -> list[Case]:
    """Returns the cases whose title contains any of `wanted`, ignoring case; all of them if `wanted` is empty.

    Raises:
        ValueError: no title contains one of the wanted parts; the message lists the titles.
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
    """Runs cases in order, prints the rows of each as it ends, and returns the outcome.

    Args:
        cases: cases of one suite.
        seconds: the time budget; None: no limit. A case starts only if its estimate fits into the time that is left. If
            the earlier cases took longer than estimated, the estimate is scaled up by that factor. A later, shorter
            case may still fit.
        keep: called after each case with all rows so far.
        estimated: whether the estimates apply, as on a GPU; if not, a case starts as long as any time is left.
        clock: returns the time in seconds.
    """
    torch.backends.cudnn.allow_tf32 = False  # values are checked in float32, for which TF32 is too coarse
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
    return f"needs about {cost:.0f} s, but only {left:.0f} s are left" if left > 0 else "no time is left"


def _attempt(case: Case, outcome: Outcome, keep: Callable[[list[Row]], None]) -> None:
    """Adds a case's rows, or the reason why it has none, to the outcome; errors do not stop the other cases."""
    try:
        rows = case.run()
    except LeftOut as reason:
        outcome.missing[case.title] = str(reason)
    except torch.OutOfMemoryError:
        outcome.missing[case.title] = "does not fit into memory"
    except Exception as error:
        traceback.print_exc()
        outcome.missing[case.title] = f"failed with {type(error).__name__}: {error}"
        outcome.failed.append(case.title)
    else:
        outcome.rows += rows
        keep(outcome.rows)
        print(table(rows), flush=True)
        return
    print(f"{case.title}: left out: {outcome.missing[case.title]}", flush=True)
    free_memory()


def _end_all(shared: Sequence[Shared[Any]], but_for: Sequence[Case]) -> None:
    """Ends the set-ups that no case of `but_for` needs, each before its own dependencies."""
    needed = {id(one) for case in but_for for one in case.chain()}
    for one in reversed(shared):
        if one.exists and id(one) not in needed:
            one.end()


def free_memory() -> None:
    """Collects garbage, and returns a GPU's cached memory to the driver."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _unique(shared: Sequence[Shared[Any]]) -> list[Shared[Any]]:
    return list({id(one): one for one in shared}.values())
