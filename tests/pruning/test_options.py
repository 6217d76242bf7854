"""The defaults that are shipped: whoever changes one changes what every row says."""

from __future__ import annotations

import pytest

from depthprune_runtime import FinerCutOptions, FlattenGPTOptions, InputError, RepairOptions, ShortGPTOptions, prune
from depthprune_runtime.fitting.options import REPAIR_WINDOWS
from depthprune_runtime.pruning import spans as after_repair
from depthprune_runtime.pruning.method import METHODS, all_methods, load_method


def test_defaults_of_the_methods():
    assert vars(ShortGPTOptions()) == {"score": "auto", "protect_last": None}
    assert vars(FinerCutOptions()) == {
        "distance": "js_reverse",
        "front_protection": 0.4,
        "fast": False,
        "only": None,
        "state_file": None,
    }
    assert vars(FlattenGPTOptions()) == {
        "grouping": "auto",
        "selection": "auto",
        "pairs_only": False,
        "keep_width": 0.0,
        "compensate": True,
        "leverage_lam": 10.0,
    }


def test_defaults_of_the_repair():
    assert vars(RepairOptions()) == {
        "lam": 0.05,
        "weighting": "rms",
        "answers_for": "before",
        "scope": "all",
        "strength": None,
        "samples": None,
        "seq_len": None,
    }
    assert REPAIR_WINDOWS == (128, 512)  # what None stands for


@pytest.mark.parametrize("value", [0, -1, 2.5, "4", True])
@pytest.mark.parametrize("name", ["samples", "seq_len"])
def test_windows_are_counted_in_integers(name, value):
    with pytest.raises(InputError, match=f"repair {name}: expected an integer from 1 on, got"):
        RepairOptions(**{name: value})


@pytest.mark.parametrize(("method", "strength"), [("shortgpt", 1.0), ("finercut", 0.6), ("flattengpt", 1.0)])
def test_strength_of_the_repair(method, strength):
    suits = load_method(method).repair_strength
    assert RepairOptions().suited(suits).strength == strength
    assert RepairOptions(strength=0.3).suited(suits).strength == 0.3


def test_windows_that_decide():
    def windows(repairs):
        return {m.name: m.windows(m.resolved(m.options(), repairs)) for m in all_methods()}

    assert tuple(METHODS) == tuple(windows(False))
    assert windows(False) == {"shortgpt": (128, 256), "finercut": (10, 256), "flattengpt": (64, 512)}
    assert windows(True) == {"shortgpt": (64, 256), "finercut": (10, 256), "flattengpt": (64, 256)}
    assert (after_repair.MAX_SPAN, after_repair._LAM, after_repair._DIRECTIONS) == (6, 0.1, 128)


@pytest.mark.parametrize(
    ("method", "options", "samples", "seq_len"),
    [
        ("shortgpt", {"repair": "none"}, 128, 256),
        ("finercut", {"repair": "none"}, 10, 256),
        ("flattengpt", {"repair": "none", "options": FlattenGPTOptions(keep_width=1.0)}, 64, 256),
        ("shortgpt", {"repair": RepairOptions(samples=4, seq_len=32)}, 64, 256),
    ],
)
def test_the_plan_says_how_many_windows_decided(pico_file, tmp_path, method, options, samples, seq_len):
    """None asked for; windows are no longer than the pico model's context of 256."""
    amount = {"sublayers": 1} if method == "finercut" else {"blocks": 1}
    text = tmp_path / "text"
    text.write_text(" ".join(f"the quick brown fox jumps over {n}" for n in range(9000)))
    made = prune(pico_file, tmp_path / "p", method, **amount, **options, calibration=str(text)).plan
    described = made.settings["calibration"]
    assert (described["samples"], described["seq_len"]) == (samples, seq_len)
