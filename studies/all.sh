#!/usr/bin/env bash
# The command of every table and figure of the papers, one block for each.
#
#   bash studies/all.sh                                everything, with the settings of the papers
#   RECIPE=quick bash studies/all.sh light-1 fhvae-2   some of them, small
#   SMOKE=1 bash studies/all.sh                        to see that everything runs: the numbers mean nothing
#   DRY=1 bash studies/all.sh                          only print the commands
#   DATA=~/VoiceBank TRAIN_FLAGS="--set frames=100" bash studies/all.sh light-1    as in the LigHT-DVAE paper
#
# Each table is printed, and written to $RUNS/NAME.txt and $RUNS/NAME.json. Started again, it continues where it was
# interrupted: a finished training is skipped.
set -euo pipefail

DATA=${DATA:-built-in}               # corpus: built-in, a folder or a manifest
NOISY=${NOISY:-conditions:$DATA}     # the same in noise and through channels
RUNS=${RUNS:-runs/all}               # folder of all runs and tables
RECIPE=${RECIPE:-paper}              # paper: that of the paper that a table is from; or quick, cpu_hour, smoke
TRAIN_FLAGS=${TRAIN_FLAGS:-}         # further flags of the trainings of DVAEs
DEVICE=${DEVICE:-auto}
PYTHON=${PYTHON:-python}
LIMIT=
CLIPS=
ITERATIONS=
if [ -n "${SMOKE:-}" ]; then
    RECIPE=smoke
    LIMIT="--limit 8"
    CLIPS="--clips 32 --repeats 1"
    ITERATIONS="--iterations 5"
fi
cd "$(dirname "$0")/.."

call() {  # call COMMAND…: print it, and run it
    echo "+ $*"
    if [ -z "${DRY:-}" ]; then "$@"; fi
}

train() {  # train NAME PAPER_RECIPE FLAGS…: a training into $RUNS/NAME, unless it is finished
    local run=$RUNS/$1 recipe=$2
    shift 2
    if [ "$RECIPE" != paper ]; then recipe=$RECIPE; fi
    if [ -f "$run/finished" ]; then return; fi
    if [ -f "$run/last.pt" ]; then
        call "$PYTHON" train.py --resume --run "$run" --device "$DEVICE"
    else
        call "$PYTHON" train.py --recipe "$recipe" --run "$run" --device "$DEVICE" "$@"
    fi
    if [ -z "${DRY:-}" ]; then touch "$run/finished"; fi
}

evaluate() {  # evaluate TABLE FLAGS…: print a table, and write it to $RUNS/TABLE.txt and $RUNS/TABLE.json
    local table=$RUNS/$1
    shift
    mkdir -p "$RUNS"
    call "$PYTHON" evaluate.py "$@" --device "$DEVICE" --json "$table.json" | tee "$table.txt"
}

runs() {  # runs FOLDER NAME…: the run folders of these names
    local folder=$1 name
    shift
    for name in "$@"; do echo "$RUNS/$folder/$name"; done
}

# ------------------------------------------------------------------------------------------------ LigHT-DVAE paper

LIGHT_MODELS="VAE DKF RVAE SRNN-SS SRNN-TF HiT-DVAE LigHT-DVAE"

train_light_models() {
    train light/VAE light2023 --data "$DATA" --model vae $TRAIN_FLAGS
    train light/DKF light2023 --data "$DATA" --model dkf $TRAIN_FLAGS
    train light/RVAE light2023 --data "$DATA" --model rvae $TRAIN_FLAGS
    train light/SRNN-SS light2023 --data "$DATA" --model srnn $TRAIN_FLAGS --set scheduled_sampling=0.1,1
    train light/SRNN-TF light2023 --data "$DATA" --model srnn $TRAIN_FLAGS --set scheduled_sampling=0,0
    train light/HiT-DVAE light2023 --data "$DATA" --model hit_dvae $TRAIN_FLAGS
    train light/LigHT-DVAE light2023 --data "$DATA" --model light_dvae $TRAIN_FLAGS
}

light_1() {  # Table 1: resynthesis, from the own past and from the true one
    train_light_models
    evaluate light-1 $(runs light $LIGHT_MODELS) --task resynthesis $LIMIT
    evaluate light-1-true-past $(runs light $LIGHT_MODELS) --task resynthesis --mode teacher_forcing $LIMIT
}

light_2() {  # Table 2: ablations of the decoder, on the power as it is and on its fourth root
    local recipe=light2023 scale
    if [ "$RECIPE" != paper ]; then recipe=$RECIPE; fi
    for scale in power root; do
        call "$PYTHON" studies/ablations.py --data "$DATA" --recipe "$recipe" --runs "$RUNS/ablations-$scale" \
            --device "$DEVICE" $LIMIT $TRAIN_FLAGS --set "input_scale=$scale" scheduled_sampling=0,0 z_log_variance=0
    done
}

light_3() {  # Table 3 and Figure 3: samples of the prior
    train_light_models
    train light/DeepSpeech2 fhvae2017 --data conditions:built-in --model deepspeech2
    evaluate light-3 $(runs light $LIGHT_MODELS) --task generation --recogniser "$RUNS/light/DeepSpeech2" $CLIPS
}

exchange() {  # poster: exchange of the sequence latent w
    train_light_models
    evaluate exchange $(runs light LigHT-DVAE HiT-DVAE) --task exchange $LIMIT
}

enhancement() {  # enhancement with a DVAE as the prior of speech, methods as in docs/enhancement.md
    train_light_models
    evaluate enhancement $(runs light VAE DKF RVAE LigHT-DVAE) --task enhancement $LIMIT $ITERATIONS
}

# -------------------------------------------------------------------------------------------- DVAE benchmark paper

benchmark_2() {  # Table 2: resynthesis by the recurrent family, given the true past
    train benchmark/VAE benchmark2021 --data "$DATA" --model vae
    train benchmark/DKF benchmark2021 --data "$DATA" --model dkf
    train benchmark/STORN benchmark2021 --data "$DATA" --model storn --set scheduled_sampling=0,0
    train benchmark/VRNN benchmark2021 --data "$DATA" --model vrnn --set scheduled_sampling=0,0
    train benchmark/SRNN benchmark2021 --data "$DATA" --model srnn --set scheduled_sampling=0,0
    train benchmark/RVAE benchmark2021 --data "$DATA" --model rvae
    # The RVAE of its own paper has no MLPs.
    train benchmark/RVAE-original benchmark2021 --data "$DATA" --model rvae \
        --set x_hidden= z_hidden= posterior_hidden= decoder_z_hidden= decoder_hidden=
    train benchmark/DSAE benchmark2021 --data "$DATA" --model dsae
    evaluate benchmark-2 $(runs benchmark VAE DKF STORN VRNN SRNN RVAE RVAE-original DSAE) \
        --task resynthesis --mode teacher_forcing $LIMIT
}

# ---------------------------------------------------------------------------------------------------- FHVAE paper

train_fhvae() {  # train_fhvae NAME SETTINGS…
    local name=$1
    shift
    train "fhvae/$name" fhvae2017 --data "$DATA" --model fhvae --set "$@"
}

fhvae_1() {  # Table 1: speaker verification
    local alpha
    for alpha in 0 0.1 1 10; do
        train_fhvae "FHVAE-$alpha" "alpha=$alpha" z1_latent=16 z2_latent=16
    done
    train_fhvae FHVAE-32 alpha=10 z1_latent=32 z2_latent=32
    evaluate fhvae-1 $(runs fhvae FHVAE-0 FHVAE-0.1 FHVAE-1 FHVAE-10 FHVAE-32) --task verification
}

train_recogniser() {  # train_recogniser NAME CORPUS DOMAIN [EXTRACTOR LATENT]
    local settings="domain=$3"
    if [ -n "${4:-}" ]; then settings="$settings extractor=$RUNS/fhvae/$4 latent=$5"; fi
    train "recogniser/$1" fhvae2017 --data "$2" --model acoustic --set $settings
}

fhvae_2() {  # Table 2: recognition of the other sex
    train_fhvae FHVAE-32 alpha=10 z1_latent=32 z2_latent=32
    train_recogniser fbank-all "$DATA" ""
    train_recogniser z1-all "$DATA" "" FHVAE-32 z1
    train_recogniser fbank-male "$DATA" male
    train_recogniser z1-male "$DATA" male FHVAE-32 z1
    evaluate fhvae-2 $(runs recogniser fbank-all z1-all fbank-male z1-male) --task recognition --data "$DATA" $LIMIT
}

fhvae_3() {  # Table 3: recognition in noise and through channels
    local beta
    train fhvae/noisy fhvae2017 --data "$NOISY" --model fhvae --set z1_latent=32 z2_latent=32
    train fhvae/noisy-without-both fhvae2017 --data "$NOISY" --model fhvae \
        --set z1_latent=32 z2_latent=32 domain=clean,noisy,channel
    for beta in 1 2 4 8; do
        train "fhvae/beta_vae-$beta" fhvae2017 --data "$NOISY" --model beta_vae --set "beta=$beta"
    done
    # Where conditions are laid over a corpus, a recogniser that is trained on clean speech is trained on all of it as
    # it was before.
    local clean=$NOISY domain=clean
    if [ "$NOISY" != "${NOISY#conditions:}" ]; then clean=${NOISY#conditions:} domain=; fi
    train_recogniser noisy-fbank-all "$NOISY" ""
    train_recogniser noisy-fbank-clean "$clean" "$domain"
    for beta in 1 2 4 8; do
        train_recogniser "noisy-beta_vae-$beta-clean" "$clean" "$domain" "beta_vae-$beta" z
    done
    train_recogniser noisy-z1-clean "$clean" "$domain" noisy z1
    train_recogniser noisy-z2-clean "$clean" "$domain" noisy z2
    train_recogniser noisy-z1-without-both-clean "$clean" "$domain" noisy-without-both z1
    evaluate fhvae-3 $(runs recogniser noisy-fbank-all noisy-fbank-clean noisy-beta_vae-1-clean \
        noisy-beta_vae-2-clean noisy-beta_vae-4-clean noisy-beta_vae-8-clean noisy-z1-clean noisy-z2-clean \
        noisy-z1-without-both-clean) --task recognition --data "$NOISY" $LIMIT
}

fhvae_4() {  # Table 4 (appendix D): the bound of a segment under four architectures
    train_fhvae FC architecture=fc width=512 alpha=0 z1_latent=16 z2_latent=16
    train_fhvae RNN architecture=rnn width=256 alpha=0 z1_latent=16 z2_latent=16
    train_fhvae GRU architecture=gru width=256 alpha=0 z1_latent=16 z2_latent=16
    train_fhvae LSTM architecture=lstm width=256 alpha=0 z1_latent=16 z2_latent=16
    evaluate fhvae-4 $(runs fhvae FC RNN GRU LSTM) --task transformation $LIMIT
}

fhvae_figures() {  # Figures 1 and 4 to 14: conversion, denoising, exchange, traversals
    train fhvae/sound fhvae2017 --data "$NOISY" --model fhvae --set features=log_magnitude z1_latent=32 z2_latent=32
    evaluate fhvae-figures $(runs fhvae sound) --task transformation $LIMIT
}

# ------------------------------------------------------------------------------------------------------------------

TABLES="light-1 light-2 light-3 exchange enhancement benchmark-2 fhvae-1 fhvae-2 fhvae-3 fhvae-4 fhvae-figures"
for table in ${@:-$TABLES}; do
    case " $TABLES " in
        *" $table "*) ;;
        *) echo "all.sh: error: unknown table $table; expected one of $TABLES" >&2; exit 2 ;;
    esac
    echo
    echo "# $table"
    "$(echo "$table" | tr - _)"
done
