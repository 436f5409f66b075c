#!/usr/bin/env bash
# Every figure and plot of benchmarks/README.md: about 10 minutes on two cores with nothing else running.
#   bash benchmarks/run_all.sh                        JSON files and growth.png in benchmarks/results/
#   bash benchmarks/run_all.sh OUT --clock cpu        further arguments go to every benchmark
#   QUICK=1 bash benchmarks/run_all.sh OUT            tiny sizes, to see that everything runs
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${1:-benchmarks/results}
ALL=("${@:2}")
PYTHON=${PYTHON:-python}

run() { # name of the result, benchmark, its arguments
    echo "== $1"
    "$PYTHON" "benchmarks/$2.py" "${@:3}" ${ALL[@]+"${ALL[@]}"} --out "$OUT/$1.json"
}

if [ -n "${QUICK:-}" ]; then
    STEP=(--visual_extractor resnet18 --image_size 32 --batch_size 2 --rounds 1) BATCHES=(1 2) VIEWS=(1 2)
    GIVEN=(--visual_extractor none --patches 4 --batch_size 2 --rounds 1) LENGTHS=(5 9) BEAMS=(1 2)
    SEARCH=(--patches 8 --batch_size 2 --rounds 1) ROWS=(300 600) SIZES=(256) LARGE=(200x300) IMAGES=2 REPORTS=(20 40) ROUNDS=1
    PROGRAMS=(--programs main_train.py) RECURRENCE=(--batch_size 2 --patches 8 --max_seq_length 9)
else
    STEP=(--rounds 3) BATCHES=(1 2 4 8 16) VIEWS=(1 2 3 4)
    GIVEN=(--visual_extractor none --rounds 3) LENGTHS=(30 60 100 200) BEAMS=(1 2 3 5 10)
    SEARCH=(--rounds 3) ROWS=(2500 5000 10000 20000 40000) SIZES=(256 512 1024) LARGE=(2500x3000) IMAGES=16 REPORTS=(590 3858) ROUNDS=3
    PROGRAMS=() RECURRENCE=()
fi

run startup startup --rounds "$ROUNDS" ${PROGRAMS[@]+"${PROGRAMS[@]}"}
run train_step train_step "${STEP[@]}"
run train_step_bfloat16 train_step "${STEP[@]}" --strategy off --precision bfloat16
run train_step_features train_step "${GIVEN[@]}" --precision float32 bfloat16
run train_step_batches train_step "${STEP[@]}" --rounds 1 --strategy off --batch_size "${BATCHES[@]}"
run train_step_views train_step "${STEP[@]}" --rounds 1 --strategy off --batch_size 2 --views "${VIEWS[@]}"
run train_step_lengths train_step "${GIVEN[@]}" --rounds 2 --strategy off --max_seq_length "${LENGTHS[@]}"
run generate generate "${SEARCH[@]}"
run generate_beams generate "${SEARCH[@]}" --rounds 2 --beam_size "${BEAMS[@]}"
run generate_lengths generate "${SEARCH[@]}" --rounds 2 --max_seq_length "${LENGTHS[@]}"
run r2gen_step r2gen_step --rounds "$ROUNDS" ${RECURRENCE[@]+"${RECURRENCE[@]}"}
run images_png images --size "${SIZES[@]}" --images "$IMAGES" --rounds "$ROUNDS" --channels L RGB
run images_jpeg images --size "${SIZES[@]}" --images "$IMAGES" --rounds "$ROUNDS" --format jpeg
run images_large_jpeg images --size "${LARGE[@]}" --images 4 --rounds "$ROUNDS" --format jpeg
run mine mine --rows "${ROWS[@]}" --rounds "$ROUNDS" --plain false
run evaluate evaluate --reports "${REPORTS[@]}"
"$PYTHON" benchmarks/plot.py "$OUT"
"$PYTHON" benchmarks/tables.py "$OUT"
