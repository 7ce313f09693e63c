#!/usr/bin/env bash
# The secondary parts of the study (configs/study/s2-recipes.toml and on), each at the seeds 61, 62 and 63 in a run of
# its own, into runs/study/s2-recipes-61 and on. Under two hours on two idle CPU cores.
#
#   bash scripts/study_s.sh                      # all: s2-recipes s3-optimizers s4-early s5-layers s6-query s7-frozen
#   bash scripts/study_s.sh s4-early s6-query    # these alone
source "$(dirname "$0")/study_lib.sh"
[ $# = 0 ] && set -- s2-recipes s3-optimizers s4-early s5-layers s6-query s7-frozen
for name in "$@"; do [[ $name =~ ^s[2-7]-[a-z]+$ && -f configs/study/$name.toml ]] || script_usage 2; done
begin $((3 * $#))
for name in "$@"; do
    for seed in 61 62 63; do
        seeds=$(moved_seeds "configs/study/$name.toml" $((seed - 61)))
        part "$name-$seed" "configs/study/$name.toml" $seeds
    done
done
