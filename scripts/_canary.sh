# shellcheck shell=bash
# Sourced by the canaries: `canary LOG COMMAND ...` runs a suite, keeps its output in runs/hosts/LOG, says in one line whether it is alive,
# else what broke most, and ends the script with the suite's exit status.

canary() {
    local log=runs/hosts/$1 status
    shift
    mkdir -p runs/hosts
    "$@" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    echo
    if [ "$status" -eq 0 ]; then
        echo "canary: alive, $(tail -n 1 "$log")"
    else
        echo "canary: dead, $(tail -n 1 "$log"). What broke:"
        grep -E '^(FAILED|ERROR)' "$log" | sed -E 's/^(FAILED|ERROR) //; s/ - / : /' | sort | uniq -c | sort -rn | head -n 40
    fi
    exit "$status"
}
