"""How often something may happen, and how often it is written down."""

from __future__ import annotations

import io
import json
import logging

import pytest

from secfunet.service.flood_log import FloodLog, excerpt
from secfunet.service.logs import JsonFormatter
from secfunet.service.rate import TokenBucket, TokenBuckets


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def lines() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def logger(lines: io.StringIO) -> logging.Logger:
    logger = logging.Logger("test")
    handler = logging.StreamHandler(lines)
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    return logger


def test_a_bucket_lets_its_burst_through_and_then_its_rate(clock: Clock) -> None:
    bucket = TokenBucket(2, 3, clock)
    assert [bucket.take() for _ in range(4)] == [0, 0, 0, pytest.approx(0.5)]
    clock.now += 0.5
    assert bucket.take() == 0
    assert bucket.take() == pytest.approx(0.5)
    clock.now += 100
    assert [bucket.take() > 0 for _ in range(4)] == [False, False, False, True]


def test_each_owner_has_a_bucket_and_the_number_of_them_is_bounded(clock: Clock) -> None:
    buckets = TokenBuckets(1, 1, clock, max_owners=2)
    assert buckets.take("a") == 0
    assert buckets.take("b") == 0
    assert buckets.take("a") > 0
    assert buckets.take("c") == 0
    assert len(buckets) == 2
    assert buckets.take("a") > 0, "b, which was not heard of for longest, made room"
    assert buckets.take("b") == 0


def test_what_is_not_written_is_counted(clock: Clock) -> None:
    log = FloodLog(monotonic=clock)
    assert log.count("busy") == 1
    assert [log.count("busy", 5), log.count("busy"), log.count("foreign")] == [0, 0, 1]
    clock.now = 1.0
    assert log.count("busy") == 7
    clock.now = 3.0
    assert log.count("busy") == 1


def test_a_flood_is_a_line_a_second_for_a_reason(clock: Clock, logger: logging.Logger, lines: io.StringIO) -> None:
    flood = FloodLog(logger, monotonic=clock)
    for _ in range(1000):
        flood.warning("NOT_FOUND", "request refused", {"path": "/id/" + "A" * 7900})
        flood.warning("BUSY", "request refused")
    clock.now += 1
    try:
        raise ValueError("a caller's value")
    except ValueError:
        flood.exception("NOT_FOUND", "request failed")
    written = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert [(line["reason"], line["times"]) for line in written] == [("NOT_FOUND", 1), ("BUSY", 1), ("NOT_FOUND", 1000)]
    assert len(written[0]["path"]) == 301
    assert "ValueError" in written[2]["exception"]


def test_reasons_cannot_be_invented_without_end(clock: Clock, logger: logging.Logger, lines: io.StringIO) -> None:
    flood = FloodLog(logger, monotonic=clock)
    for number in range(5000):
        flood.warning(f"reason {number}", "request refused")
    assert len(lines.getvalue().splitlines()) < 300


@pytest.mark.parametrize(
    ("untrusted", "written"),
    [("web", "web"), ("a\nb\x1b[31m", "a\\nb\\x1b[31m"), ("é€", "é€"), ("\u202e", "\\u202e"), ("\udc80", "\\udc80")],
)
def test_a_callers_text_is_escaped(untrusted: str, written: str) -> None:
    assert excerpt(untrusted) == written


def test_a_callers_text_is_cut() -> None:
    assert excerpt("x" * 1000) == "x" * 100 + "…"
    assert len(excerpt("\U000e0001" * 1000)) <= 1001
