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
    """split/speaker/*.wav; with phones also a .phn beside each and speakers.tsv with sexes, with texts also a .txt."""
    for u in synthetic.generate(speakers=speakers, utterances=utterances):
        path = folder / u.split / u.speaker / f"{u.name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, u.waveform, synthetic.SAMPLE_RATE)
        if phones:
            path.with_suffix(".phn").write_text(
                "".join(f"{start} {stop} {label}\n" for start, stop, label in u.phones)
            )
        if texts:
            path.with_suffix(".txt").write_text(u.text.upper() + ".")
    if phones:
        rows = (
            f"{speaker.name}\t{speaker.sex}" for speaker in synthetic.make_speakers(0, *speakers)
        )
        (folder / "speakers.tsv").write_text("\n".join(["speaker\tsex", *rows]) + "\n")
    return folder
