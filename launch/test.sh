#!/usr/bin/env bash
# Installs what the tests need into .venv and runs them: bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
make_environment 'test'
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# A file to a process: what its tests share is made once. In the order of tests/conftest.py.
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
