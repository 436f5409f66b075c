#!/usr/bin/env bash
# R2GenCMN with ITHN on IU X-Ray, as the ITHN paper trains it (Sec. 4.2): mine hard negatives, train, test.
#
#   bash run_iu_xray.sh                                          # needs data/iu_xray (see data/README.md) and a GPU
#   bash run_iu_xray.sh --strategy mochi --save_dir results/iu_xray_mochi       # flags go to main_train.py and win
#   TEXT_ENCODER=tfidf bash run_iu_xray.sh                       # hard negatives without any downloaded weights
#
# TEXT_ENCODER is a hub id, a local folder or tfidf; by default RadBERT (zzxslp/RadBERT-RoBERTa-4m), which the hub
# serves once. It counts where the index <save_dir>/hard_negatives.safetensors is not there yet.
#
# On a GPU it computes in bfloat16, or float16 on Volta and Turing, on a CPU in float32 (docs/CLUSTER.md, "Precision").
#   bash run_iu_xray.sh --precision float32 --tf32 false       # plain float32, as published
#
# --backbone r2gen, r2gencmn or xpronet takes that paper's own published settings; with --ithn off, nothing else:
#   bash run_iu_xray.sh --backbone r2gencmn --ithn off --save_dir results/iu_xray_r2gencmn
# XProNet (as published without flips and incomplete batches) reads labels and starts from prototypes of its own:
#   python scripts/label_reports.py data/iu_xray/annotation.json --out data/iu_xray/labels.csv
#   python scripts/build_prototypes.py --label_path data/iu_xray/labels.csv --out data/iu_xray/init_prototypes.safetensors
#   bash run_iu_xray.sh --backbone xpronet --label_path data/iu_xray/labels.csv \
#       --init_protypes_path data/iu_xray/init_prototypes.safetensors --save_dir results/iu_xray_xpronet_ithn
# The released ITHN code's objective and settings:
#   bash run_iu_xray.sh --ithn_variant released --epochs 100 --lr_ve 1e-4 --lr_ed 5e-4 \
#       --lr_scheduler StepLR --step_size 10 --gamma 0.8 --early_stop 25 --save_dir results/iu_xray_released
set -euo pipefail
case " $* " in *" --help "* | *" -h "*)
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0 ;;
esac
settings=()
case " $* " in
    *" --backbone"*) ;;
    *) settings=(
        --views separate --max_seq_length 60 --threshold 3 --batch_size 16 --epochs 50 --lr_ve 1e-4 --lr_ed 1e-4
        --weight_decay 5e-5 --lr_scheduler ReduceLROnPlateau --gamma 0.1 --plateau_patience 0 --seed 7580) ;;
esac
exec bash "$(dirname "${BASH_SOURCE[0]}")/scripts/mine_train_test.sh" \
    --dataset_name iu_xray \
    --image_dir data/iu_xray/images/ \
    --ann_path data/iu_xray/annotation.json \
    --save_dir results/iu_xray \
    --num_workers auto --precision auto --tf32 true --eval_batch_size 64 \
    --monitor_metric BLEU_4 --strategy ithn --alpha 0.01 --contrastive_weight 0.1 --cosine_weight 0.2 \
    "${settings[@]}" \
    "$@"
