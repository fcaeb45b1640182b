#!/bin/sh
# Makes an environment in which the real Dynamo 1.6.1 runs, as the peer of the interop tests:
#   tests/interop/make_environment.sh DIR [PYTHON]
#   SELFHOST_DYNAMO_PYTHON=DIR/bin/python python -m pytest tests/interop
# PYTHON (default python3.11) must be 3.11 or later. An environment that is complete is left alone.
set -eu

directory=${1:?usage: make_environment.sh DIR [PYTHON]}
python=${2:-python3.11}
here=$(dirname "$0")

if cmp -s "$here/requirements.txt" "$directory/complete"; then
    exit 0
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$python is too old: the real Dynamo needs Python 3.11 or later" >&2
    exit 1
}
"$python" -m venv --clear "$directory"
# --no-deps: the packages also ask for GPU engines and cluster clients that these tests never load.
"$directory/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    --only-binary :all: --requirement "$here/requirements.txt"
"$directory/bin/python" -c 'import dynamo.llm, dynamo.frontend'
cp "$here/requirements.txt" "$directory/complete"
