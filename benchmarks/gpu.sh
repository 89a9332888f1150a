#!/usr/bin/env bash
# What only a GPU can tell, within nine minutes, on a machine with one GPU, Python 3.12 and no network:
#
#     bash benchmarks/gpu.sh WHEELS             # what it finds goes to out/gpu, or to the folder $OUT
#     bash benchmarks/gpu.sh WHEELS tests scale # these parts alone, where all do not fit into nine minutes
#
# Not run on a GPU yet: each part was tried on a processor, at small shapes.
#
# torch, transformers, pytest and what they need are there. WHEELS is a folder with the rest, 8 MB, filled elsewhere:
#
#     pip download --no-deps --only-binary=:all: --python-version 3.12 -c constraints.txt -d WHEELS annotated-types \
#         datasets defusedxml dill gguf hjson multiprocess nltk pydantic pydantic_core typing-inspection \
#         typing_extensions
#     DS_BUILD_OPS=0 pip wheel --no-deps -c constraints.txt -w WHEELS deepspeed rouge-score
#
# Nothing is compiled: zero3 and zero3_fp16 ask for torch's AdamW, and DeepSpeed builds its operators only where they are used.
set -uo pipefail
wheels=$(realpath "${1:?the folder of wheels}")
wanted=" ${*:2} "
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=$(realpath -m "${OUT:-out/gpu}")
work=$(mktemp -d)
keep() { # what the parts printed, and the reports of their runs
    (cd "$work" && find . -type f \( -path "./logs/*" -o -name "report.*" \) | tar czf "$out/logs.tgz" -T -)
    rm -rf "$work"
}
trap keep EXIT
mkdir -p "$out" "$work/logs"
: > "$out/summary.txt"
export DS_ACCELERATOR=cuda HF_HUB_OFFLINE=1 PYTHONPATH=$work/site:$PWD PATH=$work/site/bin:$PATH PYTHONUNBUFFERED=1

failed=0
part() { # NAME SECONDS COMMAND...: run it, keep what it prints, go on where it fails
    local started=$SECONDS code=0 left=$((530 - SECONDS))
    [[ $1 =~ ^(install|machine|text)$ || $wanted = "  " || $wanted = *" $1 "* ]] || return 0
    timeout -k 5 "$((left > $2 ? $2 : left > 1 ? left : 1))" "${@:3}" > "$work/logs/$1.log" 2>&1 || code=$?
    echo "$1: exit status $code after $((SECONDS - started)) s" | tee -a "$out/summary.txt"
    ((code == 0)) || failed=1
}

prune() { # NAME SECONDS FLAGS...: of launch/prune.py, on one GPU
    part "$1" "$2" deepspeed --num_accelerators 1 launch/prune.py --output_dir "$work/$1" --no-tensorboard "${@:3}"
}

part install 60 python3 -m pip install -q --no-index --no-compile --no-deps --target "$work/site" "$wheels"/*.whl
part machine 60 python3 -c "import datasets, deepspeed, torch; from scale_prune.system import versions
print(torch.cuda.get_device_name(), versions())"
part text 40 python3 -c "from pathlib import Path; from scale_prune.data import build
build(Path('$work/cache')).rename('$work/text')"

# The tests of ZeRO-3 on one rank: masks in float32 and bf16, scores by all criteria, gradients and overflows in fp16.
part tests 240 python3 -m pytest -v --durations 0 -m slow -k "[1]" tests/test_zero3.py
small=(--model "$work/text/untrained" --train_file "$work/text/train.jsonl" --validation_file "$work/text/validation.jsonl"
    --block_size 128 --train_batch_size 8 --eval_tokens 8192)
prune bf16 60 --ds_config zero3 "${small[@]}" --max_steps 20 --calibration_tokens 8192
prune fp16 60 --ds_config zero3_fp16 "${small[@]}" --max_steps 20 --criterion gum

# GPT-Neo-1.3B's shape, pruned and repaired without training, and the memory that the dry run says.
shape=(--max_steps 0 --block_size 1024 --train_batch_size 2 --calibration_tokens 32768 --eval_tokens 8192)
part scale 260 python3 benchmarks/scale.py --work "$work/scale" --shape gpt-neo-1.3b --ranks 1 --ds_config zero3 \
    --tokenizer "$work/text/untrained" --train_file "$work/text/train.jsonl" \
    --validation_file "$work/text/validation.jsonl" -- "${shape[@]}"
part dry_run 60 python3 launch/prune.py --dry_run --world_size 1 --ds_config zero3 --precision bf16 \
    --model "$work/scale/model-gpt-neo-1.3b" --train_file "$work/text/train.jsonl" \
    --validation_file "$work/text/validation.jsonl" --output_dir "$work/dry" "${shape[@]}"

part overhead 90 deepspeed --num_accelerators 1 benchmarks/overhead.py --output_dir "$work/overhead" --ds_config zero3 \
    --precision bf16 --micro_batch_size 8 --block_size 512
part solve 60 python3 benchmarks/solve.py --features 16384
exit $failed
