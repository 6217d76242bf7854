"""Stop strings against plain search in the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depthprune_runtime import InputError, SamplingParams
from depthprune_runtime.engine.stop_strings import Match, StopStrings

STOPS = st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=6)


@settings(max_examples=400, deadline=None)
@given(stops=STOPS, pieces=st.lists(st.text("abc", max_size=6), max_size=12))
def test_the_first_match_and_what_must_be_held_back(stops, pieces):
    finder, state, text = StopStrings(stops), 0, ""
    for piece in pieces:
        state, match = finder.scan(state, piece)
        before, text = len(text), text + piece
        starts = [i for i in range(len(text)) if any(text.startswith(s, i) for s in stops)]
        if starts:
            shortest = min((s for s in stops if text.startswith(s, starts[0])), key=len)
            assert match == Match(starts[0] - before, shortest)
            return
        assert match is None
        ends = [text[i:] for i in range(len(text)) if any(s.startswith(text[i:]) for s in stops)]
        assert finder.held(state) == (len(ends[0]) if ends else 0)


def test_reading_costs_the_same_for_any_number_of_stop_strings():
    lookups = 0

    class Counted(dict):
        def get(self, key):
            nonlocal lookups
            lookups += 1
            return super().get(key)

    text = "abcdefgh" * 50
    for stops in (["abx"], [f"{text[i : i + 12]}{chr(0x100 + i)}" for i in range(8)] * 20):
        finder = StopStrings(stops)
        finder._next = Counted(finder._next)
        lookups, state = 0, 0
        for at in range(0, len(text), 4):
            state, match = finder.scan(state, text[at : at + 4])
            assert match is None
        assert len(text) <= lookups <= 2 * len(text)


def test_characters_beyond_the_basic_plane_and_lone_surrogates_are_characters():
    finder = StopStrings(["🙂", "\ud800"])
    assert finder.scan(0, "a🙂")[1] == Match(1, "🙂")
    assert finder.scan(0, "a\ud800")[1] == Match(1, "\ud800")


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (["x"] * 257, "stop: expected at most 256 strings, got 257"),
        (["x" * 4096, "y"], "stop: expected at most 4096 characters together, got 4097"),
    ],
)
def test_more_stop_strings_than_a_request_may_have_are_refused(stop, message):
    with pytest.raises(InputError, match=message):
        SamplingParams(stop=stop)
    assert SamplingParams(stop=["x" * 16] * 256).stop_strings
