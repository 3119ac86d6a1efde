"""What is said on standard error, with a clock of our own."""

import io
import threading

import pytest

from gradindex import progress
from gradindex.progress import Progress, duration, size
from support.waiting import HANG, until


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_every_thirty_seconds_where_there_is_no_terminal(clock):
    stream = io.StringIO()
    shown = Progress(stream)
    shown.start("encode", 1000, "sequences")
    for batch in range(1, 10):
        clock[0] += 10
        shown.update(100)
        if batch % 3 == 0:
            shown.show()
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
    shown.show()
    assert "940/1,000 sequences, about 3 min 06 s left" in stream.getvalue()


def test_an_unknown_total_is_not_shown(clock):
    stream = io.StringIO()
    shown = Progress(stream)
    shown.start("read", 0, "sequences")
    for _ in range(3):
        clock[0] += 40
        shown.update(5)
        shown.show()
    assert stream.getvalue().splitlines() == [
        "  read: 5 sequences, 40 s so far", "  read: 10 sequences, 1 min 20 s so far",
        "  read: 15 sequences, 2 min 00 s so far"]


def test_units_that_are_done_together_are_not_counted_as_speed(clock):
    """Six queries a chunk: ten minutes, then six notes at once. Never "0.0 s left"."""
    stream = io.StringIO()
    shown = Progress(stream)
    shown.start("calibrate", 16, "queries")
    clock[0] += 30
    shown.show()
    clock[0] += 570
    for _ in range(2):
        shown.update(1)
        clock[0] += 0.01
    shown.show()  # which can't know that four more were done with them
    for _ in range(4):
        shown.update(1)
        clock[0] += 0.01
    shown.show()
    clock[0] += 300
    shown.show()
    clock[0] += 300
    for _ in range(6):
        shown.update(1)
    shown.show()
    clock[0] += 100
    shown.show()
    clock[0] += 500  # later than it should be: nothing is known, and nothing said
    shown.show()
    assert stream.getvalue().splitlines() == [
        "  calibrate: 0/16 queries, 30 s so far",
        "  calibrate: 2/16 queries, about 1 h 10 min left",
        "  calibrate: 6/16 queries, about 16 min 40 s left",
        "  calibrate: 6/16 queries, about 11 min 40 s left",
        "  calibrate: 12/16 queries, about 6 min 40 s left",
        "  calibrate: 12/16 queries, about 5 min 00 s left",
        "  calibrate: 12/16 queries, 30 min 00 s so far",
    ]
    assert not shown.measured


@pytest.mark.parametrize("seconds, left", [(0.0, "1.0 s"), (1e-6, "1.0 s"), (3.0, "3.0 s")])
def test_something_is_left_while_anything_is(clock, seconds, left):
    stream = io.StringIO()
    shown = Progress(stream)
    shown.start("encode", 4, "sequences")
    for _ in range(3):
        clock[0] += seconds
        shown.update(1)
    shown.show()
    shown.say_expected(0.0)
    said = f"about {left} left" if seconds else "0.0 s so far"
    assert stream.getvalue().splitlines() == [
        f"  encode: 3/4 sequences, {said}", "expected: about 1.0 s more (measured on two batches)"]


def test_a_batch_that_takes_longer_than_those_before_is_counted(clock):
    stream = io.StringIO()
    shown = Progress(stream)
    shown.start("encode", 100, "sequences")
    for _ in range(3):
        clock[0] += 10
        shown.update(10)
    clock[0] += 10
    shown.show()
    clock[0] += 90
    shown.show()
    assert stream.getvalue().splitlines() == [
        "  encode: 30/100 sequences, about 1 min 00 s left",  # six batches of 10 s
        "  encode: 30/100 sequences, about 4 min 00 s left",  # six as long as the four so far
    ]


def test_a_stage_is_shown_while_nothing_is_done(monkeypatch):
    """A batch of many minutes: lines come by themselves, and end with the stage."""
    monkeypatch.setattr(progress, "EVERY", 0.01)
    stream = io.StringIO()
    shown = Progress(stream)
    before = threading.enumerate()
    shown.start("calibrate", 16, "queries")
    thread, = set(threading.enumerate()) - set(before)
    until(lambda: stream.getvalue().count("calibrate: 0/16 queries") >= 2)
    shown.finish("done")
    thread.join(HANG)
    assert not thread.is_alive()
    assert "calibrate: done" in stream.getvalue()


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
