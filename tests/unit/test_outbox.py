"""Writes behind the study's back: in order, once each, and through a store that is away for a while."""

from __future__ import annotations

import threading
import time

import pytest

from hpsearch.driver.run import outbox as module
from hpsearch.driver.run.outbox import Outbox
from hpsearch.errors import LeaseLostError, StoreAwayError, StoreError


def test_writes_are_done_in_order() -> None:
    done: list[int] = []
    box = Outbox(print)
    for number in range(500):
        box.put(lambda number=number: done.append(number))  # type: ignore[misc]
    box.flush()
    assert done == list(range(500))
    box.close()


def test_nobody_waits_for_a_write() -> None:
    gate, box = threading.Event(), Outbox(print)
    box.put(lambda: gate.wait(10) and None)
    box.put(lambda: None)
    assert not gate.is_set()
    gate.set()
    box.close()


def test_a_store_that_is_away_gets_every_write_when_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SILENCE_S", 0.0)
    notes: list[str] = []
    done: list[int] = []
    tries = 0

    def flaky() -> None:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise StoreAwayError("the store cannot be used: database is locked")
        done.append(0)

    box = Outbox(notes.append)
    box.put(flaky)
    box.put(lambda: done.append(1))
    box.close()
    assert done == [0, 1]
    assert notes[0].startswith("the store cannot be used: database is locked. Trials continue")
    assert notes[1].startswith("the store is back after")
    assert len(notes) == 2


@pytest.mark.parametrize("error", [LeaseLostError("taken over"), StoreError("has ended already"), KeyError("a bug")])
def test_what_does_not_pass_ends_the_writing(error: Exception) -> None:
    done: list[int] = []
    box = Outbox(print)

    def fail() -> None:
        raise error

    box.put(fail)
    box.put(lambda: done.append(1))
    with pytest.raises(type(error)):
        box.flush()
    assert box.error is error
    box.close()
    assert not done, "nothing is written after a write that was not"


def test_a_store_that_stays_away_ends_the_writing() -> None:
    box = Outbox(print, patience_s=0.3)

    def away() -> None:
        raise StoreAwayError("gone")

    box.put(away)
    with pytest.raises(StoreAwayError):
        box.flush()
    box.close()


def test_somebody_who_waits_does_not_wait_for_a_store_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STEP_S", 0.2)
    hangs, box = threading.Event(), Outbox(print)
    box.put(lambda: hangs.wait(30) and None)
    box.hurry(0.3)
    began = time.monotonic()
    with pytest.raises(StoreAwayError, match="does not answer"):
        box.flush()
    box.close()
    assert time.monotonic() - began < 3
    hangs.set()


def test_a_store_that_writes_is_not_given_up_however_late_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STEP_S", 1.0)
    box = Outbox(print)
    for _ in range(10):
        box.put(lambda: time.sleep(0.05))
    box.hurry(0.0)
    box.flush()
    box.close()
