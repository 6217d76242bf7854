"""Rows of bench_cpu.py from what the processes and the machine have shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from common import paired_ratio, spread
from peers.measure import BATCH, CASES, Machine, Measured

LOWER_IS_BETTER = ("load_s", "rss_mb", "rss_baseline_mb", "ttft512")
_UNITS = {
    "load_s": "s",
    "ttft512": "s",
    "rss_mb": "MB",
    "rss_baseline_mb": "MB",
    "matmul_bf16": "GFLOP/s",
    "matmul_fp32": "GFLOP/s",
}
_UNITS |= {"read_large": "GB/s", "read_model": "GB/s"}


class Ratios:
    """How many times better than the best peer, by case, the same turns compared.

    link: samples of `ours` dense beside the peers, used for a second group, in which it runs again without them.
    """

    def __init__(self) -> None:
        self._best: dict[str, Measured] = {}
        self._link: Measured | None = None

    def see(self, group: Sequence[Measured]) -> None:
        for one in group:
            self._link = one if one.candidate.label == "ours" and self._link is None else self._link
            for what, values in one.samples.items() if one.candidate.runtime != "ours" else ():
                best = self._best.get(what)
                if best is None or _better(what, values, best.samples[what]) > 1:
                    self._best[what] = one

    def of(self, one: Measured, what: str, group: Sequence[Measured]) -> tuple[str, str]:
        """(ratio, name of the best peer), empty without a peer."""
        best = self._best.get(what)
        if best is None or what == "rss_baseline_mb":
            return "", ""
        values = one.samples[what]
        if best in group:
            return f"{_better(what, values, best.samples[what]):.3f}", best.candidate.runtime
        again = next((m for m in group if m.candidate.label == "ours"), None)
        if again is None or self._link is None:
            return "", ""
        ratio = _better(what, values, again.samples[what])
        ratio *= _better(what, self._link.samples[what], best.samples[what])
        return f"{ratio:.3f}", best.candidate.runtime


def _better(what: str, values: Sequence[float], others: Sequence[float]) -> float:
    return paired_ratio(others, values) if what in LOWER_IS_BETTER else paired_ratio(values, others)


def limit_share(one: Measured, what: str, tokens: int, machine: Machine) -> tuple[str, str, str]:
    """Decode: bytes a token, share of the measured read bandwidth, its name; otherwise empty.

    Bytes are the weights and the keys and values of a context in its middle; a step of a batch reads weights once.
    """
    if not what.startswith("decode"):
        return "", "", ""
    size = _bytes_per_token(one, what, tokens)
    used = [size * rate / 1e9 for rate in one.samples[what]]
    return str(round(size)), f"{paired_ratio(used, machine.read_model[what]):.3f}", "read_model"


def _bytes_per_token(one: Measured, what: str, tokens: int) -> float:
    case = CASES[what]
    return one.candidate.weight_bytes / case.batch + one.candidate.kv_bytes * (case.length + tokens / 2)


def gain_of_bytes(one: Measured, what: str, tokens: int, group: Sequence[Measured]) -> str:
    """Decode of a pruned model: its speedup over ours dense in the same turns, as a share of the ratio of bytes a token
    reads; 1 where pruning pays in full. Otherwise empty."""
    dense = next((m for m in group if m.candidate.label == "ours"), None)
    if dense is None or one.candidate.runtime != "ours" or one is dense or not what.startswith("decode"):
        return ""
    promised = _bytes_per_token(dense, what, tokens) / _bytes_per_token(one, what, tokens)
    return f"{paired_ratio(one.samples[what], dense.samples[what]) / promised:.3f}"


def _row(what: str, values: Sequence[float]) -> dict[str, Any]:
    stats = {key: float(f"{value:.5g}") for key, value in spread(values).items()}
    return {"what": what, "rounds": len(values), **stats, "unit": _UNITS.get(what, "tokens/s")}


def rows_of(
    group: Sequence[Measured],
    recorded: Sequence[Measured],
    machine: Machine,
    ratios: Ratios,
    head: dict[str, str],
    tokens: int,
    reference: Sequence[int],
) -> list[dict[str, Any]]:
    """recorded: those of `group` that get rows; head: model and precision; reference: tokens of ours, dense."""
    rows = []
    for one in recorded:
        same = ""
        if reference and one.candidate.variant == "dense":
            equal = [a == b for a, b in zip(one.check, reference, strict=True)]
            same = f"{[*equal, False].index(False)}/{len(equal)}"
        for what, values in one.samples.items():
            size, share, limit = limit_share(one, what, tokens, machine)
            ratio, best = ratios.of(one, what, group)
            rows.append(
                {
                    **head,
                    "runtime": one.candidate.runtime,
                    "runtime_version": one.worker.version,
                    "variant": one.candidate.variant,
                    **_row(what, values),
                    "tokens": tokens * (BATCH if what == "decode8" else 1) if what.startswith("decode") else "",
                    "bytes_per_token": size,
                    "of_limit": share,
                    "limit": limit,
                    "ratio_to_best_peer": ratio,
                    "best_peer": best,
                    "gain_of_bytes": gain_of_bytes(one, what, tokens, group),
                    "same_tokens": same,
                    "settings": one.settings,
                }
            )
    empty = dict.fromkeys(rows[0], "") if rows else {}
    machine_rows = [
        {**empty, **head, "runtime": "machine", **_row(what, values)}
        for what, values in machine.samples.items()
        if rows
    ]
    return rows + machine_rows
