#!/usr/bin/env bash
# All that is measured on a CUDA GPU, in about ten minutes, into one folder:
#
#     bash benchmarks/gpu.sh [FOLDER]          (default: runs/benchmark-gpu)
#
# The tables of training in both stages (samples/s from JPEG files, share of the card's matrix rate, peak memory, padding
# against packing), the same with flash attention where `flash_attn` is installed, and answers a second. Needs a card and
# `pip install -e ".[train]"`, and no network. STEPS, ROWS and BATCH make it shorter or longer; CPU=1 tries it without a card.
set -euo pipefail
if [[ "${1:-}" == --help ]]; then
    sed -n '2,8s/^# \?//p' "$0"
    exit 0
fi
cd "$(dirname "$0")/.."
folder=${1:-runs/benchmark-gpu}
training=(python benchmarks/training.py --steps "${STEPS:-20}" --rows "${ROWS:-2048}" --batch "${BATCH:-64}")
if [[ -z "${CPU:-}" ]] && ! python -c 'import torch; exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: PyTorch sees no CUDA GPU here." >&2
    exit 1
fi
mkdir -p "$folder"

measure() { # a name, then the command; one that fails does not stop the others
    echo "── $1 ──"
    "${@:2}" > "$folder/$1.txt" 2> "$folder/$1.log" || echo "failed: see $folder/$1.log" | tee -a "$folder/$1.txt"
    grep '^|' "$folder/$1.txt" || true
}

nvidia-smi > "$folder/card.txt" 2>&1 || true
git rev-parse HEAD >> "$folder/card.txt" || true
for stage in pretrain sft; do
    measure "$stage" "${training[@]}" --stage $stage --output "$folder/$stage"
done
if python -c 'import flash_attn' 2> /dev/null; then
    measure flash "${training[@]}" --attention flash_attention_2 --variants best unpacked packed --output "$folder/pretrain"
else
    echo "Skipped: flash_attention_2, since flash_attn is not installed."
fi
measure answers python benchmarks/engines.py --engines transformers "transformers compiled" "stock LLaVA" \
    --rounds 1 --output "$folder/answers"
echo "All tables are in $folder/*.txt."
