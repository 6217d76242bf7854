"""The split of the built-in text: what one part tells, the other does not."""

from __future__ import annotations

import itertools

from depthprune_runtime.texts import load_text, rows_joined, split_texts

FILLER = [f"Paragraph {n} says a word of its own, {n * n}, and {n**3} beside it." for n in range(200)]


def paragraphs(text):
    return [" ".join(p.split()) for p in text.split("\n\n")]


def side(texts, paragraph):
    """0 for calibration, 1 for the test; the paragraph must be in exactly one."""
    found = [" ".join(paragraph.split()) in paragraphs(part) for part in split_texts(texts)]
    assert sum(found) == 1
    return found.index(True)


def test_both_parts_are_useful():
    assert len(load_text("builtin")) > 200_000
    assert len(load_text("builtin-test")) > 60_000


def test_no_paragraph_is_in_both_parts_or_twice():
    first, second = paragraphs(load_text("builtin")), paragraphs(load_text("builtin-test"))
    assert not set(first) & set(second)
    assert len(set(first)) == len(first)
    assert len(set(second)) == len(second)


def test_no_long_run_of_words_is_in_both_parts():
    runs = [set(), set()]
    for found, name in zip(runs, ("builtin", "builtin-test"), strict=True):
        for paragraph in paragraphs(load_text(name)):
            words = paragraph.split()
            found |= {" ".join(words[i : i + 12]) for i in range(len(words) - 11)}
    assert len(runs[1]) > 1000
    assert not runs[0] & runs[1]


def test_no_long_lines_in_a_row_are_in_both_parts():
    pairs = []
    for name in ("builtin", "builtin-test"):
        lines = [" ".join(line.split()) for line in load_text(name).split("\n")]
        pairs.append({(a, b) for a, b in itertools.pairwise(lines) if min(len(a), len(b)) >= 40})
    assert len(pairs[1]) > 100
    assert not pairs[0] & pairs[1]


def test_a_paragraph_keeps_its_side_whatever_stands_around_it():
    sides = [side(["\n\n".join(FILLER)], p) for p in FILLER]
    assert 20 < sum(sides) < 80  # about a quarter
    assert [side([FILLER[n], *FILLER[::-1]], FILLER[n]) for n in range(0, 200, 10)] == sides[::10]


def test_a_paragraph_wrapped_otherwise_is_the_same():
    wrapped = [p.replace(" a word ", "\n    a word ") for p in FILLER]
    assert split_texts([*FILLER, *wrapped]) == split_texts(FILLER)


def test_paragraphs_that_share_a_run_of_words_go_together():
    chain = [f"{FILLER[n]} {FILLER[n + 1]}" for n in range(0, 60)]
    assert len({side(chain, p) for p in chain}) == 1


def test_a_last_row_needs_no_line_end():
    assert rows_joined("one\n \ntwo\n") == "one\n\n\n\n\ntwo\n"
    assert rows_joined("one\n \ntwo") == "one\n\n\n\n\ntwo"
    assert rows_joined("one") == "one"
    assert rows_joined("") == ""
