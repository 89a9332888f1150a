#!/usr/bin/env bash
# Prune a quarter of the neurons of SmolLM2-135M on two ranks of this machine's processor, repair and fine-tune it a little,
# and show what has become of it. Under 8 minutes on two cores, downloads included; 14 where they have no instructions for
# bf16. Further arguments go to launch/prune.py.
# Where the model's package cannot be had, a small model is trained and pruned instead; with --model, that model is pruned.
set -euo pipefail
export DS_ACCELERATOR=cpu # what ds_configs/zero3_cpu.json is written for, also where there is a GPU
started=$SECONDS
say() { echo "quickstart, $((SECONDS - started)) s: $1" >&2; }
say "packages and an environment, 4 minutes the first time"
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

output=$root/out/quickstart
overwrite=(--overwrite) # what is there is the last quickstart's, but in a folder that is named
given=no
arguments=("$@")
for ((i = 0; i < $#; i++)); do
    case ${arguments[i]} in
        --output_dir) output=${arguments[i + 1]:-} overwrite=() ;;
        --output_dir=*) output=${arguments[i]#*=} overwrite=() ;;
        --model | --model=*) given=yes ;;
    esac
done
output=${output/#\~\//$HOME/} # which bash leaves behind an = and in quotes

precision=bf16
if ! grep -qs bf16 /proc/cpuinfo; then
    precision=fp32 # where a processor has no instructions for bf16, its products take forty times as long
fi
model=$root/.cache/smollm2
settings=(--max_steps 150)
if [ $given = no ]; then
    say "SmolLM2-135M, 93 MB, half a minute the first time"
    if python "$root/launch/smollm2.py" "$model"; then
        build="from scale_prune.config import cache_folder; from scale_prune.data import build; print(build(cache_folder()))"
        text=$(python -c "$build" | tail -n 1) # training a tokenizer prints empty lines before it
        settings=(--model "$model" --train_file "$text/train.jsonl" --validation_file "$text/validation.jsonl"
            --block_size 256 --train_batch_size 4 --precision $precision --learning_rate 1e-4 --eval_tokens 4096
            --remaining 0.75 --max_steps 0 --calibration_tokens 8192 --recovery_steps 16 --layout gguf)
        say "SmolLM2-135M: calibrate, prune and repair at once, then 16 steps of training; 4 minutes"
    else
        given=small
        say "its package cannot be had, so a small model is trained and pruned; 3 minutes"
    fi
fi

free_port=$(python -c "import socket; s = socket.socket(); s.bind(('localhost', 0)); print(s.getsockname()[1])")
deepspeed --num_accelerators 2 --log_level warning --master_port "$free_port" "$root/launch/prune.py" \
    --ds_config "$root/ds_configs/zero3_cpu.json" --output_dir "$output" "${overwrite[@]}" "${settings[@]}" "$@"

cat << EOF

$(cat "$output/report.md")

EOF
if [ $given = no ]; then
    say "what the two models write; a few seconds"
    python - "$model" "$output/pruned" << 'EOF'
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()
models = {name: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True) for name, path in zip(("dense", "pruned"), sys.argv[1:])}
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for prompt in ("The capital of France is", "A list comprehension in Python"):
    for name, model in models.items():
        ids = tokenizer(prompt, return_tensors="pt")
        written = model.generate(**ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
        print(f"{name:>6}: {tokenizer.decode(written[0], skip_special_tokens=True)!r}")
EOF
    cat << EOF

Chat with it, in llama.cpp or what stands on it:
    llama-cli -m $output/pruned.gguf
EOF
fi
cat << EOF
Load the model:
    $venv/bin/python -c "from transformers import AutoModelForCausalLM as Model; print(Model.from_pretrained('$output/pruned', trust_remote_code=True))"
Look at the curves:
    $venv/bin/tensorboard --logdir $output/tensorboard
EOF
say "done"
