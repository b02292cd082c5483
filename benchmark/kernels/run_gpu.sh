#!/bin/sh
# All GPU figures of the kernels, correctness first: JSON lines and a Markdown table under benchmark/results/.
# Arguments go to bench_kernels.py: run_gpu.sh --models 8B --tp 8
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
mkdir -p benchmark/results
"$python" benchmark/kernels/metadata_host_time.py
"$python" benchmark/kernels/bench_kernels.py "$@" | tee benchmark/results/kernels_gpu.md
