#!/usr/bin/env bash
# All tables that need a GPU, one file each, from a checkout without an installation:
#   bash benchmarks/gpu.sh OUT
# Rehearsed on a CPU with tiny models by:   DEVICE=cpu bash benchmarks/gpu.sh OUT
# Where time is short:                      ROUNDS=3 NEW="64 32" TABLES="train_step inference" bash benchmarks/gpu.sh OUT
# A command that fails leaves its message in the file and does not stop the others. Seconds of each: OUT/seconds.txt.
set -uo pipefail
out=${1:?say where to write: bash benchmarks/gpu.sh OUT}
cd "$(dirname "$0")/.." && mkdir -p "$out"
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python}

if [ "${DEVICE:-cuda}" = cpu ]; then
    on="--device cpu" shape=tiny large=random:2,64,4,512 small=random:2,64,4,512 rounds=2 new="8 4" length=32 axes="--axes sites"
else
    on="--device cuda" shape=llama2-7b large=random:32,4096,32,32000 small=random:30,576,9,49152 rounds=${ROUNDS:-7} new="${NEW:-256 64}" length=512 axes=""
fi

run() { # NAME COMMAND...
    local name=$1 begin=$SECONDS
    shift
    [[ " ${TABLES:-$name} " == *" $name "* ]] || return 0
    "$python" "$@" > "$out/$name.md" 2> "$out/$name.err" || { echo "failed: $*"; tail -n 3 "$out/$name.err"; } | tee -a "$out/$name.md"
    echo "$name $((SECONDS - begin)) s" | tee -a "$out/seconds.txt"
}

run train_step benchmarks/train_step.py $on --model $large --dtype bfloat16 --length $length --rounds $rounds \
    --only "LoRA r=8, all linear" "LoRA r=8, q and v" "bare forward" LoReFT
run inference benchmarks/inference.py $on --shape $shape --rounds $rounds --new-tokens $new
run train_step_small benchmarks/train_step.py $on --model $small --dtype bfloat16 --rounds $rounds
run scaling benchmarks/scaling.py $on --rounds $rounds $axes
