#!/bin/sh
# All GPU figures of the kernels, correctness first: bench_kernels.jsonl and a Markdown table beside it.
# Arguments go to bench_kernels.py: run_gpu.sh --models 8B --tp 8
set -eu
cd "$(dirname "$0")/../.."
python benchmark/kernels/metadata_host_time.py
python benchmark/kernels/bench_kernels.py "$@" | tee bench_kernels.md
