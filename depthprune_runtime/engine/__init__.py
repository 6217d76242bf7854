"""Generation: sampling parameters, requests, KV cache, runner, sampler, `Runtime`."""
