#!/usr/bin/env bash
# Build, train and prune the small embedded model on two ranks of this machine's processor, then show the report.
# Under 6 minutes on two cores, beside the first download of packages. Further arguments go to launch/prune.py.
set -euo pipefail
export DS_ACCELERATOR=cpu # what ds_configs/zero3_cpu.json is written for, also where there is a GPU
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

output=$root/out/quickstart
arguments=("$@")
for ((i = 0; i < $#; i++)); do
    case ${arguments[i]} in
        --output_dir) output=${arguments[i + 1]:-} ;;
        --output_dir=*) output=${arguments[i]#*=} ;;
    esac
done

free_port=$(python -c "import socket; s = socket.socket(); s.bind(('localhost', 0)); print(s.getsockname()[1])")
deepspeed --num_accelerators 2 --log_level warning --master_port "$free_port" "$root/launch/prune.py" \
    --ds_config "$root/ds_configs/zero3_cpu.json" --output_dir "$output" --overwrite --max_steps 150 "$@"

cat << EOF

$(cat "$output/report.md")

Load the model:
    $venv/bin/python -c "from transformers import AutoModelForCausalLM as Model; print(Model.from_pretrained('$output/pruned', trust_remote_code=True))"
Look at the curves:
    $venv/bin/tensorboard --logdir $output/tensorboard
EOF
