#!/usr/bin/env bash
# The command of every table and figure of the papers, one block for each.
#
#   bash studies/all.sh                                everything, with the settings of the papers
#   RECIPE=quick bash studies/all.sh light-1 fhvae-2   two of them, small
#   SMOKE=1 bash studies/all.sh                        to see that everything runs: the numbers
#                                                      mean nothing
#   DRY=1 bash studies/all.sh                          only print the commands that are left
#   DATA=~/VoiceBank TRAIN_FLAGS="--set frames=100" bash studies/all.sh light-1    as in the paper
#
# Each table is printed, and written to $RUNS/NAME.txt and $RUNS/NAME.json. Started again, the
# script continues where it was interrupted: a finished training is skipped, an unfinished one
# resumed. Relative paths start at the root of the repository, where the commands run.
set -euo pipefail
cd "$(dirname "$0")/.."

DATA=${DATA:-built-in}              # corpus: built-in, a folder or a manifest
NOISY=${NOISY:-conditions:$DATA}    # the same speech in noise and through channels
RECIPE=${RECIPE:-paper}             # paper: that of each table's paper; or quick, cpu_hour, smoke
TRAIN_FLAGS=${TRAIN_FLAGS:-}        # further flags for the trainings of the LigHT-DVAE paper
SEED=${SEED:-0}
DEVICE=${DEVICE:-auto}
PYTHON=${PYTHON:-python}
LIMIT=                              # flags that make an evaluation shorter
CLIPS=
ITERATIONS=
if [ -n "${SMOKE:-}" ]; then
    RECIPE=smoke
    LIMIT="--limit 4"
    CLIPS="--clips 32 --repeats 1"
    ITERATIONS="--iterations 5"
fi
RUNS=${RUNS:-runs/all-$RECIPE}      # folder of all runs and tables; its path has no spaces

call() {  # call COMMAND…: print a command, and run it
    printf '+'
    printf ' %q' "$@"
    printf '\n'
    if [ -z "${DRY:-}" ]; then "$@"; fi
}

choose_recipe() {  # choose_recipe PAPER_RECIPE: print the recipe to train with
    if [ "$RECIPE" = paper ]; then echo "$1"; else echo "$RECIPE"; fi
}

train() {  # train NAME PAPER_RECIPE FLAGS…: a training into $RUNS/NAME, unless it is finished
    local run=$RUNS/$1 recipe
    recipe=$(choose_recipe "$2")
    shift 2
    if [ -f "$run/finished" ]; then return; fi
    if [ -f "$run/last.pt" ]; then
        call "$PYTHON" train.py --resume --run "$run" --device "$DEVICE"
    else
        call "$PYTHON" train.py --recipe "$recipe" --run "$run" --device "$DEVICE" \
            --seed "$SEED" "$@"
    fi
    if [ -z "${DRY:-}" ]; then touch "$run/finished"; fi
}

save() {  # save TABLE COMMAND…: run a command, and write its output to $RUNS/TABLE.txt too
    local file=$RUNS/$1.txt
    shift
    if [ -n "${DRY:-}" ]; then call "$@"; else call "$@" | tee "$file"; fi
}

evaluate() {  # evaluate TABLE FLAGS…: make a table with evaluate.py
    local table=$1
    shift
    save "$table" "$PYTHON" evaluate.py "$@" --device "$DEVICE" --seed "$SEED" \
        --json "$RUNS/$table.json"
}

folders() {  # folders FOLDER NAME…: the run folders of these names
    local folder=$1 name
    shift
    for name in "$@"; do echo "$RUNS/$folder/$name"; done
}

# ------------------------------------------------------------------------------ LigHT-DVAE paper

LIGHT_MODELS="VAE DKF RVAE SRNN-SS SRNN-TF HiT-DVAE LigHT-DVAE"

train_light() {  # train_light NAME…
    local name flags
    for name in "$@"; do
        case $name in
            VAE) flags="--model vae" ;;
            DKF) flags="--model dkf" ;;
            RVAE) flags="--model rvae" ;;
            SRNN-SS) flags="--model srnn --set scheduled_sampling=0.1,1" ;;
            SRNN-TF) flags="--model srnn --set scheduled_sampling=0,0" ;;  # teacher forcing
            HiT-DVAE) flags="--model hit_dvae" ;;
            LigHT-DVAE) flags="--model light_dvae" ;;
        esac
        train "light/$name" light2023 --data "$DATA" $flags $TRAIN_FLAGS
    done
}

light_1() {  # Table 1: resynthesis, from the model's own past and from the true one
    train_light $LIGHT_MODELS
    evaluate light-1 $(folders light $LIGHT_MODELS) --task resynthesis $LIMIT
    evaluate light-1-true-past $(folders light $LIGHT_MODELS) --task resynthesis \
        --mode teacher_forcing $LIMIT
}

light_2() {  # Table 2: ablations of the decoder, from power spectra and from their fourth root
    local scale
    for scale in power root; do
        save "light-2-$scale" "$PYTHON" studies/ablations.py --data "$DATA" \
            --recipe "$(choose_recipe light2023)" --runs "$RUNS/light-2-$scale" --device "$DEVICE" \
            --seed "$SEED" $LIMIT $TRAIN_FLAGS \
            --set "input_scale=$scale" scheduled_sampling=0,0 z_log_variance=0
    done
}

light_3() {  # Table 3 and Figure 3: samples of the prior
    train_light $LIGHT_MODELS
    train light/DeepSpeech2 fhvae2017 --data conditions:built-in --model deepspeech2
    evaluate light-3 $(folders light $LIGHT_MODELS) --task generation \
        --recogniser "$RUNS/light/DeepSpeech2" $CLIPS
}

exchange() {  # Poster: exchange of the sequence latent w
    train_light LigHT-DVAE HiT-DVAE
    evaluate exchange $(folders light LigHT-DVAE HiT-DVAE) --task exchange $LIMIT
}

enhancement() {  # Enhancement with a DVAE as the prior of speech: docs/enhancement.md
    train_light VAE DKF RVAE LigHT-DVAE
    evaluate enhancement $(folders light VAE DKF RVAE LigHT-DVAE) --task enhancement \
        $LIMIT $ITERATIONS
}

# -------------------------------------------------------------------------- DVAE benchmark paper

train_benchmark() {  # train_benchmark NAME FLAGS…
    local name=$1
    shift
    train "benchmark/$name" benchmark2021 --data "$DATA" "$@"
}

benchmark_2() {  # Table 2: resynthesis by the recurrent family, given the true past
    train_benchmark VAE --model vae
    train_benchmark DKF --model dkf
    train_benchmark STORN --model storn --set scheduled_sampling=0,0
    train_benchmark VRNN --model vrnn --set scheduled_sampling=0,0
    train_benchmark SRNN --model srnn --set scheduled_sampling=0,0
    train_benchmark RVAE --model rvae
    # The RVAE of its own paper has no MLPs.
    train_benchmark RVAE-original --model rvae \
        --set x_hidden= z_hidden= posterior_hidden= decoder_z_hidden= decoder_hidden=
    train_benchmark DSAE --model dsae
    evaluate benchmark-2 $(folders benchmark VAE DKF STORN VRNN SRNN RVAE RVAE-original DSAE) \
        --task resynthesis --mode teacher_forcing $LIMIT
}

# ----------------------------------------------------------------------------------- FHVAE paper

train_fhvae() {  # train_fhvae NAME SETTINGS…
    local name=$1
    shift
    train "fhvae/$name" fhvae2017 --data "$DATA" --model fhvae --set "$@"
}

train_extractor() {  # train_extractor NAME MODEL [SETTINGS…]: on all conditions
    local name=$1 model=$2
    shift 2
    if [ $# -gt 0 ]; then set -- --set "$@"; fi
    train "fhvae/$name" fhvae2017 --data "$NOISY" --model "$model" "$@"
}

train_recogniser() {  # train_recogniser NAME CORPUS DOMAIN [EXTRACTOR LATENT]; empty: all of it
    local name=$1 corpus=$2 domain=$3
    if [ $# -gt 3 ]; then
        set -- "domain=$domain" "extractor=$RUNS/fhvae/$4" "latent=$5"
    else
        set -- "domain=$domain"
    fi
    train "recogniser/$name" fhvae2017 --data "$corpus" --model acoustic --set "$@"
}

fhvae_1() {  # Table 1: speaker verification
    local alpha
    for alpha in 0 0.1 1 10; do
        train_fhvae "FHVAE-$alpha" "alpha=$alpha" z1_latent=16 z2_latent=16
    done
    train_fhvae FHVAE-32 alpha=10 z1_latent=32 z2_latent=32
    evaluate fhvae-1 $(folders fhvae FHVAE-0 FHVAE-0.1 FHVAE-1 FHVAE-10 FHVAE-32) \
        --task verification
}

fhvae_2() {  # Table 2: recognition of the sex that was not in the training data
    train_fhvae FHVAE-10 alpha=10 z1_latent=16 z2_latent=16
    train_recogniser fbank-all "$DATA" ""
    train_recogniser z1-all "$DATA" "" FHVAE-10 z1  # not in the paper
    train_recogniser fbank-male "$DATA" male
    train_recogniser z1-male "$DATA" male FHVAE-10 z1
    evaluate fhvae-2 $(folders recogniser fbank-all z1-all fbank-male z1-male) \
        --task recognition --data "$DATA" $LIMIT
}

fhvae_3() {  # Table 3: recognition in noise and through channels, trained on clean speech
    local beta
    for beta in 1 2 4 8; do
        train_extractor "beta_vae-$beta" beta_vae "beta=$beta"
    done
    train_extractor FHVAE-noisy fhvae
    train_extractor FHVAE-without-both fhvae domain=clean,noisy,channel

    # Where conditions are laid over a corpus, all of it is there without them too: a recogniser
    # that is trained on clean speech is then trained on all of that.
    local clean=$NOISY domain=clean
    if [ "$NOISY" != "${NOISY#conditions:}" ]; then
        clean=${NOISY#conditions:}
        domain=
    fi
    train_recogniser noisy-fbank-all "$NOISY" ""
    train_recogniser noisy-fbank-clean "$clean" "$domain"
    for beta in 1 2 4 8; do
        train_recogniser "noisy-beta_vae-$beta-clean" "$clean" "$domain" "beta_vae-$beta" z
    done
    train_recogniser noisy-z1-clean "$clean" "$domain" FHVAE-noisy z1
    train_recogniser noisy-z2-clean "$clean" "$domain" FHVAE-noisy z2
    train_recogniser noisy-z1-without-both-clean "$clean" "$domain" FHVAE-without-both z1
    evaluate fhvae-3 $(folders recogniser noisy-fbank-all noisy-fbank-clean \
        noisy-beta_vae-1-clean noisy-beta_vae-2-clean noisy-beta_vae-4-clean \
        noisy-beta_vae-8-clean noisy-z1-clean noisy-z2-clean noisy-z1-without-both-clean) \
        --task recognition --data "$NOISY" $LIMIT
}

fhvae_4() {  # Table 4 (appendix D): the lower bound of a segment under four architectures
    train_fhvae FC architecture=fc width=512 alpha=0 z1_latent=16 z2_latent=16
    train_fhvae RNN architecture=rnn width=256 alpha=0 z1_latent=16 z2_latent=16
    train_fhvae GRU architecture=gru width=256 alpha=0 z1_latent=16 z2_latent=16
    train_fhvae LSTM architecture=lstm width=256 alpha=0 z1_latent=16 z2_latent=16
    evaluate fhvae-4 $(folders fhvae FC RNN GRU LSTM) --task transformation $LIMIT
}

fhvae_figures() {  # Figures 1 and 4 to 14: conversion, denoising, exchange, traversals
    train_extractor FHVAE-sound fhvae features=log_magnitude
    evaluate fhvae-figures $(folders fhvae FHVAE-sound) --task transformation $LIMIT
}

# -------------------------------------------------------------------------------------------------

TABLES="light-1 light-2 light-3 exchange enhancement benchmark-2"
TABLES="$TABLES fhvae-1 fhvae-2 fhvae-3 fhvae-4 fhvae-figures"

fail() {
    echo "all.sh: error: $*" >&2
    exit 2
}

for table in "$@"; do
    case " $TABLES " in
        *" $table "*) ;;
        *) fail "unknown table $table; expected some of $TABLES" ;;
    esac
done

# Runs in one folder have one corpus, recipe and seed: a finished training is not made again.
settings="DATA=$DATA NOISY=$NOISY RECIPE=$RECIPE TRAIN_FLAGS=$TRAIN_FLAGS SEED=$SEED"
if [ -f "$RUNS/settings.txt" ] && [ "$settings" != "$(cat "$RUNS/settings.txt")" ]; then
    fail "$RUNS: has runs with $(cat "$RUNS/settings.txt"); choose another folder with RUNS=…"
fi
if [ -z "${DRY:-}" ]; then
    mkdir -p "$RUNS"
    echo "$settings" > "$RUNS/settings.txt"
fi

for table in ${@:-$TABLES}; do
    printf '\n# %s\n' "$table"
    "$(echo "$table" | tr - _)"
done
