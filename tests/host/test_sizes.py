"""Sizes as text."""

from __future__ import annotations

import pytest

from depthprune_runtime.host.sizes import size_in_bytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("200", 200),
        ("200B", 200),
        ("7 kb", 7_000),
        ("7KiB", 7_168),
        ("10MB", 10_000_000),
        (" 1.5 gib ", 1_610_612_736),
        ("2GiB", 2_147_483_648),
        ("4.35GB", 4_350_000_000),
        ("1.1TB", 1_100_000_000_000),
        ("0.1", 0),
        ("99999999999999999999999999TiB", 99_999_999_999_999_999_999_999_999 * 1_099_511_627_776),
    ],
)
def test_a_size_is_exact(text, nbytes):
    assert size_in_bytes(text) == nbytes


@pytest.mark.parametrize(
    "text",
    ["", "GB", "-5GB", "+5GB", "1e9", "5 parsecs", "2 GiBB", "1.GB", ".5GB", "5 G", "nan", "\u0665GB", "9" * 5000],
)
def test_what_is_no_size_is_none(text):
    assert size_in_bytes(text) is None
