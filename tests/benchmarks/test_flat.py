"""Tests that memory, threads and files of a run do not grow over 240 updates; `benchmarks.flat` runs 2000."""

import pytest

from benchmarks.flat import LOOKS, Look, growth, long_run, main


@pytest.mark.slow
def test_memory_threads_and_files_stay(tiny, tmp_path, capsys):
    sections = {"model": {"path": str(tiny)}, "data": {"resolution": 16}, "save": {"minutes": 0.01}}
    looks = long_run(tmp_path, 240, **sections)
    assert len(looks) == LOOKS and looks[-1].update == 240
    more = growth(looks)
    assert more["threads"] == more["handles"] == 0
    assert abs(more["files"]) <= 2  # states are written and removed, each with as many files
    # 150 updates lie between: 16 kB per update would be a leak of 30 MB per hour at two seconds per update.
    assert more["memory"] < 150 * 16e3


def test_growth_is_seen():
    looks = [Look(n, 10**6 + 1000 * n, 3 + (n > 20), 7, 50) for n in range(40)]
    assert growth(looks) == {"memory": 20_000, "threads": 1, "handles": 0, "files": 0}
    with pytest.raises(SystemExit):
        main(["--updates", "10"])
