# Sourced by the other scripts: makes .venv with the package in it, or says what is missing.

fail() {
    echo "$1" >&2
    exit 1
}

# make_environment [EXTRA]: .venv in the current folder, the package installed from it. Needs no
# network if that was done since setup.cfg and pyproject.toml last changed.
make_environment() {
    local done_file=".venv/installed${1:+-$1}"
    [ -e .venv ] || [ -L .venv ] || new_environment
    .venv/bin/python -c '' 2>/dev/null ||
        fail ".venv has no working Python: remove it, and the next call makes another."
    if [ "$done_file" -nt setup.cfg ] && [ "$done_file" -nt pyproject.toml ]; then
        return
    fi
    .venv/bin/python -m pip --version >/dev/null 2>&1 ||
        .venv/bin/python -m ensurepip >/dev/null 2>&1 ||
        fail ".venv has no pip and cannot get it: install pip there, for example with uv pip install pip."
    echo "Installing into .venv (the first time takes a minute or two) ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${1:+[$1]}" ||
        fail "Installation failed; see pip's message above."
    touch "$done_file"
}

# new_environment: an empty .venv, or nothing.
new_environment() {
    command -v python3 >/dev/null || fail "python3 was not found: sudo apt install python3 python3-venv"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "Python 3.11 or newer is needed, $(python3 --version 2>&1) was found."
    local free_megabytes
    free_megabytes=$(df -Pm . | awk 'NR == 2 { print $4 }')
    [ "$free_megabytes" -ge 3000 ] ||
        fail "3000 MB of free disk space are needed here, $free_megabytes MB are left."
    python3 -m venv .venv >/dev/null 2>&1 || {
        rm -rf .venv
        fail "Python cannot make a virtual environment: sudo apt install python3-venv"
    }
}

# use_huge_pages: XLA allocates the temporary arrays of a step anew each time. In pages of 2 MB instead of
# 4 kB this costs nothing, and a step on CPUs takes a fifth less time. Older glibc than 2.35 ignores it.
use_huge_pages() {
    export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
}
