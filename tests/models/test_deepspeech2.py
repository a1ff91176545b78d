"""Deep Speech 2: whole utterances in, symbols out, and the features of a Fréchet distance."""

import itertools

import pytest
import torch

from minidvae.data.audio import FEATURE_STFT
from minidvae.models.deepspeech2 import DeepSpeech2, DeepSpeech2Config
from minidvae.models.recognisers import TranscriptBatch
from minidvae.training import checkpoint

BINS, SYMBOLS = 13, ("a", "b", "c")
LENGTHS = torch.tensor([31, 18, 1, 24])


def network(symbols=SYMBOLS, **settings) -> DeepSpeech2:
    torch.manual_seed(0)
    sizes = {
        "bins": BINS,
        "symbols": symbols,
        "channels": (2, 3),
        "width": 6,
        "layers": 2,
    } | settings
    model = DeepSpeech2(DeepSpeech2Config(**sizes))
    model.standardise.set(torch.full((sizes["bins"],), -5.0), torch.full((sizes["bins"],), 2.0))
    return model


def utterances() -> torch.Tensor:
    """(batch, frames, bins), zeros after the end of each, which the statistics do not take to zeros."""
    x = -5 + 2 * torch.randn(
        len(LENGTHS), max(LENGTHS), BINS, generator=torch.Generator().manual_seed(1)
    )
    return x * (torch.arange(x.shape[1]) < LENGTHS[:, None])[..., None]


@pytest.mark.parametrize("channels", [(2,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("architecture", ["gru", "lstm", "rnn"])
def test_shapes(channels, architecture):
    """Every second frame (the paper's stride in time), for utterances of one frame too."""
    model = network(channels=channels, architecture=architecture)
    for frames in range(1, 6):
        lengths = torch.tensor([frames, 1])
        logits, outputs = model.logits(torch.randn(2, frames, BINS), lengths)
        assert logits.shape == (2, -(-frames // 2), 1 + len(SYMBOLS))
        assert outputs.tolist() == [-(-frames // 2), 1]
        assert model.features(torch.randn(2, frames, BINS)).shape == (2, 6)


def test_the_layers_are_those_of_the_paper():
    """Kernels of 11 frames × 41 and 21 bins, of 200 bins ⌈200/8⌉ · 96 inputs to the first recurrent layer."""
    model = network(bins=200, channels=(32, 32, 96), layers=7)
    kernels = [tuple(layer.convolution.weight.shape) for layer in model.convolutions]
    assert kernels == [(32, 1, 11, 41), (32, 32, 11, 21), (96, 32, 11, 21)]
    assert [layer.input_size for layer in model.recurrent] == [25 * 96] + [6] * 6


@pytest.mark.parametrize("settings", [{"channels": ()}, {"architecture": "transformer"}])
def test_what_cannot_be_built(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        network(**settings)


def test_padding_leaks_nothing():
    """An utterance in a batch of longer ones, whatever stands behind its end, gives what it gives alone: in a wrong
    network the padding would reach the last frames through the convolutions, the first through the backward
    direction, and all of them through statistics."""
    model, x = network(channels=(2, 3, 4)), utterances()
    logits, lengths = model.logits(x, LENGTHS)
    features = model.features(x, LENGTHS)
    dirty = torch.where((torch.arange(x.shape[1]) < LENGTHS[:, None])[..., None], x, 1000.0)
    torch.testing.assert_close(model.logits(dirty, LENGTHS)[0], logits)
    for i, length in enumerate(LENGTHS):
        alone, _ = model.logits(x[i : i + 1, :length], LENGTHS[i : i + 1])
        torch.testing.assert_close(logits[i : i + 1, : lengths[i]], alone, rtol=1e-4, atol=1e-5)
        mean = model.features(x[i : i + 1, :length])
        torch.testing.assert_close(features[i : i + 1], mean, rtol=1e-4, atol=1e-5)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        model.features(x[order], LENGTHS[order]), features[order], rtol=1e-4, atol=1e-5
    )


def test_every_output_sees_its_whole_utterance_and_nothing_else():
    model, x = network(), utterances().requires_grad_()
    for place in (0, 8):  # the first and the last output of utterance 1
        logits, _ = model.logits(x, LENGTHS)
        (gradient,) = torch.autograd.grad(logits[1, place, 1], x)
        seen = gradient.abs().sum(-1) > 0
        expected = torch.zeros_like(seen)
        expected[1, : LENGTHS[1]] = True
        assert torch.equal(seen, expected)


def test_features_are_the_mean_of_what_the_output_layer_gets():
    model, x = network(), utterances()[:1]
    seen = []
    model.output.register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    model.logits(x, LENGTHS[:1])
    torch.testing.assert_close(model.features(x), seen[0].mean(1))


def transcripts(x: torch.Tensor) -> TranscriptBatch:
    labels = torch.tensor([[1, 2, 2, 3], [3, 1, 0, 0], [2, 0, 0, 0], [1, 1, 1, 0]])
    return TranscriptBatch(x, LENGTHS, labels, torch.tensor([4, 2, 1, 3]))


def test_the_loss_sums_over_all_alignments():
    """Against all 4^5 paths of outputs that collapse to the labels (Graves et al. 2006, eq. 3)."""
    model, x = network(), utterances()[:1, :10]
    lengths, labels = torch.tensor([10]), (1, 1, 3)
    loss, terms = model.loss(TranscriptBatch(x, lengths, torch.tensor([labels]), torch.tensor([3])))
    log_p = model.logits(x, lengths)[0][0].log_softmax(-1)
    paths = [path for path in itertools.product(range(4), repeat=5) if collapse(path) == labels]
    total = torch.stack([log_p[range(5), path].sum() for path in paths]).logsumexp(0)
    assert loss.item() == pytest.approx(-total.item() / 3, rel=1e-5)
    assert terms["loss"].item() == loss.item() and not terms["loss"].requires_grad


def collapse(path) -> tuple[int, ...]:
    return tuple(symbol for symbol, _ in itertools.groupby(path) if symbol)


def test_gradient_reaches_every_parameter():
    model = network(channels=(2, 3, 4), layers=3)
    model.loss(transcripts(utterances()))[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_handful_of_utterances_is_learnt_by_heart():
    """Symbols as spectral shapes of 4 to 8 frames in noise: after some steps greedy decoding makes no error."""
    random = torch.Generator().manual_seed(0)
    shapes = 2 * torch.randn(3, BINS, generator=random)
    labels = torch.randint(1, 4, (6, 5), generator=random)
    x, lengths = torch.zeros(6, 48, BINS), torch.zeros(6, dtype=torch.int64)
    for i, row in enumerate(labels - 1):
        frames = torch.cat(
            [shapes[k].expand(int(torch.randint(4, 9, (), generator=random)), -1) for k in row]
        )
        lengths[i] = len(frames) + 8
        x[i, 4 : 4 + len(frames)] = frames
        x[i, : lengths[i]] += 0.3 * torch.randn(int(lengths[i]), BINS, generator=random)
    model = network(width=24)
    model.standardise.set(torch.zeros(BINS), torch.ones(BINS))
    batch = TranscriptBatch(x, lengths, labels, torch.full((6,), 5))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(80):
        optimiser.zero_grad()
        model.loss(batch)[0].backward()
        optimiser.step()
    logits, outputs = model.logits(x, lengths)
    for row, best, length in zip(labels, logits.argmax(-1), outputs, strict=True):
        assert collapse(best[:length].tolist()) == tuple(row.tolist())


def test_bf16():
    model, batch = network(), transcripts(utterances())
    exact, features = model.loss(batch)[0], model.features(batch.x, LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        loss, rough = model.loss(batch)[0], model.features(batch.x, LENGTHS)
    loss.backward()
    assert loss.dtype == rough.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.03)
    torch.testing.assert_close(rough, features, rtol=0.05, atol=0.05)


def test_built_anew_for_other_features_and_symbols():
    model = network()
    model.build(9, ("x", "y"))
    assert (model.config.bins, model.config.symbols) == (9, ("x", "y"))
    assert model.logits(torch.randn(1, 7, 9), torch.tensor([7]))[0].shape == (1, 4, 3)


def test_round_trip_through_a_checkpoint(tmp_path):
    model, x = network(), utterances()
    checkpoint.save(tmp_path / "x.pt", "deepspeech2", model, FEATURE_STFT)
    again, _, _ = checkpoint.restore(tmp_path / "x.pt")
    assert again.config == model.config
    assert torch.equal(again.logits(x, LENGTHS)[0], model.logits(x, LENGTHS)[0])
