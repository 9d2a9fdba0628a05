#!/usr/bin/env bash
# Every measured table of the README: printed from results/*.csv, with the runs that are missing there done first.
set -euo pipefail
cd "$(dirname "$0")/results"
dfn-hf bench bytes --model adaptive --model dfn --model "dfn of equal compute" \
    --model "llama of equal compute" --results bytes.csv
dfn-hf bench million --entity-sampling adaptive --results million.csv
dfn-hf bench fields --results fields.csv
dfn-hf bench field-speed --results field-speed.csv
dfn-hf bench contrastive --results contrastive.csv
dfn-hf bench contrastive --task sounds --seeds 3 --results contrastive.csv
dfn-hf bench memory --results memory.csv
dfn-hf bench lm --model flownetwork --model flownetwork-1-pattern --model flownetwork-no-flow \
    --model flow-transformer --model llama --model llama-conv --results lm.csv
dfn-hf bench speed --model flownetwork --model flow-transformer --model llama --results speed.csv
dfn-hf bench translation --model liquid --results translation.csv
dfn-hf bench translation --model t5 --search-steps 0 --learning-rate 2e-3 --results translation.csv
dfn-hf bench translation --model t5 --steps 8000 --search-steps 0 --learning-rate 2e-3 --learning-rate 4e-3 \
    --results translation.csv
dfn-hf bench translation --model liquid --model "no frequency attention" --model "no offsets" --model "1 expert" \
    --model "no LSTM" --model "no compression" --seeds 2 --steps 800 --no-scores --results translation.csv
dfn-hf bench reversal --results reversal.csv
dfn-hf bench seq2seq-speed --results seq2seq-speed.csv
dfn-hf bench scaling --results scaling.csv
dfn-hf bench million --results million.csv
dfn-hf bench peers --time-limit 10 --results peers.csv
dfn-hf bench peers --model dfn --model llama --work decoding --cache dynamic --cache static \
    --length 1024 --length 16384 --length 200000 --together --repeats 9 --results decoding.csv
dfn-hf bench operation --results operation.csv
dfn-hf bench paper --results paper.csv
dfn-hf bench long-lm --steps 400 --results long-lm.csv
dfn-hf bench recall --model dfn --results recall.csv
dfn-hf bench retrieval --contexts 10 --control-contexts 1 --results retrieval.csv
dfn-hf bench lm --results lm.csv
dfn-hf bench ablations --results ablations.csv
dfn-hf bench quantization --results quantization.csv
