"""Deep Speech 2: whole utterances in, symbols out, and the features of a Fréchet distance."""

import itertools

import pytest
import torch

from minidvae.data.audio import FEATURE_STFT
from minidvae.models.deepspeech2 import DeepSpeech2, DeepSpeech2Config
from minidvae.models.recognisers import TranscriptBatch
from minidvae.training import checkpoint

BINS = 13
SYMBOLS = ("a", "b", "c")
LENGTHS = torch.tensor([31, 18, 1, 24])


def network(symbols=SYMBOLS, **settings) -> DeepSpeech2:
    torch.manual_seed(0)
    sizes = {"bins": BINS, "symbols": symbols, "channels": (2, 3), "width": 6, "layers": 2}
    sizes |= settings
    model = DeepSpeech2(DeepSpeech2Config(**sizes))
    model.standardise.set(torch.full((sizes["bins"],), -5.0), torch.full((sizes["bins"],), 2.0))
    return model


def utterances() -> torch.Tensor:
    """Return features (batch, frames, bins) with zeros after the end of each utterance, which are
    not zeros to the network once it has standardised them."""
    generator = torch.Generator().manual_seed(1)
    x = -5 + 2 * torch.randn(len(LENGTHS), max(LENGTHS), BINS, generator=generator)
    return x * is_frame(x)


def is_frame(x: torch.Tensor) -> torch.Tensor:
    """Return (batch, frames, 1): true within an utterance, false in the padding."""
    return (torch.arange(x.shape[1]) < LENGTHS[:, None])[..., None]


@pytest.mark.parametrize("channels", [(2,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("architecture", ["gru", "lstm", "rnn"])
def test_shapes(channels, architecture):
    """There is an output for every second frame (the paper's stride in time), also of utterances
    of one frame."""
    model = network(channels=channels, architecture=architecture)
    for frames in range(1, 6):
        lengths = torch.tensor([frames, 1])
        logits, outputs = model.logits(torch.randn(2, frames, BINS), lengths)
        assert logits.shape == (2, -(-frames // 2), 1 + len(SYMBOLS))
        assert outputs.tolist() == [-(-frames // 2), 1]
        assert model.features(torch.randn(2, frames, BINS)).shape == (2, 6)


def test_the_layers_are_those_of_the_paper():
    """Kernels have 11 frames × 41 and 21 bins; of 200 bins the convolutions leave ⌈200/8⌉ · 96
    inputs to the first recurrent layer."""
    model = network(bins=200, channels=(32, 32, 96), layers=7)
    kernels = [tuple(layer.convolution.weight.shape) for layer in model.convolutions]
    assert kernels == [(32, 1, 11, 41), (32, 32, 11, 21), (96, 32, 11, 21)]
    assert [layer.input_size for layer in model.recurrent] == [25 * 96] + [6] * 6


@pytest.mark.parametrize("settings", [{"channels": ()}, {"architecture": "transformer"}])
def test_what_cannot_be_built(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        network(**settings)


def test_padding_leaks_nothing():
    """An utterance in a batch of longer ones must give what it gives alone, whatever the padding
    holds. Otherwise the padding reaches the last frames through the convolutions, the first ones
    through the backward direction, or all of them through statistics."""
    model = network(channels=(2, 3, 4))
    x = utterances()
    logits, lengths = model.logits(x, LENGTHS)
    features = model.features(x, LENGTHS)
    large_padding = torch.where(is_frame(x), x, 1000.0)
    torch.testing.assert_close(model.logits(large_padding, LENGTHS)[0], logits)
    for i, length in enumerate(LENGTHS):
        alone, _ = model.logits(x[i : i + 1, :length], LENGTHS[i : i + 1])
        torch.testing.assert_close(logits[i : i + 1, : lengths[i]], alone, rtol=1e-4, atol=1e-5)
        mean = model.features(x[i : i + 1, :length])
        torch.testing.assert_close(features[i : i + 1], mean, rtol=1e-4, atol=1e-5)
    order = torch.tensor([2, 0, 3, 1])
    reordered = model.features(x[order], LENGTHS[order])
    torch.testing.assert_close(reordered, features[order], rtol=1e-4, atol=1e-5)


def test_every_output_sees_its_whole_utterance_and_nothing_else():
    """Fails if the network is not bidirectional over the utterance, or mixes utterances."""
    model = network()
    x = utterances().requires_grad_()
    for output_index in (0, 8):  # the first and the last output of utterance 1
        logits, _ = model.logits(x, LENGTHS)
        (gradient,) = torch.autograd.grad(logits[1, output_index, 1], x)
        is_seen = gradient.abs().sum(-1) > 0
        expected = torch.zeros_like(is_seen)
        expected[1, : LENGTHS[1]] = True
        assert torch.equal(is_seen, expected)


def test_features_are_the_mean_of_what_the_output_layer_gets():
    """Fails if the Fréchet distance compares activations of another layer."""
    model = network()
    x = utterances()[:1]
    hidden = []
    model.output.register_forward_hook(lambda layer, inputs, output: hidden.append(inputs[0]))
    model.logits(x, LENGTHS[:1])
    torch.testing.assert_close(model.features(x), hidden[0].mean(1))


def transcripts(x: torch.Tensor) -> TranscriptBatch:
    labels = torch.tensor([[1, 2, 2, 3], [3, 1, 0, 0], [2, 0, 0, 0], [1, 1, 1, 0]])
    return TranscriptBatch(x, LENGTHS, labels, torch.tensor([4, 2, 1, 3]))


def test_the_loss_sums_over_all_alignments():
    """The loss must be that of all 4^5 paths of outputs that collapse to the labels (Graves et al.
    2006, eq. 3)."""
    model = network()
    x = utterances()[:1, :10]
    lengths = torch.tensor([10])
    labels = (1, 1, 3)
    loss, terms = model.loss(TranscriptBatch(x, lengths, torch.tensor([labels]), torch.tensor([3])))
    log_p = model.logits(x, lengths)[0][0].log_softmax(-1)
    paths = [path for path in itertools.product(range(4), repeat=5) if collapse(path) == labels]
    total = torch.stack([log_p[range(5), path].sum() for path in paths]).logsumexp(0)
    assert loss.item() == pytest.approx(-total.item() / 3, rel=1e-5)
    assert terms["loss"].item() == loss.item() and not terms["loss"].requires_grad


def collapse(path) -> tuple[int, ...]:
    """Return the symbols of a path: repetitions count once, blanks (0) are left out."""
    return tuple(symbol for symbol, _ in itertools.groupby(path) if symbol)


def test_gradient_reaches_every_parameter():
    model = network(channels=(2, 3, 4), layers=3)
    model.loss(transcripts(utterances()))[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_handful_of_utterances_is_learnt_by_heart():
    """Symbols are spectra of 4 to 8 frames in noise; after some steps greedy decoding must make no
    error. Fails if the loss and the decoding disagree about symbols or frames."""
    generator = torch.Generator().manual_seed(0)
    spectra = 2 * torch.randn(3, BINS, generator=generator)
    labels = torch.randint(1, 4, (6, 5), generator=generator)
    x = torch.zeros(6, 48, BINS)
    lengths = torch.zeros(6, dtype=torch.int64)
    for i, row in enumerate(labels - 1):
        pieces = []
        for symbol in row:
            num_frames = int(torch.randint(4, 9, (), generator=generator))
            pieces.append(spectra[symbol].expand(num_frames, -1))
        frames = torch.cat(pieces)
        lengths[i] = len(frames) + 8
        x[i, 4 : 4 + len(frames)] = frames
        x[i, : lengths[i]] += 0.3 * torch.randn(int(lengths[i]), BINS, generator=generator)
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
    """Under autocast, loss and features must be float32 and near those of full precision."""
    model = network()
    batch = transcripts(utterances())
    expected_loss, _ = model.loss(batch)
    expected_features = model.features(batch.x, LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = model.loss(batch)
        features = model.features(batch.x, LENGTHS)
    loss.backward()
    assert loss.dtype == features.dtype == torch.float32
    assert loss.item() == pytest.approx(expected_loss.item(), rel=0.03)
    torch.testing.assert_close(features, expected_features, rtol=0.05, atol=0.05)


def test_built_anew_for_other_features_and_symbols():
    model = network()
    model.build(9, ("x", "y"))
    assert (model.config.bins, model.config.symbols) == (9, ("x", "y"))
    assert model.logits(torch.randn(1, 7, 9), torch.tensor([7]))[0].shape == (1, 4, 3)


def test_round_trip_through_a_checkpoint(tmp_path):
    model = network()
    x = utterances()
    checkpoint.save(tmp_path / "x.pt", "deepspeech2", model, FEATURE_STFT)
    restored, _, _ = checkpoint.restore(tmp_path / "x.pt")
    assert restored.config == model.config
    assert torch.equal(restored.logits(x, LENGTHS)[0], model.logits(x, LENGTHS)[0])
