"""Progress of long work: on a terminal, bars that leave no trace and break no line; elsewhere, plain lines."""

import io
import sys
import threading

import pytest

import seppo_fast.utils.logging
import seppo_fast.utils.progress
from seppo_fast.utils.logging import say, tolerant_output, warn
from seppo_fast.utils.progress import duration, progress
from tests.helpers.terminal import COLUMNS, Terminal, on_terminal, screen


@pytest.fixture
def opened(monkeypatch):
    """Returns a function that makes both streams one terminal.

    A test must call it itself, because pytest sets its own streams after fixtures.
    """

    def call():
        made = Terminal()
        monkeypatch.setattr(sys, "stdout", made)
        monkeypatch.setattr(sys, "stderr", made)
        monkeypatch.setenv("COLUMNS", str(COLUMNS))
        return made

    return call


@pytest.fixture
def clock(monkeypatch):
    """The clock that times lines, in seconds, in a list of one; tests advance it."""
    now = [100.0]
    monkeypatch.setattr(seppo_fast.utils.progress, "monotonic", lambda: now[0])
    return now


def test_a_bar_follows_the_work_and_leaves_nothing(opened, monkeypatch):
    terminal = opened()
    before = sys.stdout, sys.stderr
    with progress(4, "encoded", "examples") as advance:
        assert screen(terminal.getvalue())[0].startswith("encoded:   0%|")
        advance(3)
        print("a line")
        (line, bar) = screen(terminal.getvalue())
        assert line == "a line" and bar.startswith("encoded:  75%|") and "| 3/4 [" in bar and "examples/s]" in bar
        assert len(bar) <= COLUMNS - 4
    assert screen(terminal.getvalue()) == ["a line"]
    assert (sys.stdout, sys.stderr) == before


def test_lines_stay_whole_above_a_bar(opened):
    terminal = opened()
    with progress(20, "rolled out", "samples") as advance, tolerant_output():
        for number in range(20):
            say(f"said {number}")
            warn("two\nlines")
            print("in", "pieces", end="")
            advance(1)
            assert screen(terminal.getvalue())[-1].startswith("rolled out: ")
            print(" of a line", file=sys.stdout)
            sys.stderr.writelines(["an ", "error\n"])
    expected = [
        line
        for number in range(20)
        for line in (f"said {number}", "two", "lines", "in pieces of a line", "an error")
    ]  # fmt: skip
    assert screen(terminal.getvalue()) == expected


def test_threads_print_whole_lines_above_a_bar(opened):
    terminal = opened()

    def work(name):
        for number in range(50):
            sys.stderr.write(f"{name} {number}\n")

    with progress(200, "encoded", "examples") as advance:
        threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
        for thread in threads:
            thread.start()
        for _ in range(200):
            advance(1)
        for thread in threads:
            thread.join()
    shown = screen(terminal.getvalue())
    assert sorted(shown) == sorted(f"{name} {number}" for name in "abcd" for number in range(50))


def test_a_line_without_an_end_is_shown_once_the_bar_is_gone(opened):
    terminal = opened()
    with progress(2, "encoded", "examples"):
        print("whole\nhalf", end="")
        assert screen(terminal.getvalue())[0] == "whole" and "half" not in terminal.getvalue()
    assert screen(terminal.getvalue()) == ["whole", "half"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_whatever_ends_the_work_leaves_the_terminal_clean(opened, error):
    terminal = opened()

    def work():
        with progress(9, "encoded", "examples") as advance:
            advance(2)
            terminal.write("^C")  # the echo of the terminal's driver
            raise error

    with pytest.raises(error):
        work()
    print("afterwards")
    assert screen(terminal.getvalue()) == ["afterwards"]


def test_work_inside_work_has_no_bar_of_its_own(opened, clock):
    terminal = opened()
    with progress(2, "outer", "things") as outer:
        outer(1)
        with progress(10, "inner", "things") as inner:
            clock[0] += 20
            inner(5)
        line, bar = screen(terminal.getvalue())
        assert line == "inner 5/10  0.25 things/s  eta 20 s" and bar.startswith("outer:  50%")
    assert screen(terminal.getvalue()) == [line]


def test_lines_elsewhere_come_every_ten_seconds(capsys, clock):
    with progress(4000, "encoded", "examples") as advance:
        for seconds in (0, 4, 9.9, 10, 19.9, 23, 29, 33, 43):
            clock[0] = 100.0 + seconds
            advance(40)
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "encoded 160/4000  16 examples/s  eta 4 m",
        "encoded 240/4000  10.4 examples/s  eta 6 m",
        "encoded 320/4000  9.7 examples/s  eta 6 m",
        "encoded 360/4000  8.37 examples/s  eta 7 m",
    ]
    assert captured.err == ""


def test_what_was_done_before_does_not_count_for_the_rate(capsys, clock):
    with progress(100_000, "rolled out", "samples", initial=40_000) as advance:
        clock[0] += 10
        advance(20_000)
    assert capsys.readouterr().out == "rolled out 60000/100000  2000 samples/s  eta 20 s\n"


def test_quick_work_says_nothing(capsys, clock):
    with progress(1000, "encoded", "examples") as advance:
        for _ in range(1000):
            clock[0] += 0.009
            advance(1)
    assert capsys.readouterr() == ("", "")


class Closed(Terminal):
    def __init__(self):
        super().__init__()
        self.close()

    def isatty(self):
        raise ValueError("I/O operation on closed file")


@pytest.mark.parametrize(
    ("out", "err"),
    [
        (Terminal(), io.StringIO()),
        (io.StringIO(), Terminal()),
        (Terminal(), None),
        (Terminal(), Closed()),
        (None, None),
    ],
    ids=["stderr is no terminal", "stdout is no terminal", "no stderr", "closed stderr", "no streams"],
)
def test_no_bar_where_not_both_streams_are_a_terminal(monkeypatch, clock, out, err):
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with progress(10, "encoded", "examples") as advance:
        advance(1)
        assert (sys.stdout, sys.stderr) == (out, err)
        clock[0] += 30
        advance(4)
    if out is not None:
        assert out.getvalue() == "encoded 5/10  0.167 examples/s  eta 30 s\n"
    assert not isinstance(err, Terminal) or isinstance(err, Closed) or err.getvalue() == ""


def test_only_rank_0_has_a_bar(opened, monkeypatch, clock):
    terminal = opened()
    for name, value in {"_rank": 1, "_world": 2, "_says": False}.items():
        monkeypatch.setattr(seppo_fast.utils.logging, name, value)
    with progress(10, "encoded", "examples") as advance:
        clock[0] += 30
        advance(4)
    assert terminal.getvalue() == ""
    monkeypatch.setattr(seppo_fast.utils.logging, "_says", True)  # the first process of a second machine
    with progress(10, "encoded", "examples") as advance:
        clock[0] += 30
        advance(4)
    assert terminal.getvalue() == "encoded 4/10  0.133 examples/s  eta 45 s\n"


def test_a_terminal_that_goes_away_does_not_end_the_work(monkeypatch):
    class Gone(Terminal):
        def write(self, text):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(sys, "stderr", Gone())
    done = []
    with tolerant_output(), progress(3, "encoded", "examples") as advance:
        for number in range(3):
            print("a line", flush=True)
            advance(1)
            done.append(number)
    assert done == [0, 1, 2]


def test_a_narrow_terminal_is_not_wrapped(opened, monkeypatch):
    terminal = opened()
    with progress(4, "encoded", "examples") as advance:
        monkeypatch.setenv("COLUMNS", "12")
        print("a line")
        advance(1)
    assert max(map(len, terminal.getvalue().rpartition("a line\n")[2].split("\r"))) <= COLUMNS - 1
    monkeypatch.setenv("COLUMNS", "1")
    with progress(4, "encoded", "examples") as advance:
        advance(1)
        print("a line")


def test_seconds_for_people():
    assert [duration(seconds) for seconds in (0, 89.4, 90, 600, 5399, 5400, 86400)] == [
        "0 s", "89 s", "2 m", "10 m", "90 m", "1.5 h", "24.0 h",
    ]  # fmt: skip
    assert [duration(3600 * hours) for hours in (47.9, 48, 1000, 9835.9)] == [
        "47.9 h", "2.0 days", "41.7 days", "410 days",
    ]  # fmt: skip


INTERRUPTED = """
import signal, sys
from seppo_fast.utils.logging import tolerant_output
from seppo_fast.utils.progress import progress
with tolerant_output():
    try:
        with progress(100, "encoded", "examples") as advance:
            advance(40)
            print("ready", flush=True)
            while True:
                signal.pause()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
"""


def test_ctrl_c_on_a_real_terminal_leaves_it_clean():
    with on_terminal("-c", INTERRUPTED) as running:
        written = running.read(until="| 40/100 [")
        assert screen(written)[0] == "ready" and screen(written)[1].startswith("encoded:  40%|")
        running.type(b"\x03")
        written = running.read()
        assert running.process.wait() == 0
    assert "^C" in written and screen(written) == ["ready", "interrupted"]
