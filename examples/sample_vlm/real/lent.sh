#!/usr/bin/env bash
# Train on a GPU machine that is lent for minutes, has no network and takes small loads only. From the repository root:
#
#   here:   bash examples/sample_vlm/real/lent.sh pack runs/real/base .gpu       # writes .gpu/code and .gpu/s1 ... s4
#   there:  bash .gpu/code/lent.sh rehearse .gpu "$OUT"   # brings s1; real sizes, random weights: pace, memory, compiler cache
#   there:  bash .gpu/code/lent.sh keep .gpu/s2           # each slice (31 MB) with a call of its own
#   there:  bash .gpu/code/lent.sh train .gpu/s4 "$OUT" MINUTES
#
# What is needed later lies in /tmp/real there. $OUT is what comes back: logs and trained.safetensors (11 MB), copied every
# 15 seconds, so that a run that is cut still leaves its last state.
set -euo pipefail

HOME_THERE=/tmp/real

pack() {  # base folder, target folder
    local code=$2/code/examples/sample_vlm
    rm -rf "$2" && mkdir -p "$code" "$2"/s1 "$2"/s2 "$2"/s3 "$2"/s4
    echo '*' > "$2/.gitignore"
    cp examples/sample_vlm/{__init__,sources,scenes,questions,orders}.py "$code"
    cp -r examples/sample_vlm/real "$code" && cp examples/sample_vlm/real/lent.sh "$2/code"
    tar c -C "$1" tokenizer tower/config.json decoder/config.json | gzip -9 > "$2/s1/light.tar.gz"
    tar c -C "$1" tokenizer tower decoder | gzip -1 > "$2/all.tgz"
    sha256sum < "$2/all.tgz" > "$2/code/all.sha256"
    split -n 4 --numeric-suffixes=1 -a 1 "$2/all.tgz" "$2/part"
    for i in 1 2 3 4; do mv "$2/part$i" "$2/s$i/"; done
    rm "$2/all.tgz"
}

keep() {  # slice folder
    mkdir -p "$HOME_THERE/parts" && cp "$1"/part? "$HOME_THERE/parts/"
    ls -l "$HOME_THERE/parts"
}

settle() {  # folder with code: run from a copy
    rm -rf "$HOME_THERE/code" && cp -r "$1" "$HOME_THERE/code" && cd "$HOME_THERE/code"
    export PYTHONUNBUFFERED=1 TRANSFORMERS_VERBOSITY=error HF_HUB_OFFLINE=1
}

rehearse() {  # packed folder, folder that comes back
    nvidia-smi -L && nproc && free -g | head -2 && df -h /dev/shm | tail -1 && ulimit -n
    keep "$1/s1"
    mkdir -p "$HOME_THERE/base" && tar xz -C "$HOME_THERE/base" -f "$1/s1/light.tar.gz"
    settle "$1/code"
    local run="python3 -m examples.sample_vlm.real train --base $HOME_THERE/base --random_weights --exam_pictures 128"
    if timeout 200 $run --out "$HOME_THERE/rehearsal" --compile --minutes 1.5 > "$2/rehearsal.log" 2>&1; then
        touch "$HOME_THERE/compile"
        tail -n 20 "$2/rehearsal.log"
    else
        echo "the compiled rehearsal failed; without the compiler:"
        tail -n 25 "$2/rehearsal.log"
        timeout 90 $run --out "$HOME_THERE/plain" --minutes 0.7 2>&1 | tee "$2/plain.log" | tail -n 20
    fi
}

train() {  # last slice, folder that comes back, minutes
    keep "$1"
    settle "$(dirname "$1")/code"
    cat ../parts/part? | sha256sum | diff - all.sha256
    cat ../parts/part? | tar xz -C "$HOME_THERE/base"
    local compile=""
    if [ -e "$HOME_THERE/compile" ]; then compile=--compile; fi
    python3 -m examples.sample_vlm.real train --base "$HOME_THERE/base" --out "$HOME_THERE/run" --minutes "$3" $compile \
        > "$2/train.log" 2>&1 &
    local trainer=$!
    while kill -0 $trainer 2> /dev/null; do
        sleep 15
        bring_back "$2"
    done
    wait $trainer || echo "the trainer ended with status $?"
    bring_back "$2"
    tail -n 60 "$2/train.log"
}

bring_back() {  # folder that comes back
    for name in trained.safetensors log.jsonl; do
        if [ -e "$HOME_THERE/run/$name" ]; then
            cp "$HOME_THERE/run/$name" "$1/new" && mv "$1/new" "$1/$name"
        fi
    done
}

"$@"
