"""Stop strings and streaming news over arbitrary token boundaries."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from depthprune_runtime.engine.params import SamplingParams
from depthprune_runtime.engine.request import Request
from depthprune_runtime.engine.stop_strings import StopStrings

PIECES = ["", "a", "b", "ab", "ba", "aab", "abab", "bb", "c"]


class Pieces:
    """Token i has text PIECES[i]."""

    def push(self, token_id: int) -> str:
        return PIECES[token_id]

    def flush(self) -> str:
        return ""


def run(ids: list[int], stop: list[str], include: bool) -> tuple[Request, list[str]]:
    params = SamplingParams(stop=stop, include_stop_str_in_output=include, max_tokens=len(ids), ignore_eos=True)
    request = Request("r", 0, (1,), params, frozenset(), 10**6, Pieces(), stops=StopStrings(stop))
    news = []
    for token in ids:
        request.append(token)
        news.append(request.take_news())
        if request.finished:
            break
    return request, news


@settings(max_examples=500, deadline=None)
@given(
    ids=st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=5), max_size=3),
    include=st.booleans(),
)
def test_the_output_is_the_text_before_the_first_stop_string(ids, stop, include):
    request, news = run(ids, stop, include)
    seen = "".join(PIECES[i] for i in request.output_ids)
    assert "".join(news) == request.text
    if request.finish_reason == "stop":
        at = min(i for s in stop if (i := seen.find(s)) >= 0)
        assert seen.startswith(request.stop_reason, at)
        assert request.text == seen[: at + (len(request.stop_reason) if include else 0)]
        before = "".join(PIECES[i] for i in request.output_ids[:-1])
        assert not any(s in before for s in stop)  # it stopped as soon as it could
    else:
        assert request.text == seen
        assert not any(s in seen for s in stop)
        assert len(request.output_ids) == len(ids)


def test_a_possible_stop_string_is_held_back_and_released():
    _, news = run([1, 2, 8], ["abab"], include=False)  # a, b, c
    assert news == ["", "", "abc"]


def test_eos_ends_without_text():
    request = Request("r", 0, (1,), SamplingParams(max_tokens=9), frozenset({3}), 100, Pieces())
    request.append(1)
    request.append(3)
    assert (request.text, request.finish_reason, request.stop_reason) == ("a", "stop", None)
    assert request.output().token_ids == (1, 3)


def test_a_special_token_that_is_left_out_ends_an_output_as_a_stop_string():
    for include, text in ((False, "ab"), (True, "ab<|end|>")):
        params = SamplingParams(max_tokens=9, stop="<|end|>", include_stop_str_in_output=include)
        request = Request("r", 0, (1,), params, frozenset(), 100, Pieces(), stop_tokens={0: "<|end|>"})
        request.append(3)
        request.append(0)
        assert (request.text, request.finish_reason, request.stop_reason) == (text, "stop", "<|end|>")
        assert 0 in request.end_ids
