"""What is said on standard error, with a clock of our own."""

import io

import pytest

from gradindex import progress
from gradindex.progress import Progress, duration, size


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_every_thirty_seconds_where_there_is_no_terminal(clock):
    stream = io.StringIO()
    shown = Progress(stream)
    shown.start("encode", 1000, "sequences")
    for _ in range(9):
        clock[0] += 10
        shown.update(100)
    assert stream.getvalue().splitlines() == [
        "  encode: 300/1,000 sequences, about 1 min 10 s left",
        "  encode: 600/1,000 sequences, about 40 s left",
        "  encode: 900/1,000 sequences, about 10 s left",
    ]
    shown.update(100)
    shown.finish()
    assert stream.getvalue().splitlines()[-1] == "encode: 1,000 sequences (1 min 30 s)"


def test_time_is_measured_on_two_batches_after_the_first(clock):
    shown = Progress(io.StringIO())
    shown.start("covariance", 40, "sequences")
    for seconds in (60, 4, 4):  # the first one warms up
        assert not shown.measured
        clock[0] += seconds
        shown.update(8)
    assert shown.measured
    assert shown.seconds_each() == pytest.approx(0.5)


def test_what_is_done_already_is_not_counted_as_speed(clock):
    stream = io.StringIO()
    shown = Progress(stream)
    shown.start("encode", 1000, "sequences", done=900)
    for _ in range(4):
        clock[0] += 31
        shown.update(10)
    assert "940/1,000 sequences, about 3 min 06 s left" in stream.getvalue()


def test_an_unknown_total_is_not_shown(clock):
    stream = io.StringIO()
    shown = Progress(stream)
    shown.start("read", 0, "sequences")
    for _ in range(3):
        clock[0] += 40
        shown.update(5)
    assert stream.getvalue().splitlines() == ["  read: 10 sequences", "  read: 15 sequences"]


def test_a_terminal_gets_a_bar(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    shown = Progress(stream)
    shown.start("encode", 4, "sequences")
    shown.update(3)
    shown.say("a fact")
    shown.finish("done")
    assert "encode" in stream.getvalue() and "a fact\n" in stream.getvalue()
    assert stream.getvalue().splitlines()[-1].startswith("encode: done (")


def test_silent_by_default(capfd):
    shown = Progress()
    shown.say("hello")
    shown.start("encode", 4, "sequences")
    shown.update(4)
    shown.finish()
    assert capfd.readouterr() == ("", "")


def test_durations_and_sizes_as_people_say_them():
    assert [duration(s) for s in (0.04, 9.94, 12.4, 59.6, 200, 3599.4, 18720)] == [
        "0.0 s", "9.9 s", "12 s", "1 min 00 s", "3 min 20 s", "59 min 59 s", "5 h 12 min"]
    assert [size(b) for b in (12, 999, 4104, 16_800_000, 3e9, 7e12)] == [
        "12 bytes", "999 bytes", "4.1 kB", "16.8 MB", "3 GB", "7 TB"]
