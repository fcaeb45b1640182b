"""Who is dead, also when clocks are set; and what is swept away."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from selfhost.discovery.expiry import Expiry, sweep

PATH = "/store/v1/mdc/a%2Fb%2Fc%2F1"


class Clocks:
    """A wall clock and a monotonic one, both moved by hand; seconds."""

    def __init__(self) -> None:
        self.wall = 1_000_000.0
        self.monotonic = 50.0

    def pass_time(self, seconds: float) -> None:
        """Let time pass, as it does."""
        self.wall += seconds
        self.monotonic += seconds


@pytest.fixture
def clocks() -> Clocks:
    """Give clocks that stand still."""
    return Clocks()


@pytest.fixture
def expiry(clocks: Clocks) -> Expiry:
    """Give an expiry of ten seconds by those clocks."""
    return Expiry(10.0, lambda: clocks.wall, lambda: clocks.monotonic)


def test_stale_is_what_outlived_its_time(clocks: Clocks, expiry: Expiry) -> None:
    """Older than the time to live, not as old."""
    assert not expiry.is_stale(PATH, clocks.wall - 10.0)
    assert expiry.is_stale(PATH, clocks.wall - 10.1)
    assert not expiry.is_stale(PATH, clocks.wall + 3600)


def test_time_that_passes_makes_stale(clocks: Clocks, expiry: Expiry) -> None:
    """However long nobody asked in between."""
    touched = clocks.wall
    assert not expiry.is_stale(PATH, touched)

    clocks.pass_time(3600.0)

    assert expiry.is_stale(PATH, touched)


@pytest.mark.parametrize("jump", [3600.0, -3600.0, 4.0])
def test_clock_that_is_set_makes_nothing_stale_for_one_lifetime(
    clocks: Clocks, expiry: Expiry, jump: float
) -> None:
    """Then owners have touched their records by the new time, and the dead are dead. # catalogue 135."""
    expiry.is_stale(PATH, clocks.wall)

    clocks.wall += jump

    assert not expiry.is_stale(PATH, clocks.wall - 20.0)
    clocks.pass_time(9.9)
    assert not expiry.is_stale(PATH, clocks.wall - 20.0)
    clocks.pass_time(0.2)
    assert expiry.is_stale(PATH, clocks.wall - 20.0)


def test_slewed_clock_is_no_jump(clocks: Clocks, expiry: Expiry) -> None:
    """A clock that is corrected bit by bit drifts far without ever stopping expiry."""
    for _ in range(1000):
        clocks.pass_time(1.0)
        clocks.wall += 0.5
        assert expiry.is_stale(PATH, clocks.wall - 20.0)


def test_file_of_the_future_is_stale_when_nobody_touches_it(clocks: Clocks, expiry: Expiry) -> None:
    """Its owner died before the clock was set back, or on a host whose clock is ahead."""
    touched = clocks.wall
    clocks.wall -= 3600.0
    assert not expiry.is_stale(PATH, touched)

    clocks.pass_time(9.9)
    assert not expiry.is_stale(PATH, touched)
    clocks.pass_time(0.2)
    assert expiry.is_stale(PATH, touched)
    assert not expiry.is_stale(PATH + "2", touched)


def test_owner_whose_clock_is_ahead_lives(clocks: Clocks, expiry: Expiry) -> None:
    """It is seen to touch its record."""
    for _ in range(100):
        clocks.pass_time(10.0)
        assert not expiry.is_stale(PATH, clocks.wall + 3600.0)


def test_sweep_removes_dead_records_and_temporaries_only(
    tmp_path: Path, clocks: Clocks, expiry: Expiry
) -> None:
    """Junk that is not of this layout stays, however old, as do links, directories and what is to be kept."""
    dead = ["a%2Fb%2Fc%2F1", "my-ns%2Fb%2Fc%2F0001", ".tmp_0123456789abcdef"]
    stay = ["README", ".tmp_x", "a%2Fb%2Fc", "a%2Fb%2Fc%2F2"]
    for name in dead + stay:
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (clocks.wall - 20.0,) * 2)
    (tmp_path / "a%2Fb%2Fc%2F3").write_text("")
    os.utime(tmp_path / "a%2Fb%2Fc%2F3", (clocks.wall - 5.0,) * 2)
    (tmp_path / "a%2Fb%2Fc%2F4").symlink_to("README")
    os.utime(tmp_path / "a%2Fb%2Fc%2F4", (clocks.wall - 20.0,) * 2, follow_symlinks=False)
    (tmp_path / "a%2Fb%2Fc%2F5").mkdir()
    os.utime(tmp_path / "a%2Fb%2Fc%2F5", (clocks.wall - 20.0,) * 2)
    before = {path.name for path in tmp_path.iterdir()}

    errors = list(sweep(str(tmp_path), expiry, lambda path: path.endswith("c%2F2")))

    assert errors == []
    assert before - {path.name for path in tmp_path.iterdir()} == set(dead)


def test_sweep_goes_on_after_an_error(
    tmp_path: Path, clocks: Clocks, expiry: Expiry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file that cannot be removed is told of and does not save the others."""
    for name in ("a%2Fb%2Fc%2F1", "a%2Fb%2Fc%2F2"):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (0, 0))
    unlink = os.unlink

    def refuse_one(path: str) -> None:
        if path.endswith("1"):
            raise PermissionError(13, "injected")
        unlink(path)

    monkeypatch.setattr(os, "unlink", refuse_one)

    assert [err.errno for err in sweep(str(tmp_path), expiry, lambda path: False)] == [13]
    assert [path.name for path in tmp_path.iterdir()] == ["a%2Fb%2Fc%2F1"]


def test_sweep_of_what_is_no_directory(tmp_path: Path, expiry: Expiry) -> None:
    """One that is not there needs no sweeping; a file in its place is an error that is told."""
    (tmp_path / "file").write_text("")

    assert list(sweep(str(tmp_path / "missing"), expiry, lambda path: False)) == []
    (error,) = sweep(str(tmp_path / "file"), expiry, lambda path: False)
    assert isinstance(error, NotADirectoryError)
