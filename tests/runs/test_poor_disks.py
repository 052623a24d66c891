"""Runs survive on disks without file locks, fsync of folders, permissions or allocation."""

import errno
import fcntl
import os

import pytest

import seppo_fast.utils.files as files
from seppo_fast.distributed.machine import Node
from seppo_fast.runs.folder import lock_run_folder
from seppo_fast.train import train
from seppo_fast.utils.errors import CheckpointError, ConfigError
from seppo_fast.utils.files import allocate, staged_folder
from tests.helpers.runs import log_of, tiny_config


def refuse(monkeypatch, module, name, number, only=lambda *args: True):
    """Makes a function fail with an errno, for the arguments where `only` is true."""
    original = getattr(module, name)

    def call(*args, **kwargs):
        if only(*args):
            raise OSError(number, os.strerror(number))
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, call)


def is_folder(handle):
    return os.path.isdir(f"/proc/self/fd/{handle}")


LOCKS = [errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP]


@pytest.mark.parametrize("number", LOCKS, ids=errno.errorcode.get)
def test_without_locks_a_run_goes_on_and_says_so(tiny, tmp_path, monkeypatch, number, capsys):
    refuse(monkeypatch, fcntl, "flock", number)
    refuse(monkeypatch, fcntl, "lockf", number)
    config = tiny_config(tiny, tmp_path, train={"updates": 1}, save={"minutes": 0})
    train(config)
    printed = capsys.readouterr().out
    assert len(log_of(config)) == 1 and (tmp_path / "run" / "weights").is_dir()
    assert printed.count(f"run: this disk does not support file locks ({os.strerror(number)})") == 1
    assert printed.count("cache: files cannot be locked there") == 1
    train(tiny_config(tiny, tmp_path, train={"updates": 2}, save={"minutes": 0}))  # resumes the run on this disk
    assert "resuming after update 1 of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "error", "says"),
    [
        (errno.EAGAIN, ConfigError, "another run is writing to this folder"),
        (errno.EIO, CheckpointError, "cannot be locked"),
    ],
    ids=["held", "broken"],
)
def test_other_failures_of_locks_end_a_run(tmp_path, monkeypatch, number, error, says):
    refuse(monkeypatch, fcntl, "flock", number)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(error, match=says), lock_run_folder(tmp_path / "run", Node()):
        pass
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF], ids=errno.errorcode.get)
def test_without_flushing_of_folders_states_and_caches_are_written_with_a_warning(tiny, tmp_path, monkeypatch, number):
    refuse(monkeypatch, os, "fsync", number, is_folder)
    config = tiny_config(tiny, tmp_path, train={"updates": 1}, save={"minutes": 0})
    with pytest.warns(RuntimeWarning, match="does not support fsync: after a power failure"):
        train(config)
    assert (tmp_path / "run" / "state" / "update-000001" / "manifest.json").is_file()
    assert (tmp_path / "run" / "weights").is_dir()


def test_a_flush_that_fails_ends_the_writing(tmp_path, monkeypatch):
    refuse(monkeypatch, os, "fsync", errno.EIO)
    with pytest.raises(CheckpointError, match="cannot be written"), staged_folder(tmp_path / "made", CheckpointError):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def test_without_permissions_of_unix_folders_are_written_all_the_same(tmp_path, monkeypatch, number):
    refuse(monkeypatch, os, "chmod", number)
    with staged_folder(tmp_path / "made", CheckpointError) as staging:
        (staging / "file").write_text("x")
    assert (tmp_path / "made" / "file").read_text() == "x"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def test_without_allocation_zeros_are_written(tmp_path, monkeypatch, number):
    refuse(monkeypatch, os, "posix_fallocate", number)
    monkeypatch.setattr(files, "_ZEROS", 1000)
    with open(tmp_path / "file", "w+b") as file:
        allocate(file.fileno(), 2501)
        assert file.read() == bytes(2501)
    assert os.stat(tmp_path / "file").st_blocks * 512 >= 2501  # no hole: the space is allocated


def test_an_allocation_without_space_is_refused(tmp_path, monkeypatch):
    refuse(monkeypatch, os, "posix_fallocate", errno.ENOSPC)
    with open(tmp_path / "file", "w+b") as file, pytest.raises(OSError, match="No space left"):
        allocate(file.fileno(), 10)
