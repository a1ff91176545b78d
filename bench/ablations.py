"""Ablations of HiT-DVAE and LigHT-DVAE (LigHT-DVAE paper, Table 2): six trainings with one budget, then one table.

    python bench/ablations.py --recipe quick --steps 1500 --set own_past=0,0                # built-in corpus
    python bench/ablations.py --data ~/VoiceBank --recipe light2023 --set frames=100        # as in the paper

Inv-s: x makes the queries of the likelihood's decoder, and z the keys and values. Inv-s-NR: the same without residual
connections. GEN: each frame is decoded from the model's own past, GT: from the true one. Started again, the study goes
on where it was interrupted.
"""

import study

from minidvae.command_line import as_json, run, write
from minidvae.experiments import resynthesis

NAMES = {"hit_dvae": "HiT-DVAE", "light_dvae": "LigHT-DVAE"}
VARIANTS = {"plain": "", "inv_s": "-Inv-s", "inv_s_nr": "-Inv-s-NR"}
MODES = {"GEN": "generation", "GT": "teacher_forcing"}

# SI-SDR on VoiceBank as printed: LigHT-DVAE paper, Table 2, GEN and GT
PUBLISHED = {
    "HiT-DVAE": (11.4, 11.5),
    "HiT-DVAE-Inv-s": (3.8, 11.4),
    "HiT-DVAE-Inv-s-NR": (5.8, 5.8),
    "LigHT-DVAE": (11.6, 11.7),
    "LigHT-DVAE-Inv-s": (3.9, 10.9),
    "LigHT-DVAE-Inv-s-NR": (5.7, 5.7),
}


def main() -> None:
    arguments, common = study.arguments(__doc__, "runs/ablations")
    variants = {
        name + suffix: ["--model", model, "--set", f"variant={variant}"]
        for model, name in NAMES.items()
        for variant, suffix in VARIANTS.items()
    }
    runs = study.train_all(variants, arguments.runs, common)
    limit = study.given(arguments, "limit")
    results = {mode: study.evaluate_all(runs, ["--mode", flag, *limit]) for mode, flag in MODES.items()}
    write(arguments.runs / "results.json", as_json(results))
    print(f"\nAll numbers: {arguments.runs}/results.json. Past frames: GEN the model's own, GT the true ones.\n")
    print(resynthesis.table({f"{mode} {title}": row for mode, rows in results.items() for title, row in rows.items()}))
    print("\nThe paper's SI-SDR on VoiceBank, GEN and GT (values compare on that corpus only):")
    for title, (generation, truth) in PUBLISHED.items():
        print(f"{title:<20}{generation:>6}{truth:>6}")


if __name__ == "__main__":
    run(main)
