"""Make the hour of LibriSpeech that this project's tables use from an official download
(openslr.org/12).

    python studies/librispeech_hour.py ~/LibriSpeech ~/librispeech-hour
    python train.py --model light_dvae --data ~/librispeech-hour

LIBRISPEECH holds train-clean-100 and test-other, each speaker/chapter/utterance.flac. TARGET, about
65 MB, gets copies split/speaker/utterance.flac of the utterances in docs/data/librispeech-hour.tsv,
and speakers.tsv with their sexes: 43 minutes of 201 speakers to train on, 10 minutes of 50 speakers
for development, 7 minutes of 5 speakers to test on. The tables' training and development files were
Ogg Vorbis re-encodings of these, so figures may differ in the last digit.
"""

import argparse
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from minidvae.cli import Parser, run
from minidvae.data.corpus import CorpusError

LIST = Path(__file__).parents[1] / "docs" / "data" / "librispeech-hour.tsv"


class Row(NamedTuple):
    """A line of LIST."""

    utterance: str  # speaker-chapter-number
    subset: str  # subset of LibriSpeech, such as train-clean-100
    speaker: str
    sex: str  # F or M
    split: str  # train, dev or test

    @property
    def source(self) -> Path:
        """The file in an official download."""
        chapter = self.utterance.split("-")[1]
        return Path(self.subset, self.speaker, chapter, f"{self.utterance}.flac")

    @property
    def target(self) -> Path:
        """The file in the folder of the hour."""
        return Path(self.split, self.speaker, f"{self.utterance}.flac")


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "librispeech", metavar="LIBRISPEECH", type=Path, help="folder of the official download"
    )
    parser.add_argument("target", metavar="TARGET", type=Path, help="folder to be made")
    args = parser.parse_args()
    if args.target.exists():
        raise CorpusError(
            f"{args.target}: is there already; expected the name of a folder to be made"
        )
    rows = read_list()
    check_download(args.librispeech, rows)
    # The folder gets its name when it is complete.
    args.target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory("", "librispeech-hour-", args.target.parent) as temporary:
        hour = Path(temporary, "hour")
        for row in rows:
            file = hour / row.target
            file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(args.librispeech / row.source, file)
        write_speakers(hour / "speakers.tsv", rows)
        hour.rename(args.target)
    counts = Counter(row.split for row in rows)
    parts = [f"{count} utterances in {split}" for split, count in counts.items()]
    print(f"{args.target}: {', '.join(parts)}")


def read_list() -> list[Row]:
    lines = LIST.read_text().splitlines()
    return [Row(*line.split("\t")) for line in lines[1:]]


def check_download(librispeech: Path, rows: list[Row]) -> None:
    """Raise CorpusError where files are missing."""
    if not librispeech.is_dir():
        raise CorpusError(
            f"{librispeech}: no such folder; expected LibriSpeech with train-clean-100 and "
            "test-other in it"
        )
    files = [librispeech / row.source for row in rows]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise CorpusError(
            f"{librispeech}: {len(missing)} of {len(rows)} utterances are missing "
            f"(first: {missing[0]})"
        )


def write_speakers(file: Path, rows: list[Row]) -> None:
    lines = [f"{row.speaker}\t{row.sex}\t{row.split}" for row in rows]
    lines = ["speaker\tsex\tsplit", *dict.fromkeys(lines)]  # each speaker once
    file.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    run(main)
