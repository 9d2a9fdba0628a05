#!/usr/bin/env bash
# Prints every table of docs/benchmarks from results/*.csv, and measures missing runs first.
set -euo pipefail
cd "$(dirname "$0")/.."
dfn-hf bench ablations --results benchmarks/results/ablations.csv
dfn-hf bench translation --model liquid --model "no frequency attention" --model "no offsets" --model "1 expert" \
    --model "no LSTM" --model "no compression" --seeds 2 --max-steps 800 --no-scores \
    --results benchmarks/results/translation.csv
dfn-hf bench byte-chunking --model adaptive --model dfn --model "dfn of equal compute" \
    --model "llama of equal compute" --results benchmarks/results/byte-chunking.csv
dfn-hf bench million-tokens --entity-sampling adaptive --results benchmarks/results/million-tokens.csv
dfn-hf bench fields --results benchmarks/results/fields.csv
dfn-hf bench field-speed --results benchmarks/results/field-speed.csv
dfn-hf bench contrastive --results benchmarks/results/contrastive.csv
dfn-hf bench contrastive --task sounds --seeds 3 --results benchmarks/results/contrastive.csv
dfn-hf bench isolation --results benchmarks/results/isolation.csv
dfn-hf bench lm --results benchmarks/results/lm.csv
dfn-hf bench lm --model flownetwork --model flownetwork-1-pattern --model flownetwork-no-flow \
    --model flow-transformer --model llama --model llama-conv --results benchmarks/results/lm.csv
dfn-hf bench long-lm --max-steps 400 --results benchmarks/results/long-lm.csv
dfn-hf bench quantization --results benchmarks/results/quantization.csv
dfn-hf bench recall --model dfn --results benchmarks/results/recall.csv
dfn-hf bench retrieval --contexts 5 --control-contexts 1 --results benchmarks/results/retrieval.csv
dfn-hf bench search --results benchmarks/results/search.csv
dfn-hf bench memory --results benchmarks/results/memory.csv
dfn-hf bench scaling --results benchmarks/results/scaling.csv
dfn-hf bench million-tokens --results benchmarks/results/million-tokens.csv
dfn-hf bench peers --time-limit 10 --results benchmarks/results/peers.csv --plot docs/benchmarks/img/peers.png
dfn-hf bench peers --model dfn --model llama --workload decoding --cache dynamic --cache static \
    --length 1024 --length 16384 --length 200000 --interleave-lengths --repeats 9 \
    --results benchmarks/results/decoding.csv --plot docs/benchmarks/img/decoding.png
dfn-hf bench single-head --results benchmarks/results/single-head.csv --plot docs/benchmarks/img/single-head.png
dfn-hf bench paper-lengths --results benchmarks/results/paper-lengths.csv
dfn-hf bench speed --model flownetwork --model flow-transformer --model llama --results benchmarks/results/speed.csv
dfn-hf bench seq2seq-speed --results benchmarks/results/seq2seq-speed.csv
dfn-hf bench translation --model liquid --results benchmarks/results/translation.csv
dfn-hf bench translation --model t5 --search-steps 0 --learning-rate 2e-3 --results benchmarks/results/translation.csv
dfn-hf bench translation --model t5 --max-steps 8000 --search-steps 0 --learning-rate 2e-3 --learning-rate 4e-3 \
    --results benchmarks/results/translation.csv
dfn-hf bench reversal --results benchmarks/results/reversal.csv
