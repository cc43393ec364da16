"""Amounts and times as people read and write them."""

from __future__ import annotations

import pytest

from cli.shown import decimal, dollars, duration, moment_s, plain, second, span_s, usd


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "0ms"),
        (250, "250ms"),
        (999, "999ms"),
        (1000, "1s"),
        (1001, "2s"),
        (60_000, "1m"),
        (150_000, "2m30s"),
        (3_599_001, "1h"),
        (3_601_000, "1h1m"),
        (86_399_000, "1d"),
        (90_000_000, "1d1h"),
        (530_000_000, "6d4h"),
    ],
)
def test_duration_has_two_units_rounded_up(ms: int, text: str) -> None:
    assert duration(ms) == text


@pytest.mark.parametrize(
    ("micro_usd", "text"),
    [
        (0, "$0.00"),
        (13, "$0.000013"),
        (1_500_000, "$1.50"),
        (1_234_500_000, "$1,234.50"),
        (-2_000_001, "-$2.000001"),
        (10**15, "$1,000,000,000.00"),
    ],
)
def test_dollars_are_exact(micro_usd: int, text: str) -> None:
    assert usd(micro_usd) == text


def test_spans_and_moments_are_read() -> None:
    assert [span_s(text) for text in ("90s", "30m", "12h", "30d", "8w")] == [90, 1800, 43_200, 2_592_000, 4_838_400]
    assert [span_s(text) for text in ("0s", "1", "1y", "-1s", "1.5h")] == [None] * 5
    assert moment_s("2023-11-14T22:13:20") == moment_s("2023-11-14T23:13:20+01:00") == 1_700_000_000
    assert moment_s("soon") is None


def test_plain_text_cannot_steer_a_terminal() -> None:
    assert plain("a\x1b[31m\u202e\nzoë") == "a\\x1b[31m\\u202e\\nzoë"


@pytest.mark.parametrize(
    ("amount", "text"),
    [(8e-05, "$0.00008"), (0.0, "$0.00"), (1234.5, "$1,234.50"), (1e-07, "$0.0000001"), (5, "$5.00")],
)
def test_dollars_have_no_exponent(amount: float, text: str) -> None:
    assert dollars(amount) == text


def test_number_has_no_exponent() -> None:
    assert (decimal(8e-05), decimal(0.5)) == ("0.00008", "0.5")


def test_second_is_utc() -> None:
    assert second(1_700_000_000.9) == "2023-11-14 22:13:20"
