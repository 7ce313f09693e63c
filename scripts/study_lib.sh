# What the scripts of the study share; each sources it, checks its arguments, and then runs its parts:
#   script_usage STATUS        prints the script's header and exits
#   begin N                    sets up; N parts will follow
#   moved_seeds CONFIG NUMBER  the seeds of all arms and random masks of a config plus a number, as overrides
#   part NAME CONFIG [ARGS]    `vlopd run` into runs/study/NAME; what is done there is kept, and time left is printed
# A run is stopped after an hour and resumed, ten times at most. One that stops with an error is started again once
# (docs/study/protocol.md, "Exclusions"). Killed scripts resume by the same command.
set -euo pipefail
script=$(realpath "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
LIMIT=3600     # seconds

script_usage() {
    sed -n '2,/^[^#]/s/^#\( \|$\)//p' "$script" >&2
    exit "$1"
}

begin() {
    source scripts/env
    bash scripts/setup
    parts=$1 parts_done=0 begun=$SECONDS
}

moved_seeds() {
    .venv/bin/python - "$@" <<'END'
import sys
from vlopd.config.input import read_tables

tables = read_tables(sys.argv[1])
for kind in ("arms", "masks"):
    for name, table in tables.get(kind, {}).items():
        if "seed" in table:
            print(f"{kind}.{name}.seed={table['seed'] + int(sys.argv[2])}")
END
}

part() {
    local name=$1 config=$2 hours=0 errors=0 status
    shift 2
    echo "== study: $name, part $((parts_done + 1)) of $parts"
    while true; do
        status=0
        # --foreground: Ctrl-C reaches the run
        timeout --foreground --signal=INT --kill-after=120 "$LIMIT" \
            .venv/bin/vlopd run "$config" --out "runs/study/$name" "$@" || status=$?
        # the rows of the finished arms, also of a run that was stopped
        [ ! -f "runs/study/$name/run.json" ] ||
            .venv/bin/python scripts/study_collect.py "runs/study/$name" || [ $status != 0 ]
        case $status in
            0) break ;;
            124 | 137) # out of time; 137 also if the system was out of memory
                hours=$((hours + 1))
                [ $hours -lt 10 ] || stop "$name was started ten times and is not done" 1
                echo "== study: $name goes on after $hours stops" ;;
            130 | 143) stop "$name was interrupted" $status ;;
            *)
                errors=$((errors + 1))
                [ $errors -lt 2 ] || stop "$name stopped twice with an error" $status
                echo "== study: $name stopped with exit code $status, and is started again once" ;;
        esac
    done
    parts_done=$((parts_done + 1))
    local seconds=$((SECONDS - begun))
    echo "== study: $parts_done of $parts parts in $((seconds / 60)) min;" \
        "about $((seconds * (parts - parts_done) / parts_done / 60)) min left"
}

stop() {
    echo "study: $1; the same command goes on from here" >&2
    exit "$2"
}
