"""Log-probabilities of tokens against torch's own, with ties and in every type."""

from __future__ import annotations

import pytest
import torch

from depthprune_runtime.evaluation.logprobs import token_logprobs


class Logits:
    """A decoder whose hidden states are the logits."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_they_are_those_of_torch(dtype):
    draw = torch.Generator().manual_seed(3)
    # bfloat16 rounds so coarsely that many rows have several largest
    logits = (torch.randn(700, 300, generator=draw) * 4).round(decimals=1).to(dtype)
    likeliest = logits.float().numpy().argmax(-1)
    ids = torch.where(
        torch.arange(700) % 2 == 0, torch.from_numpy(likeliest), torch.randint(300, (700,), generator=draw)
    )
    found = token_logprobs(Logits(), logits, ids)
    expected = logits.double().log_softmax(-1).gather(1, ids[:, None])[:, 0]
    assert found.logprobs.dtype == torch.float32
    torch.testing.assert_close(found.logprobs.double(), expected, atol=2e-5, rtol=1e-5)
    assert found.greedy.tolist() == (ids.numpy() == likeliest).tolist()


def test_of_equals_the_first_is_greedy():
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0]])
    assert token_logprobs(Logits(), logits, torch.tensor([1])).greedy.item()
    assert not token_logprobs(Logits(), logits, torch.tensor([3])).greedy.item()


def test_logits_of_a_damaged_model_stay_visible():
    logits = torch.tensor([[0.0, float("nan")], [float("inf"), 0.0]])
    assert token_logprobs(Logits(), logits, torch.tensor([0, 0])).logprobs.isnan().all()
