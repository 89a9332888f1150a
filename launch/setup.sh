# Make the project's own environment ready and enter it. Sourced by quickstart.sh and test.sh, from any folder.
# The first time it downloads packages (minutes); after that it costs two seconds.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv

fail() {
    echo "setup: $1" >&2
    exit 1
}

install_packages() {
    local python=${PYTHON:-python3}
    local header="import os, sysconfig as s, sys; sys.exit(not os.path.exists(s.get_path('include') + '/Python.h'))"
    command -v "$python" > /dev/null || fail "$python is not on PATH; install Python 3.11 or newer."
    "$python" -c "import sys; sys.exit(sys.version_info < (3, 11))" ||
        fail "$python is $("$python" -V 2>&1), older than 3.11; name another one, e.g. PYTHON=python3.12."
    "$python" -c "$header" || fail "$python has no Python.h, which DeepSpeed compiles with; install python3-dev."
    [ ! -e "$venv" ] || [ -f "$venv/stamp" ] || fail "$venv is not of this script's making, or not finished; move it away."
    echo "setup: installing packages into $venv" >&2
    "$python" -m venv --clear "$venv" || fail "$python cannot make a virtual environment; install its venv module."
    touch "$venv/stamp"
    "$venv/bin/pip" install -q -c "$root/constraints.txt" torch==2.13.0
    "$venv/bin/pip" install -q -c "$root/constraints.txt" -e "$root[test]"
}

# torch does not quote the folder it links from.
[[ $root != *[[:space:]]* ]] || fail "the folder '$root' has a space in its name, which compiling does not survive; move it."

# DeepSpeed compiles an operator at its first start.
command -v "${CXX:-c++}" > /dev/null || fail "no C++ compiler (${CXX:-c++}) on PATH, which DeepSpeed needs; install g++."

# The folder is part of the stamp because an environment does not survive being moved.
stamp=$(cat "$root/pyproject.toml" "$root/constraints.txt" <(echo "$root") | sha256sum)
if [ "$stamp" != "$(cat "$venv/stamp" 2> /dev/null)" ]; then
    install_packages
    echo "$stamp" > "$venv/stamp"
fi

# The folder is ours, because an operator that was built by another torch fails.
export TORCH_EXTENSIONS_DIR=$root/.cache/torch_extensions
# Who is killed while it compiles leaves a lock behind, for which all later starts would wait without a word.
pgrep -x ninja > /dev/null || rm -f "$TORCH_EXTENSIONS_DIR"/*/lock
export PATH=$venv/bin:$PATH

if ! python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
    export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
fi

# Two ranks share the cores. glibc must not hand large blocks back after every step: page faults cost 10 to 20 %.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 1 ? cores / 2 : 1))}
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-1000000000}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-10000000000}
