"""Files of ours with right checksums and wrong contents: one printable line, no traceback, no gigabytes."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from hostile_files import header_of, with_description, with_header, with_header_text, with_text

from depthprune_runtime import InputError, prune
from depthprune_runtime.checkpoint import NativeCheckpoint, open_checkpoint, write_native
from depthprune_runtime.checkpoint.container import read_header
from depthprune_runtime.cli import main
from depthprune_runtime.plan import Drop, PrunePlan
from depthprune_runtime.pruning.surgery import PrunedCheckpoint

SMALL = {"samples": 4, "seq_len": 32}
ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e\x9b31m"


@pytest.fixture(scope="module")
def ranked_file(pico_file, tmp_path_factory):
    """Pruned by FinerCut: its plan holds a ranking."""
    path = tmp_path_factory.mktemp("ranked") / "ranked.safetensors"
    prune(pico_file, path, "finercut", sublayers=2, repair="none", **SMALL)
    return path


def refused(capsys, path) -> str:
    """The message of `inspect`, which must be one printable line."""
    capsys.readouterr()
    for command in (["inspect", str(path)], ["generate", str(path), "-p", "x", "--max-new-tokens", "1"]):
        status = main(command)
        out, err = capsys.readouterr()
        assert (status, out, err.count("\n")) == (1, "", 1), err[-2000:]
        assert err.rstrip("\n").isprintable()
        assert len(err) < 2100
    return err


def put(path, value):
    """An edit that sets what `path` names, such as "spec.rope.theta", to `value`."""

    def edit(content):
        *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
        for parent in parents:
            content = content[parent]
        content[last] = value

    return edit


NESTED = json.loads("[" * 90 + "]" * 90)
DESCRIPTIONS = {
    "a list": lambda _: [],
    "a number": lambda _: 7,
    "no spec": lambda c: c.pop("spec") and None,
    **{
        f"{path} {str(value)[:30]}": put(path, value)
        for path, value in [
            ("format_version", True),
            ("format_version", [ESCAPE]),
            ("dtype", "I8"),
            ("dtype", "U8"),
            ("dtype", []),
            ("dtype", {}),
            ("spec", []),
            ("spec", "x" * 100_000),
            ("spec.sublayers", {}),
            ("spec.sublayers.0", NESTED),
            ("spec.sublayers.0.origin", [6]),
            ("spec.sublayers.0.origin", [10**9]),
            ("spec.sublayers.0.origin", [[0]]),
            ("spec.sublayers.0.origin", 0),
            ("spec.sublayers.0.num_heads", "9"),
            ("spec.sublayers.0.kind", ESCAPE * 1000),
            ("spec.rope.theta", 10**30),
            ("spec.rope.theta", 10**400),
            ("spec.rope.theta", "10000"),
            ("spec.rope.theta", 1e300),
            ("spec.rope.factors", [[1]]),
            ("spec.rms_norm_eps", 10**400),
            ("spec.vocab_size", 10**400),
            ("spec.hidden_size", 2**62),
            ("spec.vocab_size", 10**9),
            ("plan", []),
            ("plan", {"edits": []}),
            ("plan.edits", {}),
            ("plan.edits.0", []),
            ("plan.edits.0.kind", ESCAPE * 1000),
            ("plan.edits.0.sublayer", -1),
            ("plan.edits.0.sublayer", 10**400),
            ("plan.method", 7),
            ("plan.method", None),
            ("plan.settings", []),
            ("plan.settings.ranking", 3),
            ("plan.settings.ranking", [3]),
            ("plan.settings.ranking.0.distance", "far"),
            ("plan.settings.ranking.0.kind", ESCAPE),
            ("plan.settings.ranking.0.block", 10**400),
            ("plan.settings.distance", ["js"]),
            ("plan.settings.removal_order", [[1]]),
            ("provenance", []),
            ("provenance.blocks", 10**9),
            ("provenance.blocks", 7),
            ("provenance.blocks", "6"),
            ("provenance.blocks", -3),
            ("provenance.blocks", 5.5),
            ("provenance.source", NESTED),
            ("checksums", []),
            ("checksums", {"norm.weight": 7}),
            ("checksums", {ESCAPE * 1000: "0" * 16}),
            ("checksums", {"norm.weight": "0" * 15 + "G"}),
            ("quantization", []),
            ("quantization", {ESCAPE * 1000: {}}),
            ("quantization", {"lm_head.weight": 3}),
            ("quantization", {"lm_head.weight": {"bits": [8], "group_size": 32}}),
            ("shards", []),
            ("shards", {"x": 3}),
            ("weight_map", {"norm.weight": ["x"]}),
            ("weight_map", 3),
        ]
    },
}


@pytest.mark.parametrize("edit", DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_descriptions_that_no_writer_makes_are_refused(ranked_file, tmp_path, capsys, edit):
    refused(capsys, with_description(ranked_file, tmp_path / "hostile", edit))


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../model-00001-of-00002-0123456789abcdef.safetensors", "..", "", "x" * 300, "a\0b", ESCAPE,
     "../" * 100 + "x-00001-of-00002-0123456789abcdef.safetensors"],
)  # fmt: skip
def test_shards_lie_beside_their_head(pico_file, tmp_path, capsys, name):
    head = tmp_path / "model.safetensors"
    write_native(head, open_checkpoint(pico_file), max_shard_size=200_000)

    def rename(content):
        first = next(iter(content["shards"]))
        content["shards"][name] = content["shards"].pop(first)
        content["weight_map"] = {k: name if v == first else v for k, v in content["weight_map"].items()}

    assert "name of a shard" in refused(capsys, with_description(head, head, rename))


def test_a_head_that_is_its_own_shard(pico_file, tmp_path, capsys):
    head = tmp_path / "model-00001-of-00002-0123456789abcdef.safetensors"
    write_native(head, open_checkpoint(pico_file), max_shard_size=200_000)
    with_description(head, head, lambda c: c["shards"].update({head.name: "0" * 32}))
    assert "shard of its own" in refused(capsys, head)


TEXTS = {
    "not JSON": "{",
    "null": "null",
    "nested deep": "[" * 100_000,
    "twice": '{"format_version": 1, "format_version": 1}',
    "NaN": '{"format_version": NaN}',
    "digits": '{"format_version": ' + "9" * 100_000 + "}",
    "escapes": '{"' + "\\u001b[2J" * 10_000 + '": 1}',
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_descriptions_that_are_no_json_are_refused(pico_file, tmp_path, capsys, text):
    refused(capsys, with_text(pico_file, tmp_path / "hostile", text))


def entry(**changes):
    return lambda header: header["norm.weight"].update(changes)


def overlap(header):
    names = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    first, second = (next(n for n in names if header[n]["shape"] == [72]), names[-1])
    header[second] = {"dtype": "U8", "shape": [16], "data_offsets": header[first]["data_offsets"][:1] * 2}
    header[second]["data_offsets"][1] += 16


HEADERS = {
    "dtype a list": entry(dtype=[]),
    "dtype an object": entry(dtype={}),
    "dtype escapes": entry(dtype=ESCAPE * 1000),
    "shape a text": entry(shape="72"),
    "shape negative": entry(shape=[-72]),
    "shape of floats": entry(shape=[72.0]),
    "shape true": entry(shape=[True]),
    "shape huge": entry(shape=[2**62, 2**62, 2**62]),
    "shape deep": entry(shape=[1] * 50_000),
    "offsets reversed": entry(data_offsets=[288, 0]),
    "offsets of three": entry(data_offsets=[0, 1, 2]),
    "offsets null": entry(data_offsets=None),
    "another key": entry(stride=[1]),
    "entry a list": lambda h: h.update({"norm.weight": []}),
    "entry null": lambda h: h.update({ESCAPE * 1000: None}),
    "metadata a list": lambda h: h.update({"__metadata__": []}),
    "metadata numbers": lambda h: h["__metadata__"].update({"checksum": 3}),
    "overlap": overlap,
    "a name too many": lambda h: h.update({ESCAPE * 1000: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}),
}


@pytest.mark.parametrize("edit", HEADERS.values(), ids=HEADERS)
def test_headers_that_no_writer_makes_are_refused(pico_file, tmp_path, capsys, edit):
    path = with_header(pico_file, tmp_path / "hostile", edit)
    refused(capsys, path)


def test_keys_that_come_twice_are_refused(pico_file, tmp_path, capsys):
    header, data = header_of(pico_file)
    text = json.dumps(header)
    again = text[:-1] + ', "norm.weight": ' + json.dumps(header["norm.weight"]) + "}"
    assert "comes twice" in refused(capsys, with_header_text(tmp_path / "twice", again.encode(), data))


@pytest.mark.parametrize("text", [b"[" * 100_000, b"\xff\xfe", b"null", b"[]", b"{}", b"1" * 100_000])
def test_headers_that_are_no_object_are_refused(tmp_path, capsys, text):
    refused(capsys, with_header_text(tmp_path / "hostile", text, b""))


def test_holes_and_overlaps_are_named(tmp_path):
    def at(*ranges):
        header = {f"t{i}": {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for i, (a, b) in enumerate(ranges)}
        text = json.dumps(header).encode()
        return read_header(with_header_text(tmp_path / "x", text, b"\0" * max(b for _, b in ranges)))

    assert len(at((0, 4), (4, 8), (8, 8))) == 3
    assert len(at((4, 8), (0, 4))) == 2  # the order of names is free
    for ranges in ([(0, 4), (5, 8)], [(0, 4), (3, 8)], [(1, 4)], [(0, 4), (0, 4)]):
        with pytest.raises(InputError, match="begins at byte"):
            at(*ranges)


@pytest.mark.parametrize("value", [2**40, 10**9])
def test_claims_take_no_memory(pico_file, tmp_path, capsys, value):
    """An address space that holds the process and not what the file claims."""
    path = with_description(pico_file, tmp_path / "claims", put("provenance.blocks", value))
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (512 << 20), before[1]))
    try:
        assert "spec and plan tell of 12 sub-layers only" in refused(capsys, path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_what_a_file_says_is_shown_without_its_escapes(ranked_file, tmp_path, capsys):
    def edit(content):
        content["provenance"] |= {"source": ESCAPE * 3000, "family": "a\nb", "colour": ESCAPE}
        content["plan"]["method"] = ESCAPE + "x" * 60_000
        content["plan"]["settings"]["distance"] = ESCAPE

    path = with_description(ranked_file, tmp_path / ("odd\x1bname"), edit)
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.split("\n"))
    assert len(out) < 5000
    assert main(["inspect", str(path), "--json"]) == 0
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.split("\n"))
    assert json.loads(out)["provenance"]["source"] == ESCAPE * 3000  # JSON is exact
    assert main(["inspect", str(path), "--plot", str(tmp_path / "map.png")]) == 0
    capsys.readouterr()
    assert main(["heal", str(path), "--teacher", str(path), "--data", "builtin", "-o", str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert err.rstrip("\n").isprintable()
    assert len(err) < 1000


def test_plans_of_the_first_release_are_read(pico_file):
    """As commit a2503d9 wrote them, one of each method."""
    step = {"step": 1, "sublayer": 3, "kind": "ffn", "block": 1, "distance": 0.25, "evaluations": 12.5,
            "plain_evaluations": 40}  # fmt: skip
    calibration = {"text": "builtin", "text_sha256": "0" * 64, "samples": 4, "seq_len": 32, "seed": 0}
    repair = {"lam": 0.05, "weighting": "rms", "answers_for": "before", "scope": "all", "strength": 1.0, "samples": 128,
              "seq_len": 512, "calibration": calibration}  # fmt: skip
    for plan in [
        {"method": "finercut", "parent_digest": "0" * 64, "edits": [{"kind": "drop", "sublayer": 3}],
         "settings": {"sublayers": 1, "sparsity": None, "distance": "js_reverse", "front_protection": 0.4,
                      "mode": "exact", "calibration": calibration, "ranking": [step], "evaluations": 12.5,
                      "plain_evaluations": 40, "repair": None}},
        {"method": "shortgpt", "parent_digest": "", "edits": [], "settings": {}},
        {"method": "shortgpt", "parent_digest": "1" * 64,
         "edits": [{"kind": "drop", "sublayer": 2}, {"kind": "drop", "sublayer": 3}],
         "settings": {"blocks": 1, "score": "block-influence", "protect_last": True, "calibration": None,
                      "removal_order": [1, 0], "scores": {"block-influence": [0.1, 0.2]}, "repair": repair}},
        {"method": "flattengpt", "parent_digest": "2" * 64,
         "edits": [{"kind": "flatten", "blocks": [1, 2]}, {"kind": "narrow", "sublayer": 2, "keep": [0, 2, 3]}],
         "settings": {"blocks": 1, "span_errors": [[0, 1, 0.5]], "repair": repair}},
    ]:  # fmt: skip
        read = PrunePlan.from_json(plan)
        assert read.to_json() == plan
        assert read.ranking() == () or read.ranking()[0].distance == 0.25
        assert read.removal_order() in ((), (1, 0))
    view = PrunedCheckpoint(open_checkpoint(pico_file), PrunePlan("test", "", (Drop(3),)))
    assert PrunePlan.from_json(view.plan).edits == (Drop(3),)


def test_sources_that_do_not_say_how_deep_they_were_are_described(pico_file, tmp_path, capsys):
    path = with_description(pico_file, tmp_path / "silent", lambda c: c["provenance"].pop("blocks") and None)
    assert main(["inspect", str(path)]) == 0
    assert "attention ######\n" in capsys.readouterr().out


class Rewritten(NativeCheckpoint):
    """A checkpoint with another description than its file."""

    provenance = property(lambda self: {"blocks": 10**6}, lambda self, value: None)


def test_what_could_not_be_read_is_not_written(pico_file, tmp_path):
    with pytest.raises(InputError, match=r"provenance\.blocks"):
        write_native(tmp_path / "out", Rewritten(pico_file))
    assert list(tmp_path.iterdir()) == []


def test_the_original_still_opens(pico_file, ranked_file):
    for path in (pico_file, ranked_file):
        assert torch.isfinite(open_checkpoint(path).tensor("norm.weight")).all()
