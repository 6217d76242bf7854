"""A few hundred random requests; DEPTHPRUNE_ABUSE_REQUESTS=20000 makes it as many."""

from __future__ import annotations

import asyncio
import os

from abuse import WATCHED, Abuse, leaks

REQUESTS = int(os.environ.get("DEPTHPRUNE_ABUSE_REQUESTS", "300"))


def test_any_requests_leave_the_engine_whole(pico_runtime):
    expected = pico_runtime.generate([7, 8, 9], WATCHED)[0].outputs[0].token_ids

    async def scenario():
        abuse = Abuse(pico_runtime, REQUESTS)
        try:
            await abuse.run()
            assert abuse.engine.errored is None
            return abuse, leaks(abuse)
        finally:
            await abuse.engine.close()

    abuse, left = asyncio.run(scenario())
    assert abuse.unexpected == []
    assert left == dict.fromkeys(left, 0)
    assert sum(abuse.counts.values()) == REQUESTS
    assert {"refused", "left", "cancelled", "ended length", "ended abort"} <= set(abuse.counts)
    assert set(abuse.watched) == {expected}  # what the watched streams say does not hang on the others
