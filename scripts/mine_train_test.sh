#!/usr/bin/env bash
# Mines hard negatives where there is no index yet, trains, and tests the best model: what the run_*.sh share.
# Takes the flags of main_train.py; of a flag given twice the last counts. TEXT_ENCODER is explained in run_iu_xray.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# value_of FLAG DEFAULT ARGUMENT...: what main_train.py will read for FLAG, written as "--flag value" or "--flag=value".
value_of() {
    local flag=$1 value=$2
    shift 2
    while (($#)); do
        case $1 in
            "$flag") value=${2:-} ;;
            "$flag="*) value=${1#*=} ;;
        esac
        shift
    done
    printf '%s' "$value"
}

# Outside .venv (a conda user) the python on the PATH does the work.
if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; else python=python; fi
save_dir=$(value_of --save_dir results/iu_xray "$@")
index=$(value_of --negative_index "$save_dir/hard_negatives.safetensors" "$@")
strategy=$(value_of --strategy ithn "$@")
dataset_name=$(value_of --dataset_name "" "$@")
arguments=("$@" --negative_index "$index")
# Whether a strategy takes hard negatives stands in one table, in Python.
reads_negatives="import sys; from modules.ithn.synthesis import NEEDING_NEGATIVES as n; sys.exit(sys.argv[1] not in n)"

# An empty --negative_index says that the annotation brings its own negatives (neg_report, neg_image_path).
if [[ $(value_of --ithn auto "$@") == off || -z $index ]]; then
    echo "no hard negatives to mine"
    arguments=("$@")
elif [[ -f $index ]]; then
    echo "hard negatives: $index (delete it to mine again)"
elif ! "$python" -c "$reads_negatives" "$strategy"; then
    echo "no hard negatives to mine: --strategy $strategy takes none"
    arguments=("$@")
else
    echo "hard negatives: mining into $index"
    "$python" scripts/mine_hard_negatives.py \
        --ann_path "$(value_of --ann_path data/iu_xray/annotation.json "$@")" \
        ${dataset_name:+--dataset_name "$dataset_name"} \
        --report_sections "$(value_of --report_sections "" "$@")" \
        --text_encoder "${TEXT_ENCODER:-zzxslp/RadBERT-RoBERTa-4m}" \
        --top_k "$(value_of --num_neighbours 5 "$@")" \
        --n_gpu "$(value_of --n_gpu 1 "$@")" --device "$(value_of --device auto "$@")" \
        --out "$index"
fi
# Ends with the test of the best model: the test split is generated once.
"$python" main_train.py "${arguments[@]}"
