#!/usr/bin/env bash
# Part D of the study: part B on a pair whose full training does not reach its ceiling (configs/study/d.toml), into
# runs/study/d-31 and on. Trains the pair's student first, in four minutes; then about ten minutes a pair of seeds on
# two CPU cores.
#
#   bash scripts/study_d.sh          # discovery seeds 31 to 35
#   bash scripts/study_d.sh 33 34    # these alone
#   bash scripts/study_d.sh pilot    # 901 to 903, with one rate each: the pilot of the power of H4
source "$(dirname "$0")/study_lib.sh"
tag=d first=31
[ "$*" = pilot ] && tag=d-pilot first=901 && set -- 901 902 903
[ $# = 0 ] && set -- 31 32 33 34 35
for seed in "$@"; do [[ $seed =~ ^(3[1-5]|90[1-3])$ ]] || script_usage 2; done
begin $#
[ -d runs/shapes-early-student ] || .venv/bin/python scripts/build_builtin.py shapes-early-student --out runs
for seed in "$@"; do
    task=shapes_$((seed < 900 ? seed + 100 : seed))
    part "$tag-$seed" configs/study/$tag.toml $(moved_seeds configs/study/$tag.toml $((seed - first))) "eval.tasks=[\"$task\"]"
done
