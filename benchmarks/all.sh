#!/usr/bin/env bash
# Every measured table: printed from results/*.csv, with the runs that are missing there done first.
set -euo pipefail
cd "$(dirname "$0")/results"
for benchmark in recall lm ablations scaling million; do
    dfn-hf bench "$benchmark" --results "$benchmark.csv"
done
