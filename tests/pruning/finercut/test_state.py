"""The state of a search on disk: whole, of this search, of this model, or refused in one line."""

from __future__ import annotations

import dataclasses
import json

import pytest
from specs import plain_spec

from depthprune_runtime import InputError
from depthprune_runtime.pruning.finercut.state import SearchKey, SearchState, Step, _checksum, load_state

KEY = SearchKey("0" * 64, "1" * 64, "js_reverse", 0.4, "exact", "float32")
SPEC = plain_spec(6)
STEPS = [Step(1, 9, "ffn", 4, 0.25, 20.5, 100), Step(2, 4, "attention", 2, 0.5, 18.0, 90)]


@pytest.fixture
def state(tmp_path):
    path = tmp_path / "search.json"
    SearchState(KEY, list(STEPS), {3: 0.125}).save(path)
    return path


def rewrite(path, edit):
    """The file with other contents and the checksum that they have."""
    data = json.loads(path.read_text())
    del data["checksum"]
    edit(data)
    path.write_text(json.dumps({**data, "checksum": _checksum(data)}))


def refused(path) -> str:
    before = path.read_bytes()
    with pytest.raises(InputError) as raised:
        load_state(path, KEY, SPEC)
    assert path.read_bytes() == before
    message = str(raised.value)
    assert message.isprintable()
    assert len(message) < 1500
    return message


def test_what_was_saved_comes_back(state):
    found = load_state(state, KEY, SPEC)
    assert (found.key, found.steps, found.increments) == (KEY, STEPS, {3: 0.125})
    rewrite(state, lambda data: None)  # other spaces mean nothing
    assert load_state(state, KEY, SPEC) == found


@pytest.mark.parametrize("old", ["0.25", '"sublayer": 9', '"block": 4', "0.125", '"evaluations": 20.5'])
def test_every_change_is_noticed(state, old):
    text = state.read_text()
    assert text.count(old) == 1
    state.write_text(text.replace(old, old.replace("5", "6").replace("9", "8").replace("4", "3")))
    assert "checksum" in refused(state)


def test_a_state_without_a_checksum_is_refused(state):
    data = json.loads(state.read_text())
    del data["checksum"]
    state.write_text(json.dumps(data))
    assert "checksum" in refused(state)
    data["key"]["version"] = 1  # as the first release wrote it
    del data["key"]["only"]
    state.write_text(json.dumps(data))
    assert "of another search: expected version 2; got version 1" in refused(state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": 2}, "in order"),
        ({"distance": -0.25}, "step 1: distance: expected a number >= 0, got -0.25"),
        ({"sublayer": 12, "block": 6, "kind": "attention"}, "one of 12 sub-layers"),
        ({"kind": "attention"}, "is not the attention of block 4"),
        ({"block": 3}, "is not the ffn of block 3"),
        ({"sublayer": 4, "kind": "attention", "block": 2}, "removed twice"),
        ({"sublayer": -9}, ">= 0"),
        ({"distance": None}, "distance"),
        ({"distance": "0.1"}, "distance"),
        ({"kind": "\x1b[2J" * 999}, "kind"),
        ({"colour": 1}, "colour"),
    ],
)
def test_steps_that_no_search_takes_are_refused(state, changes, message):
    rewrite(state, lambda data: data["steps"][0].update(changes))
    assert message in refused(state)


@pytest.mark.parametrize("increments", [{"12": 0.5}, {"x": 0.5}, {"-1": 0.5}, {"3": "much"}, [], {"3": None}])
def test_increments_of_other_models_are_refused(state, increments):
    rewrite(state, lambda data: data.update(increments=increments))
    assert "increments" in refused(state)


@pytest.mark.parametrize(
    "text", ["", "[]", "[" * 100_000, "{" + '"key": {}' + "}", '{"key": 1, "key": 2}', "9" * 10_000, "\udc00"]
)
def test_what_is_no_state_is_refused(state, text):
    state.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert "damaged or of another kind" in refused(state)


def test_the_state_of_another_search_is_named(state):
    rewrite(state, lambda data: data["key"].update(distance="\x1b[2J" * 1000))
    assert "expected distance js_reverse; got distance \\x1b" in refused(state)
    assert dataclasses.replace(KEY, mode="fast") != KEY
