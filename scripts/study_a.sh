#!/usr/bin/env bash
# Part A of the study: 44 trainings with and without a signal (configs/study/a.toml), about half an hour on two CPU
# cores, into runs/study/a-100.
#
#   bash scripts/study_a.sh          # seeds 101 to 110, and 101 to 106
#   bash scripts/study_a.sh 200      # seeds 201 to 210, into runs/study/a-200
source "$(dirname "$0")/study_lib.sh"
[[ "$*" =~ ^([0-9]+)?$ ]] || script_usage 2
first=${1:-100}
begin 1
seeds() {
    local all
    all=$(seq -s ', ' $((first + 1)) $((first + $2)))
    echo "arms.$1.seeds=[$all]"
}
part "a-$first" configs/study/a.toml "$(seeds full 10)" "$(seeds signs 10)" "$(seeds shuffled 6)" \
    "$(seeds gradients 6)" "$(seeds sft 6)" "$(seeds rlvr 6)"
