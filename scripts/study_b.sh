#!/usr/bin/env bash
# Part B of the study: masks at their own rates, five pairs of a discovery and a retraining seed (configs/study/b.toml),
# about a quarter of an hour a pair on two CPU cores, into runs/study/b-31 and on.
#
#   bash scripts/study_b.sh          # discovery seeds 31 to 35
#   bash scripts/study_b.sh 33 34    # these alone
#   bash scripts/study_b.sh pilot    # 901 to 903, with one rate each: the pilot of the power of H4
source "$(dirname "$0")/study_lib.sh"
tag=b first=31
[ "$*" = pilot ] && tag=b-pilot first=901 && set -- 901 902 903
[ $# = 0 ] && set -- 31 32 33 34 35
for seed in "$@"; do [ -f "configs/study/tasks/shapes_$seed.yaml" ] || script_usage 2; done
begin $#
for seed in "$@"; do
    seeds=$(moved_seeds configs/study/$tag.toml $((seed - first)))
    part "$tag-$seed" configs/study/$tag.toml $seeds "eval.tasks=[\"shapes_$seed\"]"
done
