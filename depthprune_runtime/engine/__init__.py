"""Generation and serving: requests, scheduler, KV cache, runner, sampler; `Runtime`, `Engine`, `AsyncEngine`."""
