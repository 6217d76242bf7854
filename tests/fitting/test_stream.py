"""One forward pass: decoder, stream and candidates run a sub-layer alike, its norms at both ends included."""

from __future__ import annotations

import pico
import pytest
import torch
from torch.nn.functional import rms_norm

from depthprune_runtime.checkpoint import open_checkpoint
from depthprune_runtime.errors import InputError
from depthprune_runtime.fitting.finite import FiniteStates
from depthprune_runtime.fitting.states import TokenStates
from depthprune_runtime.fitting.stream import Stream, embed
from depthprune_runtime.model.batch import packed
from depthprune_runtime.model.decoder import Decoder, SublayerLoader
from depthprune_runtime.model.sublayers import FFN, Attention
from depthprune_runtime.pruning.finercut.candidates import CandidateScorer

CPU = torch.device("cpu")
WINDOWS = torch.randint(2, pico.VOCAB_SIZE, (5, 24), generator=torch.Generator().manual_seed(5))


def leave(sublayer, out):
    """A norm after the projection, as some families have it."""
    return 0.5 * out / out.pow(2).mean(-1, keepdim=True).sqrt()


@pytest.fixture
def decoder(pico_file, monkeypatch):
    """The pico model with a norm after every projection."""
    for kind in (Attention, FFN):
        monkeypatch.setattr(kind, "leave", leave)
    checkpoint = open_checkpoint(pico_file)
    with torch.inference_mode():
        yield Decoder(checkpoint.spec, checkpoint.tensor, CPU, torch.float32)


def residuals(decoder):
    """The residual stream before every sub-layer and after the last, written out: [N * S, C] each."""
    batch = packed([24] * 5, CPU)
    found = [decoder.embed_tokens.dense()[WINDOWS.flatten()]]
    for sublayer in decoder.sublayers:
        hidden = rms_norm(found[-1], (72,), sublayer.norm, decoder.spec.rms_norm_eps)
        found.append(found[-1] + leave(None, sublayer.project(sublayer.inner(hidden, batch))))
    return found


def test_the_decoder(decoder):
    expected = rms_norm(residuals(decoder)[-1], (72,), decoder.norm, decoder.spec.rms_norm_eps)
    hidden = decoder.hidden_states(WINDOWS.flatten(), packed([24] * 5, CPU))
    torch.testing.assert_close(hidden, expected, atol=1e-4, rtol=1e-4)
    select = torch.tensor([3, 30, 119])
    some = decoder.hidden_states(WINDOWS.flatten(), packed([24] * 5, CPU), select=select)
    torch.testing.assert_close(some, expected[select], atol=1e-4, rtol=1e-4)


def test_the_stream_in_place_and_into_other_states(decoder, pico_file):
    """Batches of two windows and of the one that is left."""
    loader = SublayerLoader(decoder.spec, open_checkpoint(pico_file).tensor, CPU, torch.float32)
    expected = residuals(decoder)
    stream = Stream(24, CPU)
    states, other = (TokenStates.empty(5, 24, 72, CPU, batch_tokens=50) for _ in range(2))
    embed(loader, WINDOWS, states)
    assert torch.equal(states.values.view(-1, 72), expected[0])
    for i, sublayer in enumerate(decoder.sublayers):
        before = states.values.clone()
        inner = TokenStates.empty(5, 24, sublayer.output_weight.shape[1], CPU, batch_tokens=50)
        added = torch.cat(list(stream.outputs(i, sublayer, states, into=other, inner=inner)))
        assert torch.equal(states.values, before)
        torch.testing.assert_close(other.values.view(-1, 72), expected[i + 1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(added, expected[i + 1] - expected[i], atol=1e-4, rtol=1e-4)
        kept = leave(None, sublayer.project(inner.values.view(120, -1)))
        torch.testing.assert_close(kept, added, atol=1e-4, rtol=1e-4)
        stream.advance(i, sublayer, states)
        assert torch.equal(states.values, other.values)


def test_a_stream_wider_than_the_weights_is_rounded_after_the_norm(pico_file):
    """Float32 states through bf16 weights: `enter` rounds once."""
    checkpoint = open_checkpoint(pico_file)
    sublayer = SublayerLoader(checkpoint.spec, checkpoint.tensor, CPU, torch.bfloat16).sublayer(0)
    states = torch.randn(7, 72, generator=torch.Generator().manual_seed(1))
    expected = rms_norm(states, (72,), sublayer.norm.float(), checkpoint.spec.rms_norm_eps)
    torch.testing.assert_close(sublayer.enter(states), expected.bfloat16(), atol=0.0, rtol=2**-7)
    assert sublayer.enter(states.bfloat16()).dtype == torch.bfloat16


def test_the_candidates(decoder):
    """Without the sub-layers that were removed, the last FFN among them."""
    scorer = CandidateScorer(decoder, WINDOWS, "angular")
    gone = [3, 11]
    for index in gone:
        scorer.remove(index)
    scorer._fill(len(scorer.remaining))
    decoder.sublayers = [s for i, s in enumerate(decoder.sublayers) if i not in gone]
    expected = residuals(decoder)
    for index, before in zip(scorer.remaining, expected, strict=False):
        torch.testing.assert_close(scorer._entering[index].view(-1, 72), before, atol=1e-4, rtol=1e-4)


def test_what_is_not_finite_stops_the_stream(decoder, pico_file):
    loader = SublayerLoader(decoder.spec, open_checkpoint(pico_file).tensor, CPU, torch.float32)
    states = TokenStates(torch.zeros(5, 24, 72).index_fill(0, torch.tensor([4]), torch.inf), batch_tokens=50)
    stream = Stream(24, CPU, FiniteStates(loader, "the model"))
    outputs = stream.outputs(2, decoder.sublayers[2], states)
    with pytest.raises(InputError, match="the model: the attention of block 1 leaves hidden states that are not"):
        list(outputs)
