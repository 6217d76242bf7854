"""Pruning and quantising models that are more than a Llama: what works, and what is refused in one line."""

from __future__ import annotations

import dataclasses

import pico
import pytest
import torch

from depthprune_runtime import InputError, Runtime, export_model, prune, quantize
from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.fitting.options import RepairOptions
from depthprune_runtime.healing.heal import check_pair
from depthprune_runtime.host.extension import extension
from depthprune_runtime.model.steps.cpu import DecodeStep
from depthprune_runtime.model.steps.gpu import FusedStep
from depthprune_runtime.plan import Drop, Flatten, Narrow, PrunePlan
from depthprune_runtime.pruning.rebuild import Rebuild
from depthprune_runtime.pruning.surgery import PrunedCheckpoint, pruned_spec

CPU = torch.device("cpu")
WINDOWS = torch.randint(2, pico.VOCAB_SIZE, (24, 32), generator=torch.Generator().manual_seed(0))
SMALL = {"samples": 4, "seq_len": 24, "device": "cpu"}
IDS = list(range(2, 30))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    names = ("smollm3", "phi3", "granite", "olmo2", "gemma2", "gemma3_text")
    home = tmp_path_factory.mktemp("families")
    return {name: pico.save(pico.build_model(name), home / name) for name in names}


@pytest.mark.parametrize("family", ["olmo2", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("options", [{"method": "shortgpt", "blocks": 1}, {"method": "finercut", "sublayers": 1}])
def test_sublayers_drop_without_repair_where_they_end_in_a_norm(folders, family, options, tmp_path):
    result = prune(folders[family], tmp_path / "out.dpr", **options, **SMALL)
    assert result.plan.settings.get("repair") is None
    kept = 4 if "blocks" in options else 5
    runtime = Runtime.load(tmp_path / "out.dpr", device="cpu")
    assert len(runtime.spec.sublayers) == kept
    assert runtime.logits(IDS).isfinite().all()


@pytest.mark.parametrize("family", ["smollm3", "phi3", "granite"])
def test_a_repair_brings_logits_nearer(folders, family):
    """On the calibration tokens: what random weights compute of one token says nothing of another."""
    parent = open_checkpoint(folders[family])
    plan = PrunePlan("test", "", (Drop(2), Drop(3)))
    with torch.inference_mode():
        rebuild = Rebuild(parent, plan, None, RepairOptions(), CPU)
        repaired, _ = rebuild.run(rebuild.walk(WINDOWS))
    models = (parent, repaired, PrunedCheckpoint(parent, plan))
    whole, mended, dropped = (Runtime(model, CPU, torch.float32).logits(WINDOWS) for model in models)
    assert float((mended - whole).norm()) < 0.9 * float((dropped - whole).norm())


def test_a_repair_through_a_norm_is_refused(folders, tmp_path):
    with pytest.raises(InputError, match=r"^repair: .*the attention of block 0 ends in a norm.*use repair none$"):
        prune(folders["gemma2"], tmp_path / "out.dpr", blocks=1, repair="ridge", **SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["olmo2", "gemma3_text"])
def test_flatten_refuses_norms_after_the_projection(folders, family, tmp_path):
    with pytest.raises(InputError, match=r"^flatten: the attention of block 0 cannot merge: it ends in a norm"):
        prune(folders[family], tmp_path / "out.dpr", method="flattengpt", blocks=1, **SMALL)


def test_flatten_refuses_blocks_that_tell_positions_differently(folders):
    spec = open_checkpoint(folders["smollm3"]).spec
    with pytest.raises(InputError, match=r"blocks \[0, 1\] cannot merge, their use_rope differ"):
        pruned_spec(spec, PrunePlan("test", "", (Flatten((0, 1)),)))


@pytest.mark.parametrize("family", ["phi3", "granite"])
def test_flattened_blocks_are_the_blocks_side_by_side(folders, family):
    """Blocks whose residuals hardly change them are one after the other what they are side by side."""
    parent = open_checkpoint(folders[family])
    small = 1e-4
    inner = parent.tensor

    def weak(name):
        return inner(name) * small if name.endswith(("o_proj.weight", "down_proj.weight")) else inner(name)

    parent.tensor = weak
    dense = Runtime(parent, CPU, torch.float32).logits(IDS)
    flat = PrunedCheckpoint(parent, PrunePlan("test", "", (Flatten((0, 1)),)))
    none = PrunedCheckpoint(parent, PrunePlan("test", "", (Drop(0), Drop(1), Drop(2), Drop(3))))
    distances = [float((Runtime(c, CPU, torch.float32).logits(IDS) - dense).norm()) for c in (flat, none)]
    assert distances[0] < 0.05 * distances[1]


def test_heads_that_are_normed_together_cannot_go_one_by_one(folders):
    spec = open_checkpoint(folders["olmo2"]).spec
    with pytest.raises(InputError, match="block 0 norms all its heads at once"):
        pruned_spec(spec, PrunePlan("test", "", (Narrow(0, (0, 1)),)))
    narrow = pruned_spec(spec, PrunePlan("test", "", (Narrow(1, tuple(range(40))),)))
    assert narrow.sublayers[1] == dataclasses.replace(spec.sublayers[1], intermediate_size=40)


@pytest.mark.parametrize("family", ["phi3", "olmo2", "gemma3_text"])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_every_family_quantises(folders, family, method, tmp_path):
    options = {"bits": 8, "group_size": 32, "method": method, "samples": 4, "seq_len": 32, "device": "cpu"}
    quantize(folders[family], tmp_path / "q.dpr", **options)
    dense = Runtime.load(folders[family], device="cpu").logits(IDS)
    coded = Runtime.load(tmp_path / "q.dpr", device="cpu").logits(IDS)
    assert float((coded - dense).norm() / dense.norm()) < 0.2  # GPTQ mends on few tokens here


@pytest.mark.parametrize(
    ("family", "missing"),
    [
        ("smollm3", None),
        ("phi3", None),
        ("granite", None),
        ("gemma2", "attention.post_norm"),
        ("olmo2", "qk_norm_over"),
    ],
)
def test_the_fast_steps_say_what_they_lack(folders, family, missing):
    decoder = Runtime.load(folders[family], device="cpu").decoder
    reasons = {step: step.refuses(decoder) or "" for step in (DecodeStep, FusedStep)}
    if missing is None:
        assert not any(name in reason for reason in reasons.values() for name in decoder.spec.beyond_llama())
        return
    assert reasons[FusedStep].startswith("the fused step has no ") and missing in reasons[FusedStep]
    if extension() is not None:
        assert missing in reasons[DecodeStep]


@pytest.mark.parametrize("target", ["hf", "gguf", "deci"])
def test_exports_refuse_what_they_do_not_say(folders, target, tmp_path):
    with pytest.raises(InputError, match=r"no target of ours says attention\.scale yet"):
        export_model(folders["granite"], tmp_path / "out", target)


def test_healing_refuses_what_it_does_not_compute(folders, tmp_path):
    prune(folders["granite"], tmp_path / "p.dpr", blocks=1, repair="none", **SMALL)
    with pytest.raises(InputError, match=r"healing computes no attention\.scale yet"):
        check_pair(open_checkpoint(tmp_path / "p.dpr"), open_checkpoint(folders["granite"]))
