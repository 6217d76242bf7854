"""The gate: bytes of unknown origin end in checked values or in one printable line."""

from __future__ import annotations

import struct

import pytest
from safetensors import SafetensorError

from depthprune_runtime import InputError
from depthprune_runtime.checkpoint.gate import parse_json, parse_object, printable, read_object, reading


@pytest.mark.parametrize("text", ['{"a": [1, 2.5, null, "x"]}', "[]", "3", '"\\ud83d\\ude42"', str(2**63 - 1)])
def test_json_is_read(text):
    import json

    assert parse_json(text.encode(), "m.json") == json.loads(text)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe{}", "not UTF-8 at byte 0"),
        (b'{"a": 1, "a": 2}', "key 'a' comes twice"),
        (b"[" * 65 + b"]" * 65, "at most 64 levels"),
        (b"[" * 100_000, "at most 64 levels"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "at most 64 levels"),
        (b"[NaN]", "NaN is no JSON number"),
        (b"[-Infinity]", "-Infinity is no JSON number"),
        (b"[1e400]", "too large"),
        (b"1" + b"0" * 400, "does not fit 64 bits"),
        (b"1" + b"0" * 40_000, "does not fit 64 bits"),
        (str(2**63).encode(), "does not fit 64 bits"),
        (str(-(2**63) - 1).encode(), "does not fit 64 bits"),
        (b'["\\ud800"]', "half a surrogate pair"),
    ],
)
def test_bad_json_is_one_line(data, message):
    with pytest.raises(InputError, match=f"m.json: .*{message}") as error:
        parse_json(data, "m.json")
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


def test_json_of_other_sizes_and_types():
    with pytest.raises(InputError, match="at most 4 bytes of JSON, got 5"):
        parse_json(b"[1,2]", "m.json", max_bytes=4)
    with pytest.raises(InputError, match="expected a JSON object, got list"):
        parse_object(b"[]", "m.json")
    unlimited = 1000000000000000019884624838656  # Transformers' model_max_length where there is none
    assert parse_json(str(unlimited).encode(), "m.json", integer_bits=128) == unlimited


def test_files(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert read_object(tmp_path / "a.json") == {"a": 1}
    with pytest.raises(InputError, match=r"b\.json: cannot be read: No such file"):
        read_object(tmp_path / "b.json")
    with pytest.raises(InputError, match="Is a directory"):
        read_object(tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a\nb\x1b[31m"), TypeError("t"), KeyError("k\n"), IndexError(), OverflowError("o"), RecursionError(),
        MemoryError(), struct.error("s"), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), OSError(5, "I/O"),
        SafetensorError("x" * 60_000),
    ],
    ids=lambda e: type(e).__name__,
)  # fmt: skip
def test_damage_becomes_one_line_that_names_the_file(error):
    with pytest.raises(InputError, match=r"^dir/m\.bin: cannot be read: .") as caught, reading("dir/m.bin"):
        raise error
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_defects_of_ours_stay_visible():
    with pytest.raises(AssertionError), reading("m.bin"):
        raise AssertionError
    with pytest.raises(AttributeError), reading("m.bin"):
        raise AttributeError


def test_bad_input_keeps_its_line_and_is_named_once():
    with pytest.raises(InputError, match=r"^m\.bin: wrong$"), reading("m.bin"):
        raise InputError("wrong")
    with pytest.raises(InputError, match=r"^m\.bin: wrong$"), reading("m.bin"):
        raise InputError("m.bin: wrong")


def test_printable():
    assert printable("naïve 東京") == "naïve 東京"
    assert printable("a\x1b[31m\n\u202e") == "a\\x1b[31m\\n\\u202e"
    assert printable("a\ud800") == "a\\ud800"
    assert printable("x" * 200) == "x" * 200
    assert printable("x" * 201) == "x" * 197 + "..."
    assert len(printable("\x1b" * 60_000)) == 200
    assert [printable("abcdef", n) for n in (1, 3, 4, 6)] == [".", "...", "a...", "abcdef"]
