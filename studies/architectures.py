"""FHVAE appendix D, Table 4: FC, RNN, GRU and LSTM, and the bound of a segment of the test set under each.

    python studies/architectures.py --recipe quick                      the built-in corpus
    python studies/architectures.py --recipe fhvae2017 --data TIMIT     as in the paper

16 dimensions for z1 and z2, one hidden layer, α = 0. A training that was interrupted goes on when called again.
"""

from study import arguments, evaluate_all, evaluated, train_all

from minidvae.cli import run
from minidvae.evaluation import report

ARCHITECTURES = {"FC": ("fc", 512), "RNN": ("rnn", 256), "GRU": ("gru", 256), "LSTM": ("lstm", 256)}


def main() -> None:
    args, common = arguments(__doc__, "runs/architectures")
    variants = {}
    for title, (architecture, width) in ARCHITECTURES.items():
        settings = [
            f"architecture={architecture}",
            f"width={width}",
            "alpha=0",
            "z1_latent=16",
            "z2_latent=16",
        ]
        variants[title] = ["--model", "fhvae", "--set", *settings]
    runs = train_all(variants, args.runs, common)
    results = evaluate_all(runs, ["--task", "transformation", *evaluated(args)])
    rows = []
    for title, result in results.items():
        parameters = f"{result['parameters'] / 1e6:.2f} M"
        rows.append([title, str(ARCHITECTURES[title][1]), parameters, f"{result['bound']:.2f}"])
    print(f"\n{report.table(['', 'hidden', 'parameters', 'bound per segment'], rows)}")
    print("\nThe paper's bounds, on TIMIT (values compare on that corpus only):")
    print(report.table(["", "bound per segment"], report.published("transformation", "TIMIT")))


if __name__ == "__main__":
    run(main)
