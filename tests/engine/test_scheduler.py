"""The scheduler over a model without tensors: order, budget, memory, preemption, limits."""

from __future__ import annotations

import random
import sys

import pytest
from fake_model import FakeModel, next_token, request, solo
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from depthprune_runtime.engine.errors import EngineFull
from depthprune_runtime.engine.kv_blocks import KVBlockPool
from depthprune_runtime.engine.scheduler import Scheduler
from depthprune_runtime.errors import InputError


def scheduler(kv_blocks=100, size=4, seqs=8, tokens=16, **options) -> Scheduler:
    return Scheduler(KVBlockPool(kv_blocks, size), seqs, tokens, **options)


class Line(RuleBasedStateMachine):
    """Anything in any order: every output is the one of its request alone, and everything ends."""

    @initialize(
        kv_blocks=st.integers(6, 14),
        size=st.sampled_from([1, 2, 4]),
        seqs=st.integers(1, 6),
        extra=st.integers(0, 9),
        caching=st.booleans(),
    )
    def start(self, kv_blocks, size, seqs, extra, caching):
        self.scheduler = Scheduler(KVBlockPool(kv_blocks, size, caching), seqs, seqs + extra, 10, priority_weight=3)
        self.model = FakeModel(self.scheduler)
        self.requests = []

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        max_tokens=st.integers(1, 12),
        priority=st.integers(-1, 2),
        count=st.integers(1, 3),
    )
    def add(self, prompt, max_tokens, priority, count):
        new = [request(prompt, max_tokens, priority) for _ in range(count)]
        room = self.scheduler.pool.num_kv_blocks * self.scheduler.pool.kv_block_size
        try:
            self.scheduler.add(new)
        except InputError:
            assert len(prompt) + max_tokens - 1 > room
        except EngineFull:
            assert self.scheduler.num_waiting + count > 10
        else:
            self.requests += [(r, prompt, max_tokens) for r in new]

    @rule(times=st.integers(1, 5))
    def step(self, times):
        for _ in range(times):
            self.model.step()

    @rule(which=st.integers(0, 30), damaged=st.booleans())
    def abort(self, which, damaged):
        alive = [r for r, _, _ in self.requests if not r.finished]
        if alive:
            victim = alive[which % len(alive)]
            victim.abort()
            self.scheduler.remove(victim, damaged)

    @invariant()
    def whole(self):
        if hasattr(self, "scheduler"):
            self.scheduler.check()

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        self.model.finish()
        assert self.scheduler.pool.num_free == self.scheduler.pool.num_kv_blocks
        for r, prompt, max_tokens in self.requests:
            if r.finish_reason != "abort":
                assert r.output_ids == solo(prompt, max_tokens)


TestLine = Line.TestCase
TestLine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("seed", range(4))
def test_thousands_of_steps(seed):
    rng = random.Random(seed)
    line = scheduler(kv_blocks=40, size=4, seqs=8, tokens=20, max_waiting=12)
    model = FakeModel(line)
    done, refused, steps = [], 0, 0
    shared = [[rng.randrange(5) for _ in range(24)] for _ in range(3)]
    while steps < 1500:
        if rng.random() < 0.25:
            prompt = rng.choice(shared)[: rng.randrange(25)] + [rng.randrange(5) for _ in range(rng.randrange(1, 20))]
            new = request(prompt, rng.randrange(1, 40), rng.randrange(3))
            try:
                line.add([new])
                done.append((new, prompt))
            except EngineFull:
                refused += 1
        model.step()
        steps += 1
    model.finish()
    for r, prompt in done:
        assert r.output_ids == solo(prompt, r.params.max_tokens)
    assert line.num_preemptions > 10
    assert line.num_cached_tokens > 500
    assert line.pool.num_free == 40
    assert refused > 0


def test_decodes_never_wait_for_prefills_and_share_the_budget_with_them():
    line = scheduler(tokens=10, seqs=3)
    model = FakeModel(line)
    line.add([request([1] * 5, 9)])
    line.add([request([2] * 30, 9)])
    assert [(c.start, c.length, c.samples) for c in model.step()] == [(0, 5, True), (0, 5, False)]
    assert [(c.start, c.length, c.samples) for c in model.step()] == [(5, 1, True), (5, 9, False)]
    line.add([request([3] * 3, 9)])
    assert [(c.start, c.length, c.samples) for c in model.step()] == [(6, 1, True), (14, 9, False)]
    assert [(c.start, c.length) for c in model.step()] == [(7, 1), (23, 7), (0, 2)]


def test_first_come_first_served_within_a_priority():
    line = scheduler(seqs=1, tokens=16)
    model = FakeModel(line)
    names = {"a": 1, "b": 0, "c": 1, "d": 0, "e": -5}
    for i, (name, priority) in enumerate(names.items()):
        line.add([request([i], 1, priority, name)])
    order = [model.step()[0].request.request_id for _ in names]
    assert order == ["e", "b", "d", "a", "c"]


def test_nothing_starves():
    """A flood of urgent requests overtakes a patient one less than `priority_weight` times."""
    line = scheduler(seqs=1, priority_weight=50)
    model = FakeModel(line)
    patient = request([9], 1, 1, "patient")
    line.add([patient])
    overtaken = 0
    while not patient.finished:
        line.add([request([overtaken % 7], 1, 0)])
        model.step()
        overtaken += 1
    assert overtaken == 50  # 49 overtook it, the last did not


def test_the_latest_of_the_lowest_priority_is_preempted_and_recomputed():
    line = scheduler(kv_blocks=6, size=2, seqs=4, tokens=20)
    model = FakeModel(line)
    wanted = [request([1, 2], 7, 0, "old"), request([3, 4], 7, 1, "low"), request([5, 6], 7, 0, "new")]
    for r in wanted:
        line.add([r])
    while line.num_preemptions == 0:
        model.step()
    low = wanted[1]
    assert (low.table, low.num_computed) == (None, 0)
    assert low.num_output_tokens > 0
    assert [r.request_id for r in line.running] == ["old", "new"]
    model.finish()
    for r in wanted:
        assert r.output_ids == solo(r.prompt_ids, 7)


def test_equal_prompts_of_one_step_are_computed_once():
    line = scheduler(tokens=64)
    model = FakeModel(line)
    prompt = list(range(21))
    line.add([request(prompt, 3) for _ in range(3)])
    assert [(c.start, c.length) for c in model.step()] == [(0, 21), (20, 1), (20, 1)]
    assert (line.num_prompt_tokens, line.num_cached_tokens) == (63, 40)
    model.finish()


def test_a_prompt_that_is_aborted_in_the_middle_leaves_nothing():
    line = scheduler(tokens=8, seqs=2)
    model = FakeModel(line)
    long = request(list(range(60)), 5)
    line.add([long])
    model.step()
    model.step()
    long.abort()
    line.remove(long)
    line.check()
    assert not line.has_unfinished
    assert line.pool.num_free == 100
    again = request(list(range(60)), 5)  # what was computed is not computed again
    line.add([again])
    assert model.step()[0].start == 16


def test_limits_are_told():
    line = scheduler(kv_blocks=4, size=4, max_waiting=2)
    with pytest.raises(InputError, match="10 prompt and up to 8 new tokens never fit into the KV cache of 16 tokens"):
        line.add([request([1] * 10, 8)])
    line.add([request([1] * 10, 7)])
    with pytest.raises(InputError, match="n: expected at most max_waiting 2, got 3"):
        line.add([request([1], 1) for _ in range(3)])
    with pytest.raises(EngineFull, match="holds 1 of at most 2"):
        line.add([request([1], 1) for _ in range(2)])
    line.check()
    line.add([request([1], 1)])
    FakeModel(line).finish()


class Counted:
    """Counts the calls of the interpreter that happen within it."""

    def __enter__(self):
        self.calls = 0
        sys.setprofile(self._count)
        return self

    def _count(self, frame, event, arg):
        self.calls += event in ("call", "c_call")

    def __exit__(self, *_):
        sys.setprofile(None)


def calls_of_a_step(running: int) -> float:
    line = scheduler(kv_blocks=running * 64, size=16, seqs=running, tokens=running * 128)
    line.add([request([i % 50] * 100, 900) for i in range(running)])
    line.schedule()
    counts = []
    for _ in range(32):  # two kv_blocks of each request
        for r in line.running:
            r.append(7)
        with Counted() as counted:
            assert len(line.schedule()) == running
        counts.append(counted.calls)
    return sum(counts) / len(counts)


def test_the_work_of_a_step_of_decodes_grows_with_their_number_only():
    """A few calls a request, as many among 256 as among 32: a quadratic scheduler makes eight times as many."""
    few, many = calls_of_a_step(32) / 32, calls_of_a_step(256) / 256
    assert many < 1.2 * few
    assert many < 12


def test_admission_leaves_a_free_kv_block_for_each_that_runs():
    """Else what was just admitted would be preempted by the next decode, again and again."""
    line = scheduler(kv_blocks=8, size=4, seqs=4, tokens=64)
    model = FakeModel(line)
    line.add([request([1] * 11, 9)])  # three kv_blocks, a fourth in its second step
    line.add([request([2] * 12, 5)])  # three: five are free, and one of them is kept
    line.add([request([3] * 4, 5)])  # one: two are free, but two others run
    assert [c.length for c in model.step()] == [11, 12]
    assert (len(line.running), line.num_waiting) == (2, 1)
    model.finish()
    assert line.num_preemptions == 0


def test_admission_without_the_reserve_would_preempt():
    """What the reserve is for: the last one fits exactly, and would be thrown out at once."""
    line = scheduler(kv_blocks=6, size=4, seqs=3, tokens=64)
    model = FakeModel(line)
    line.add([request([1] * 8, 9)])
    model.step()
    line.add([request([2] * 16, 2)])  # four kv_blocks, and four are free
    model.step()
    assert [r.num_prompt_tokens for r in line.running] == [8]
    model.finish()
    assert line.num_preemptions == 0


@pytest.mark.parametrize("ahead", [1, 3])
def test_decoded_tokens_are_found_in_the_cache(ahead):
    """A prompt that continues an earlier prompt and its output computes only what is new."""
    line = scheduler(kv_blocks=30, size=4, seqs=2, tokens=64)
    model = FakeModel(line)
    first = request([1, 2, 3], 14)
    line.add([first])
    model.step()
    while not first.finished:
        chunks = line.schedule()
        steps = min(ahead, 14 - first.num_output_tokens)
        assert steps == 1 or line.reserve(chunks, steps)
        for _ in range(steps):  # all but the first are steps that nobody scheduled
            first.append(next_token(first.token_ids))
        if first.finished:
            line.remove(first)
            break
        if steps > 1:
            line.catch_up(first)
        assert line.pool.num_cached == first.num_computed // 4  # while it still runs
    again = request([*first.token_ids, 7], 1)
    line.add([again])
    chunk = line.schedule()[0]
    assert chunk.start == again.num_cached_tokens == 16  # of 3 + 14 tokens; the last was never fed back
