"""A small corpus of synthetic speech as a folder of wav files."""

from pathlib import Path

import soundfile

from minidvae.data import synthetic


def write_speech(
    folder: Path,
    speakers: tuple[int, int, int],
    utterances: int,
    phones: bool = False,
    texts: bool = False,
) -> Path:
    """Write a corpus split/speaker/*.wav and return its folder.

    Args:
        folder: to write to.
        speakers: number of speakers in train, dev and test.
        utterances: number of utterances per speaker.
        phones: also write a file .phn for each wav file, and speakers.tsv with the sexes.
        texts: also write a file .txt for each wav file.
    """
    for utterance in synthetic.generate(speakers=speakers, utterances=utterances):
        path = folder / utterance.split / utterance.speaker / f"{utterance.name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, utterance.waveform, synthetic.SAMPLE_RATE)
        if phones:
            lines = [f"{start} {stop} {label}\n" for start, stop, label in utterance.phones]
            path.with_suffix(".phn").write_text("".join(lines))
        if texts:
            path.with_suffix(".txt").write_text(utterance.text.upper() + ".")
    if phones:
        rows = ["speaker\tsex"]
        for speaker in synthetic.make_speakers(0, *speakers):
            rows.append(f"{speaker.name}\t{speaker.sex}")
        (folder / "speakers.tsv").write_text("\n".join(rows) + "\n")
    return folder
