#!/usr/bin/env bash
# Trains on several machines under SLURM: one torchrun on each, which starts a process for each of its GPUs.
#
#   sbatch --nodes 2 --gpus-per-node 8 --time 24:00:00 scripts/slurm_train.sh \
#       --dataset_name mimic_cxr --ann_path data/mimic_cxr/annotation.json --image_dir data/mimic_cxr/images/ \
#       --negative_index data/mimic_cxr/negatives.safetensors --precision auto --save_dir results/mimic_cxr
#
# Arguments are flags of main_train.py. Code, data and --save_dir must lie where all machines see them. When a process or
# a machine fails, all processes start again from the last checkpoint, up to MAX_RESTARTS (3) times; a job that ran into
# its time limit continues when it is submitted again. Mine the hard negatives beforehand.
#SBATCH --job-name=report-generation
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --signal=TERM@90
set -euo pipefail
case " $* " in *" --help "* | *" -h "*)
    sed -n '2,/^#SBATCH/{/^#SBATCH/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    exit 0 ;;
esac
# sbatch runs a copy of this file: the folder is the one that the job was submitted from.
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/..}"
if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; else python=python; fi

# Not "| head -n 1", which may end scontrol by a broken pipe, and the job with it.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${hosts%%$'\n'*}
port=$((20000 + SLURM_JOB_ID % 20000))
# What a process may take to write its checkpoint after the signal that SLURM sends 90 s before the end.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=60
exec srun --kill-on-bad-exit=1 "$python" -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc_per_node "${SLURM_GPUS_ON_NODE:-gpu}" \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d --rdzv_endpoint "$first:$port" --max_restarts "${MAX_RESTARTS:-3}" \
    main_train.py --resume auto "$@"
