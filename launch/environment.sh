# Sourced by the other scripts: makes .venv with the package in it, or says what is missing.

fail() {
    echo "$1" >&2
    exit 1
}

# make_environment [EXTRA]: .venv in the current folder, the package installed from it.
make_environment() {
    command -v python3 >/dev/null || fail "python3 was not found: sudo apt install python3 python3-venv"
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "Python 3.11 or newer is needed, $(python3 --version 2>&1) was found."
    local free_megabytes
    free_megabytes=$(df -Pm . | awk 'NR == 2 { print $4 }')
    [ "$free_megabytes" -ge 3000 ] ||
        fail "3000 MB of free disk space are needed here, $free_megabytes MB are left."
    if [ ! -x .venv/bin/python ] || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        rm -rf .venv
        python3 -m venv .venv >/dev/null 2>&1 || {
            rm -rf .venv
            fail "Python cannot make a virtual environment: sudo apt install python3-venv"
        }
    fi
    echo "Installing into .venv (the first time takes a minute or two) ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${1:+[$1]}" ||
        fail "Installation failed; see pip's message above."
}

# use_huge_pages: XLA allocates the temporary arrays of a step anew each time. In pages of 2 MB instead of
# 4 kB this costs nothing, and a step on CPUs takes a fifth less time. Older glibc than 2.35 ignores it.
use_huge_pages() {
    export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
}
