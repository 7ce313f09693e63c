# What the scripts of the study share: `part NAME CONFIG [OVERRIDES]` runs one part into runs/study/NAME, resumes it
# where it was killed, keeps its rows, and prints how many parts are done and the time left. At most an hour a part.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env
bash scripts/setup
parts_done=0 parts=${parts:-1}

part() {
    local name=$1 config=$2 begun=$SECONDS
    shift 2
    echo "== study: $name ($((parts_done + 1)) of $parts)"
    timeout --signal=INT 3600 .venv/bin/vlopd run "$config" --out "runs/study/$name" "$@"
    .venv/bin/python scripts/study_collect.py "runs/study/$name"
    parts_done=$((parts_done + 1))
    echo "== study: $name took $((SECONDS - begun)) s; about $((SECONDS * (parts - parts_done) / parts_done / 60)) min left"
}
