"""Calls every op and the decode step with arguments that no model has: `python .../degenerate_calls.py NAME ...`

Each name's calls run in a forked child, which says in advance what it is about to do: a signal names its call. Printed
are the calls that ended in anything but a result or one of `ALLOWED`; the exit status is 1 where there was one.
"""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from op_case import Draw
from torch import Tensor

from depthprune_runtime import _C
from depthprune_runtime.ops._library import REFERENCES
from depthprune_runtime.weights.packed import pack
from depthprune_runtime.weights.panels import panel_shape
from depthprune_runtime.weights.quantized import QuantizedWeight, QuantSpec

BF16_ONLY = ("pack_panels", "panel_linear")
ALLOWED = (ValueError, RuntimeError, IndexError, TypeError)
LONGS = (-1, -(2**63), 2**62, 2**63 - 1)
# Sizes of one meaning each, all different, so that equal sizes in two arguments are the same dimension.
T, H, K, D, HALF, P, N, S, B, M, C, F, V = 11, 9, 3, 16, 8, 7, 13, 29, 4, 6, 40, 24, 50
STEPS, RUNS, STOPS = 17, 19, 23


def ramp(*shape: int, below: int) -> Tensor:
    return torch.arange(int(torch.tensor(shape).prod())).view(shape) % below


def _quantised(draw: Draw, rows: int, columns: int, bits: int = 4) -> QuantizedWeight:
    spec = QuantSpec(bits, 32, symmetric=False)
    groups = -(-columns // 32)
    codes, zeros = ramp(rows, columns, below=spec.levels), ramp(rows, groups, below=spec.levels)
    return QuantizedWeight.from_codes(spec, codes, draw(rows, groups).float().abs(), zeros)


def _heads(draw: Draw) -> tuple[Tensor, ...]:
    return draw(T, H, D), draw(T, K, D), draw(T, K, D)


def _caches(draw: Draw) -> tuple[Tensor, Tensor]:
    return draw(N, P, K, D), draw(N, P, K, D)


def _state(draw: Draw) -> tuple[Any, ...]:
    columns = [ramp(B, below=7) for _ in range(5)]
    return (
        draw(B, RUNS).float(), ramp(B, RUNS, below=9).int(), ramp(B, below=3), ramp(B, STOPS, below=5),
        ramp(B, M, below=N), P, *columns, torch.zeros(STEPS, B, dtype=torch.int64),
    )  # fmt: skip


BASES: dict[str, Callable[[Draw], tuple[Any, ...]]] = {
    "rms_norm": lambda d: (d(T, C), d(C), 1e-5),
    "add_rms_norm": lambda d: (d(T, C), d(T, C), d(C), 1e-5),
    "head_rms_norm": lambda d: (d(T, H, D), d(H, D), 1e-5),
    "rotary": lambda d: (*_heads(d)[:2], d(S, 2, HALF).float(), ramp(T, below=S)),
    "rotary_kv_write": lambda d: (
        *_heads(d), d(H, D), d(K, D), 1e-5, d(S, 2, HALF).float(), ramp(T, below=S), *_caches(d), ramp(T, below=N * P)
    ),
    "kv_write": lambda d: (*_heads(d)[1:], *_caches(d), ramp(T, below=N * P)),
    "silu_mul": lambda d: (d(T, 2 * F),),
    "linear": lambda d: (d(T, C), d(F, C), d(F)),
    "gated_linear": lambda d: (d(T, C), d(2 * F, C), d(2 * F)),
    "panel_linear": lambda d: (d(T, C), d(*panel_shape(96, C)), d(96), 96, True),
    "pack_panels": lambda d: (d(96, C), d(*panel_shape(96, C))),
    "quantized_linear": lambda d: (
        d(T, C), *_parts(_quantised(d, 96, C)), d(96), 96, 4, 32, True
    ),
    "varlen_attention": lambda d: (*_heads(d), torch.tensor([0, 3, 3, 8, T]), 0.25, 5),
    "paged_attention": lambda d: (
        d(T, H, D), *_caches(d), ramp(B, M, below=N), torch.tensor([3, 40, 17, 5]), torch.tensor([0, 3, 3, 8, T]), 0.25,
        5,
    ),
    "greedy": lambda d: (d(B, V),),
    "js_reverse": lambda d: (d(B, V), d(B, V)),
    "draw_tokens": lambda d: (
        d(B, V), torch.ones(B), torch.rand(STEPS, B, dtype=torch.float64), ramp(B, below=STEPS)
    ),
    "next_tokens": _state,
    "linear_add": lambda d: (d(T, C), d(T, F), *pack(_quantised(d, F, C)), d(F)),
    "norm_linear": lambda d: (d(T, C), d(C), 1e-5, *pack(d(F, C)), d(F)),
    "norm_gated_linear": lambda d: (d(T, C), d(C), 1e-5, *pack(_quantised(d, 2 * F, C)), d(2 * F)),
    "norm_logits": lambda d: (d(T, C), d(C), 1e-5, *pack(d(V, C))),
    "norm_qkv": lambda d: (
        d(T, C), d(C), 1e-5, *pack(_quantised(d, (H + 2 * K) * D, C)), d((H + 2 * K) * D), d(S, 2, HALF).float(),
        ramp(T, below=S), ramp(T, below=N * P), *_caches(d),
    ),
}  # fmt: skip


def _parts(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    return weight.codes, weight.scales, weight.zeros


def resized(t: Tensor, dim: int, size: int) -> Tensor:
    """`t` with dimension `dim` cut, or filled up with zeros."""
    if size <= t.shape[dim]:
        return t.narrow(dim, 0, size).clone()
    return torch.cat([t, t.new_zeros(*t.shape[:dim], size - t.shape[dim], *t.shape[dim + 1 :])], dim)


def tensor_variants(t: Tensor) -> Iterator[tuple[str, Any]]:
    for dim, size in enumerate(t.shape):
        for other in (0, 1, size - 1, size + 1):
            if other != size:
                yield f"size {other} at {dim}", resized(t, dim, other)
    yield "one dimension more", t[None].clone()
    yield "one dimension less", t[0].clone()
    yield "a number", t.flatten()[0].clone()
    yield "strided", torch.stack([t, t], -1)[..., 0]
    yield "transposed", t.transpose(0, -1).contiguous().transpose(0, -1)
    yield "one element for all", t.flatten()[:1].view([1] * t.dim()).expand(t.shape)
    yield "meta", t.to("meta")
    yield "sparse", t.to_sparse()
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8,
                  torch.bool, torch.complex64):  # fmt: skip
        if dtype != t.dtype:
            yield str(dtype), t.to(dtype)
    if not t.dtype.is_floating_point:
        for value in LONGS if t.dtype == torch.int64 else (-1,):
            if t.dtype == torch.uint8:
                continue
            yield f"all {value}", torch.full_like(t, value)
            last = t.clone()
            last.view(-1)[-1] = value
            yield f"last {value}", last
    else:
        yield "NaN", torch.full_like(t, torch.nan)


def variants(argument: Any) -> Iterator[tuple[str, Any]]:
    """Degenerate values for one argument."""
    if isinstance(argument, Tensor):
        yield "None", None
        yield from tensor_variants(argument)
    elif isinstance(argument, list):
        yield "empty", []
        yield "one less", argument[:-1]
        yield "one more", [*argument, argument[-1]]
        for i, part in enumerate(argument):
            for name, other in variants(part):
                yield f"[{i}] {name}", [*argument[:i], other, *argument[i + 1 :]]
    elif isinstance(argument, bool):
        yield str(not argument), not argument
    elif isinstance(argument, int):
        for value in (0, 1, 3, 5, 16, *LONGS):
            yield str(value), value
    elif isinstance(argument, float):
        for number in (0.0, -1.0, float("nan"), float("inf")):
            yield str(number), number


def sizes_of(argument: Any) -> set[int]:
    if isinstance(argument, Tensor):
        return set(argument.shape)
    if isinstance(argument, list):
        return set().union(*map(sizes_of, argument)) if argument else set()
    return set()


def replaced(argument: Any, sizes: dict[int, int]) -> Any:
    """`argument` with every size of that meaning changed, in numbers, too."""
    if isinstance(argument, list):
        return [replaced(a, sizes) for a in argument]
    if isinstance(argument, int) and not isinstance(argument, bool):
        return sizes.get(argument, argument)
    if isinstance(argument, Tensor):
        for dim, size in enumerate(argument.shape):
            argument = resized(argument, dim, sizes.get(size, size))
    return argument


def copied(argument: Any) -> Any:
    """So that a call that writes changes nothing of the next."""
    if isinstance(argument, list):
        return [copied(a) for a in argument]
    dense = isinstance(argument, Tensor) and argument.layout == torch.strided and argument.is_contiguous()
    return argument.clone() if dense else argument


def calls(base: tuple[Any, ...]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(what is wrong, arguments): one argument changed, or one or two sizes wherever they occur."""
    yield "nothing", base
    for i, argument in enumerate(base):
        for name, other in variants(argument):
            yield f"argument {i}: {name}", (*base[:i], other, *base[i + 1 :])
    sizes = sorted(sizes_of(list(base)))
    for size, value in itertools.product(sizes, (0, 1)):
        yield f"{value} for {size}", tuple(replaced(a, {size: value}) for a in base)
    for pair in itertools.combinations(sizes, 2):
        yield f"0 for {pair}", tuple(replaced(a, dict.fromkeys(pair, 0)) for a in base)


def try_op(name: str, say: Callable[[str], None]) -> None:
    op = getattr(torch.ops.depthprune, name).default
    for dtype in (torch.bfloat16,) if name in BF16_ONLY else (torch.bfloat16, torch.float32):
        for what, arguments in calls(BASES[name](Draw(dtype, torch.Generator().manual_seed(0)))):
            attempt(f"{dtype}, {what}", lambda a=arguments: op(*map(copied, a)), say)


def attempt(what: str, call: Callable[[], Any], say: Callable[[str], None]) -> Any:
    say(f"> {what}")
    try:
        return call()
    except ALLOWED as error:
        if what.endswith("nothing"):
            say(f"! {what}: {error!r}")
    except AttributeError as error:
        if not what.endswith("None"):  # plain torch looks for what None does not have
            say(f"! {what}: {error!r}")
    except BaseException as error:
        say(f"! {what}: {error!r}")
    return None


class Step:
    """A decode step of one attention and one FFN sub-layer, its arguments by name."""

    def __init__(self, dtype: torch.dtype, quantised: bool) -> None:
        d = Draw(dtype, torch.Generator().manual_seed(0))

        def linear(rows: int, columns: int) -> dict[str, Any]:
            parts, (_, number, bits, group_size) = pack(_quantised(d, rows, columns) if quantised else d(rows, columns))
            return {
                "weight": parts, "bias": d(rows), "out_features": rows, "in_features": columns, "format": number,
                "bits": bits, "group_size": group_size,
            }  # fmt: skip

        k_cache, v_cache = _caches(d)
        self.linears = {
            "qkv": linear((H + 2 * K) * D, C), "o": linear(C, H * D), "gate_up": linear(2 * F, C),
            "down": linear(C, F), "embedding": linear(V, C), "lm_head": linear(V, C),
        }  # fmt: skip
        self.builder: dict[str, Any] = {"dtype": dtype, "hidden_size": C, "eps": 1e-5}
        self.attention: dict[str, Any] = {
            "norm": d(C), "q_norm": d(H, D), "k_norm": d(K, D), "num_heads": H, "num_kv_heads": K, "head_dim": D,
            "scale": 0.25, "window": 5, "rotary": 0, "k_cache": k_cache, "v_cache": v_cache,
        }  # fmt: skip
        self.norm: dict[str, Any] = {"norm": d(C)}
        ids, positions, tables = ramp(B, below=V), torch.tensor([2, 9, 30, 5]), ramp(B, M, below=N)
        table = [d(S + 12, 2, HALF).float()]
        slots = tables.gather(1, (positions // P)[:, None])[:, 0] * P + positions % P
        self.run = (ids, positions, slots, tables, positions + 1, table)
        self.ahead = (ids, positions, tables, table, torch.full((B, STOPS), -1), 3, 1e9)

    def parts(self) -> dict[str, dict[str, Any]]:
        return {"builder": self.builder, "attention": self.attention, "norm": self.norm} | self.linears

    def build(self) -> Any:
        linears = {name: _C.StepLinear(**a) for name, a in self.linears.items()}
        builder = _C.StepBuilder(**self.builder)
        builder.add_attention(**self.attention, qkv=linears["qkv"], o=linears["o"])
        builder.add_ffn(self.norm["norm"], linears["gate_up"], linears["down"])
        builder.set_ends(linears["embedding"], self.norm["norm"], linears["lm_head"])
        return _C.DecodeStep(builder)


def try_step(say: Callable[[str], None]) -> None:
    for dtype, quantised in ((torch.float32, False), (torch.bfloat16, True)):
        kind = f"{dtype}, quantised {quantised}"
        good = Step(dtype, quantised).build()
        for method, base in (("run", Step(dtype, quantised).run), ("ahead", Step(dtype, quantised).ahead)):
            for what, arguments in calls(base):
                call = getattr(good, method)
                attempt(f"{kind}, {method}, {what}", lambda c=call, a=arguments: c(*map(copied, a)), say)
        for part, arguments in Step(dtype, quantised).parts().items():
            for name, argument in arguments.items():
                for what, other in variants(argument):
                    _try_changed(Step(dtype, quantised), part, {name: other}, f"{kind}, {part}, {name}: {what}", say)
        step = Step(dtype, quantised)
        # A head of more rows than the embedding, whole in itself.
        more = V + 40
        bigger = {
            name: resized(a, 0, more) if isinstance(a, Tensor) else a for name, a in step.linears["lm_head"].items()
        }
        if not quantised:
            bigger |= {"weight": [resized(step.linears["lm_head"]["weight"][0], 0, more)], "out_features": more}
            bigger["bias"][V:] = 1e9
            _try_changed(step, "lm_head", bigger, f"{kind}, a head of {more} rows over {V}", say)
    attempt("no ends", lambda: _C.DecodeStep(_C.StepBuilder(torch.float32, C, 1e-5)), say)
    attempt("level", lambda: _C.set_cpu_level("none"), say)


def _try_changed(step: Step, part: str, changes: dict[str, Any], what: str, say: Callable[[str], None]) -> None:
    step.parts()[part].update(changes)
    built = attempt(f"{what}, built", step.build, say)
    if built is not None:
        attempt(f"{what}, run", lambda: built.run(*step.run), say)
        attempt(f"{what}, ahead", lambda: built.ahead(*step.ahead), say)


NAMES = [*REFERENCES, "decode_step"]


def in_child(name: str) -> list[str]:
    """Lines of what went wrong."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)

        def say(line: str) -> None:
            os.write(write, (line.replace("\n", " ")[:300] + "\n").encode())

        try:
            try_step(say) if name == "decode_step" else try_op(name, say)
        except BaseException as error:
            say(f"! the calls themselves: {error!r}")
            os._exit(1)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as lines:
        said = lines.read().splitlines()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found = [f"{name}: {line[2:]}" for line in said if line.startswith("! ")]
    if status != 0:
        found.append(f"{name}: exit status {status} after {said[-1] if said else 'nothing'}")
    if not said:
        found.append(f"{name}: no call was made")
    return found


def main(names: list[str]) -> int:
    import torch._dynamo  # a call with a meta tensor imports it, which takes each child longer than its calls

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # a fork has one thread
    if missing := set(REFERENCES) - set(BASES):
        print(f"no arguments for {sorted(missing)}")
        return 1
    found = [line for name in names or NAMES for line in in_child(name)]
    print("\n".join(found))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
