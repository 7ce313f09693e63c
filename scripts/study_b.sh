#!/usr/bin/env bash
# Part B of the study: masks at their own rates, five pairs of a discovery and a retraining seed (configs/study/b.toml).
# About a quarter of an hour a pair on two CPU cores; `bash scripts/study_b.sh 33 34` runs these pairs alone,
# `bash scripts/study_b.sh pilot` the three of the pilot.
set -euo pipefail
config=configs/study/b.toml tag=b
[ "${1:-}" = pilot ] && config=configs/study/b-pilot.toml tag=b-pilot && set -- 901 902 903
[ $# = 0 ] && set -- 31 32 33 34 35
parts=$#
source "$(dirname "$0")/study_lib.sh"
for seed in "$@"; do
    seeds=("arms.discovery.seed=$seed" "arms.signs.seed=$seed" "eval.tasks=[\"shapes_$seed\"]")
    arms=(full top-5 null-5 magnitude-5 random-5 top-1 null-1 magnitude-1 random-1)
    if [ $tag = b ]; then
        seeds+=("arms.other.seed=$((seed + 50))" "arms.sft.seed=$seed")
        arms+=(other-5 sft-5 other-1 sft-1)
    fi
    for arm in "${arms[@]}"; do seeds+=("arms.$arm.seed=$((seed + 100))"); done
    kind=1
    for mask in magnitude-5 random-5 magnitude-1 random-1; do
        seeds+=("masks.$mask.seed=$((kind * 1000 + seed))") kind=$((kind + 1))
    done
    part "$tag-$seed" "$config" "${seeds[@]}"
done
