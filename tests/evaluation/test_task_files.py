"""Files of tasks: how they are found, read in part, and refused by file and line."""

from __future__ import annotations

import gzip

import pytest
from task_rows import ROWS, SCHEMAS, write

from depthprune_runtime import InputError
from depthprune_runtime.evaluation.task_files import find_task, load_task
from depthprune_runtime.evaluation.tasks import load_tasks


def test_tasks_are_found_by_path_and_by_name(tmp_path, monkeypatch):
    file = write(tmp_path / "piqa.jsonl", ROWS)
    (tmp_path / "hellaswag.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
    monkeypatch.delenv("DEPTHPRUNE_DATA", raising=False)
    assert find_task(str(file)) == file
    assert find_task("piqa") is None
    monkeypatch.setenv("DEPTHPRUNE_DATA", str(tmp_path))
    assert find_task("piqa") == file
    assert find_task("arc_easy") is None
    assert find_task("../piqa") is None
    task = load_task(find_task("hellaswag"), limit=3)
    assert (task.name, len(task.examples)) == ("hellaswag", 3)
    assert task.examples == load_task(file).examples[:3]
    assert len(load_task(file, limit=99).examples) == 4
    with pytest.raises(InputError, match=r"no\.jsonl: no such file"):
        find_task("no.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[1]", "expected a JSON object, got list"),
        ("[" * 100_000, "not JSON that can be read"),
        ('{"context": "c", "choices": ["a", "b"], "gold": 1%s}' % ("0" * 5000), "not JSON that can be read"),
        ('{"context": "c"}', r"choices, contexts or a continuation, got \['context'\]"),
        ('{"choices": ["a", "b"], "gold": 0}', "context: expected a string, got None"),
        ('{"context": "c", "choices": ["a"], "gold": 0}', "choices: expected a list of at least two"),
        ('{"context": "c", "choices": ["a", ""], "gold": 0}', "choices: expected a list of at least two non-empty"),
        ('{"context": "c", "choices": ["a", "b"], "gold": 2}', "gold: expected an index from 0 to 1, got 2"),
        ('{"context": "c", "choices": ["a", "b"], "gold": true}', "gold: expected an index"),
        ('{"contexts": ["a", "b"], "gold": 0}', "continuation: expected a non-empty string"),
        ('{"continuation": "b"}', "context: expected a string, got None"),
        ('{"context": "a", "continuation": ""}', "continuation: expected a non-empty string"),
        ('{"context": [%s], "continuation": "b"}' % ("1," * 9999 + "1"), "context: expected a string, got "),
        ("\udcff", "not UTF-8: byte 0xff"),
    ],
)
def test_bad_rows_are_named_by_file_and_line(tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", ROWS[:2])
    path.write_bytes(path.read_bytes() + line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(InputError, match=rf"bad\.jsonl:3: .*{message}") as error:
        load_task(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 500
    assert len(load_task(path, limit=2).examples) == 2


def test_bad_files(tmp_path):
    mixed = write(tmp_path / "mixed.jsonl", ROWS + SCHEMAS)
    empty = write(tmp_path / "empty.jsonl", [])
    damaged = tmp_path / "damaged.jsonl.gz"
    damaged.write_bytes(gzip.compress(mixed.read_bytes())[:-20])
    for path, message in (
        (mixed, "rows of one kind, got choices and contexts"),
        (empty, "at least one row"),
        (damaged, "damaged gzip"),
    ):
        with pytest.raises(InputError, match=message):
            load_task(path)
    with pytest.raises(InputError, match="limit: expected at least 1, got 0"):
        load_task(mixed, limit=0)
    with pytest.raises(InputError, match="offset: expected at least 0, got -1"):
        load_task(mixed, offset=-1)
    with pytest.raises(InputError, match=r"mixed\.jsonl: expected at least one row after the first 6, got none"):
        load_task(mixed, offset=6)
    with pytest.raises(InputError, match="tasks: expected at least one"):
        load_tasks([])
