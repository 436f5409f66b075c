#!/usr/bin/env bash
# Sets the project up and runs the quick tests; arguments go to pytest: -m thorough, -k mining, -n 0, ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
case "${1:-}" in -h | --help)
  echo "usage: bash run_tests.sh [arguments of pytest]    (without any, the quick tests; -m thorough: those that take"
  echo "       some seconds each; -m slow: those that take up to minutes; -k NAME: some)"
  exit 0 ;;
esac
bash setup.sh --dev

cores=$(nproc 2>/dev/null || echo 2)
workers=$((cores < 8 ? cores : 8))
# One worker per core leaves no core for a second thread of torch or BLAS.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MKL_NUM_THREADS="${MKL_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false
# No test may reach for a model hub.
export HF_HUB_OFFLINE=1
exec .venv/bin/python -m pytest -n "$workers" --verbosity=-1 -m "not slow and not thorough" "$@"
