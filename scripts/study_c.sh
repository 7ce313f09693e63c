#!/usr/bin/env bash
# Part C of the study: SmolLM2 (configs/study/c.toml), about four hours on two idle CPU cores, into runs/study/c. One
# arm after another; the last part compares them.
#
#   bash scripts/study_c.sh
source "$(dirname "$0")/study_lib.sh"
[ $# = 0 ] || script_usage 2
arms=({full,signs,shuffled,top,random}-{0..3})
begin $((${#arms[@]} + 1))
for arm in "${arms[@]}"; do part c configs/study/c.toml --arm "$arm"; done
part c configs/study/c.toml
