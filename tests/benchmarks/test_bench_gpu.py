"""What the GPU benchmark can be held to without a GPU: shapes, floors, arguments, and a dry run of its code."""

from __future__ import annotations

import csv
import gc
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_gpu
import pytest
import torch
from on_gpu import decode_kernels, kernels, models
from on_gpu.generation import DENSE, Case, groups
from on_gpu.timing import Budget, Clock, TokenClock
from peers.weights import VARIANTS
from public_models import decode_bytes, prefill_flops

from depthprune_runtime.model.batch import packed

ROOT = Path(__file__).resolve().parents[2]
DryRun = Callable[..., tuple[list[dict[str, Any]], str]]  # arguments -> (rows, what it said)

PUBLIC = {"llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320, "llama-3-8b": 8_030_261_248}


def left(model: str, variant: str) -> tuple[int, int, float]:
    """(attentions, FFNs, share of the parameters) that a variant has."""
    spec, dense = models.variant_spec(model, variant), models.SPECS[model]
    share = spec.num_parameters() / dense.num_parameters()
    return len(spec.attention_sublayers()), len(spec.ffn_sublayers()), share


@pytest.mark.parametrize("model", list(PUBLIC))
def test_models_have_the_size_of_the_public_ones(model: str) -> None:
    assert models.SPECS[model].num_parameters() == PUBLIC[model]


@pytest.mark.parametrize("model", list(models.SPECS))
def test_variants_are_what_their_names_say(model: str) -> None:
    blocks = len(models.SPECS[model].ffn_sublayers())
    assert left(model, "shortgpt 25%")[:2] == (blocks - blocks // 4,) * 2
    attentions, ffns, _ = left(model, "finercut 25%")
    assert attentions + ffns == 2 * blocks - blocks // 2
    assert attentions < ffns
    pairs = len(models.PLANS[model].flattengpt)
    assert left(model, "flattengpt wide")[:2] == (blocks - pairs,) * 2
    assert left(model, "flattengpt 20%")[:2] == (blocks - pairs,) * 2
    if model in PUBLIC:
        assert 0.77 < left(model, "flattengpt 20%")[2] <= 0.8
        assert left(model, "flattengpt wide")[2] == pytest.approx(1, abs=1e-4)  # norms aside


def test_floors_of_llama_2_7b() -> None:
    """13.21 GB of weights a token, 512 KB of keys and values a token of context; merging alone saves no bytes."""
    dense = models.variant_spec("llama-2-7b", "dense")
    assert decode_bytes(dense, 1, 0) == pytest.approx(13.21e9, rel=1e-3)
    assert decode_bytes(dense, 8, 100) - decode_bytes(dense, 8, 0) == 8 * 100 * 512 * 1024
    wide = models.variant_spec("llama-2-7b", "flattengpt wide")
    assert decode_bytes(wide, 8, 100) == pytest.approx(decode_bytes(dense, 8, 100), rel=1e-4)
    narrow = models.variant_spec("llama-2-7b", "flattengpt 20%")
    assert decode_bytes(dense, 1, 0) / decode_bytes(narrow, 1, 0) == pytest.approx(1.27, abs=0.01)
    inner = dense.num_parameters(embeddings=False)
    assert prefill_flops(dense, 2048) == pytest.approx(2 * 2048 * inner + 32 * 2 * 4096 * 2048**2, rel=1e-3)


def test_every_variant_fits_the_pool_and_shares_it() -> None:
    pool = models.make_pool("tiny", VARIANTS[1:], torch.device("cpu"), torch.float32)
    for variant in VARIANTS:
        source = models.Source(models.variant_spec("tiny", variant), pool)
        for name, shape in source.spec.tensor_shapes().items():
            tensor = source.tensor(name)
            assert tensor.shape == shape
            if len(shape) == 2:
                assert tensor.untyped_storage().data_ptr() == pool.untyped_storage().data_ptr()
                assert tensor.storage_offset() % 128 == 0


def test_transformers_gets_the_same_model() -> None:
    source = models.Source(models.SPECS["tiny"], models.make_pool("tiny", (), torch.device("cpu"), torch.float32))
    source.pool.mul_(10)  # so that the logits are far from equal
    ids = torch.arange(3, 40)
    with torch.inference_mode():
        decoder = source.decoder()
        ours = decoder.logits(decoder.hidden_states(ids, packed([len(ids)], source.pool.device)))
        theirs = models.transformers_model(source)(ids[None]).logits[0]
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert ours.std() > 0.05


@pytest.mark.parametrize("op", bench_gpu.KERNELS)
def test_kernels_and_their_peers_compute_the_same(op: str) -> None:
    torch.manual_seed(0)
    sizes = kernels.Sizes(20, (33,), (1, 3))
    made = list(decode_kernels.Shapes(models.SPECS["tiny"], sizes, torch.device("cpu"), torch.float32).of(op))
    for make in made:
        kernel = make()
        assert kernel.op == op
        assert (kernel.flops if kernel.limit == "matmul" else kernel.nbytes) > 0
        if op == "paged_attention":
            continue  # the cache's pages and the peer's rows hold different numbers
        if op == "norm_qkv" or "int" in kernel.shape:
            kernel.ours(), kernel.peer()
            continue  # rotated and not, and inputs of 8 bits on the CPU: they run
        ours, theirs = kernel.ours(), kernel.peer()
        if op in ("add_rms_norm", "linear_add"):
            assert ours.shape == theirs.shape  # each has a residual of its own
        else:
            torch.testing.assert_close(
                ours.flatten(),
                (theirs[0].transpose(0, 1) if op == "varlen_attention" else theirs).flatten(),
                atol=1e-4,
                rtol=1e-4,
            )
    assert len({make().shape for make in made}) == len(made)


def test_bytes_of_a_kernel() -> None:
    (make, *_) = kernels.Shapes(models.SPECS["tiny"], kernels.Sizes(), torch.device("cpu"), torch.bfloat16).of("linear")
    kernel = make()
    assert kernel.shape == "qkv_proj T=1 K=64 N=128"
    assert kernel.nbytes == 2 * (64 + 64 * 128 + 128)


def test_groups_fit_and_are_linked() -> None:
    needs = {DENSE: 4, "a": 3, "b": 3, "c": 9}
    assert groups(needs, math.inf) == [[DENSE, "a", "b", "c"]]
    assert groups(needs, 10) == [[DENSE, "a", "b"], [DENSE, "c"]]
    assert groups(needs, 7) == [[DENSE, "a"], [DENSE, "b"], [DENSE, "c"]]


def test_token_clock_counts_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(100))
    monkeypatch.setattr("on_gpu.timing.time.perf_counter", lambda: float(next(times)))
    clock = TokenClock(batch=2, skip=2)
    for count in (1, 1, 0, 2, 2, 2):  # from second 1 on; a step without tokens asks for no time
        clock.add(count)
    assert clock.first_s == 2.0
    assert clock.rate(4) == (8 - 4) / (5 - 3)
    with pytest.raises(RuntimeError, match="asked for 5 tokens of 2 prompts, got 8"):
        clock.rate(5)
    burst = TokenClock(batch=2, skip=2)  # begins at second 6
    for count in (2, 6):
        burst.add(count)
    assert burst.rate(4) == 6 / (8 - 7)


def test_a_spent_budget_still_gives_one_round() -> None:
    clock = Clock(torch.device("cpu"), Budget(0))
    assert [len(v) for v in clock.rounds({"a": lambda: None, "b": lambda: None}, 5).values()] == [1, 1]
    assert not Budget(None).spent
    assert not Budget(1).spent


def test_prompts_differ_from_round_to_round() -> None:
    case = Case("decode8", 8, 16, 4)
    assert case.prompts(100, 0) == case.prompts(100, 0) != case.prompts(100, 1)
    assert [len(p) for p in case.prompts(100, 0)] == [16] * 8


def test_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    args = bench_gpu.arguments([])
    assert args.output == bench_gpu.RESULTS / "gpu.csv"
    assert args.models == ["llama-2-7b", "llama-2-13b", "llama-3-8b"]
    quick = bench_gpu.arguments(["--quick"])
    assert quick.output is None
    assert quick.models == ["llama-2-7b"]
    assert bench_gpu.arguments(["--device", "cpu", "--quick"]).models == ["tiny"]
    assert bench_gpu.arguments(["--no-record"]).output is None
    for wrong in (["--device", "cpu"], ["--tokens", "1"], ["--minutes", "-1"], ["--output", "rows.txt"]):
        with pytest.raises(SystemExit):
            bench_gpu.arguments(wrong)
    assert "a dry run that measures nothing; add --quick" in capsys.readouterr().err


@pytest.fixture
def dry_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[DryRun]:
    """Its main function on the CPU, here: importing Transformers again would take longer than the run."""

    def run_here(*arguments: str) -> tuple[list[dict[str, Any]], str]:
        monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--device", "cpu", "--quick", "--json", *arguments])
        bench_gpu.main()
        out, err = capsys.readouterr()
        return json.loads(out), err

    gc.collect()
    gc.freeze()  # it collects often, and what other tests hold is most of what there is
    yield run_here
    gc.unfreeze()


def test_a_dry_run_takes_every_path(dry_run: DryRun, tmp_path: Path) -> None:
    output = tmp_path / "rows.csv"
    rows, said = dry_run("--tokens", "4", "--rounds", "1", "--output", str(output))
    stored = list(csv.DictReader(output.open(newline="")))
    assert len(rows) == len(stored) > 50
    assert "skipped" not in said
    for row in rows:
        assert row["median"] > 0
        assert row["machine"] and row["versions"] and row["commit"] and row["command"]
        assert row["runtime"] == "machine" or float(row["of_limit"]) > 0
    for case in bench_gpu.GENERATION:
        own = {r["runtime"]: r for r in rows if r["case"] == case}
        peers = {"transformers eager"} | ({"transformers static, compiled"} if case.startswith("decode") else set())
        assert set(own) == {f"ours {v}" for v in VARIANTS} | peers
        assert own[DENSE]["ratio"] == ""
    assert {r["case"].split()[0] for r in rows if r["unit"] == "us"} == set(bench_gpu.KERNELS)


def test_a_spent_budget_stops_after_the_machine(dry_run: DryRun) -> None:
    rows, said = dry_run("--minutes", "0")
    assert {row["runtime"] for row in rows} == {"machine"}
    assert "skipped: tiny linear: the 0 minutes are over" in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_without_a_gpu_it_says_so() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "bench_gpu.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "bench_gpu: no CUDA device here; `--device cpu --quick` only tries the code"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_gpu_says_what_is_missing(tmp_path: Path) -> None:
    venv = tmp_path / "none"
    command = ["make", "-s", "gpu", f"PYTHON={sys.executable}", f"VENV={venv}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    (said, *_) = done.stderr.splitlines()  # make adds a line of its own
    assert said == f"make gpu: neither {venv}/bin/python nor {sys.executable} has a torch that sees a CUDA device"
