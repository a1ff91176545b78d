"""The hour of LibriSpeech that this project's tables use, out of an official download (openslr.org/12).

    python studies/librispeech_hour.py ~/LibriSpeech ~/librispeech-hour
    python train.py --model light_dvae --data ~/librispeech-hour

LIBRISPEECH holds train-clean-100 and test-other, each speaker/chapter/utterance.flac. TARGET, about 65 MB, gets copies
split/speaker/utterance.flac of the utterances in docs/data/librispeech-hour.tsv, and speakers.tsv with their sexes: 43
minutes of 201 speakers to train on, 10 minutes of 50 speakers for development, 7 minutes of 5 speakers to test on. The
tables' training and development files were Ogg Vorbis re-encodings of these, so figures may differ in the last digit.
"""

import argparse
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from minidvae.cli import Parser, run
from minidvae.data.corpus import CorpusError

LIST = Path(__file__).parents[1] / "docs" / "data" / "librispeech-hour.tsv"


def sources(librispeech: Path) -> list[tuple[Path, Path, str, str]]:
    """Of each utterance in LIST: its file in an official download, its path in the hour's folder, its speaker's id and
    sex. CorpusError where files are missing."""
    rows = []
    for line in LIST.read_text().splitlines()[1:]:
        utterance, subset, speaker, sex, split = line.split("\t")
        chapter, name = utterance.split("-")[1], f"{utterance}.flac"
        rows.append(
            (
                librispeech / subset / speaker / chapter / name,
                Path(split, speaker, name),
                speaker,
                sex,
            )
        )
    if not librispeech.is_dir():
        raise CorpusError(
            f"{librispeech}: no such folder; expected LibriSpeech with train-clean-100 and test-other in it"
        )
    if missing := [source for source, *_ in rows if not source.is_file()]:
        raise CorpusError(
            f"{librispeech}: {len(missing)} of {len(rows)} utterances are missing (first: {missing[0]})"
        )
    return rows


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
    rows = sources(args.librispeech)
    args.target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory("", "librispeech-hour-", args.target.parent) as temporary:
        hour = Path(temporary, "hour")
        for source, place, _, _ in rows:
            (hour / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, hour / place)
        speakers = {
            speaker: f"{speaker}\t{sex}\t{place.parts[0]}" for _, place, speaker, sex in rows
        }
        (hour / "speakers.tsv").write_text(
            "\n".join(["speaker\tsex\tsplit", *speakers.values()]) + "\n"
        )
        hour.rename(args.target)
    counts = Counter(place.parts[0] for _, place, _, _ in rows)
    print(
        f"{args.target}: {', '.join(f'{count} utterances in {split}' for split, count in counts.items())}"
    )


if __name__ == "__main__":
    run(main)
