# shellcheck shell=bash
# Sourced by the other scripts. `apet_env [extra ...]` makes the virtual environment once, installs ApET with these
# extras of pyproject.toml into it, activates it and exports PYTHON, its interpreter.
#
#   PYTHON      the interpreter that makes the environment (default: python3)
#   APET_VENV   the environment's folder (default: .venv), or "none": use PYTHON as it is and install nothing
#   APET_PINS   pip requirements, e.g. "transformers==5.17.0". Without them the versions are those of constraints.txt,
#               which were tested together; with them, the newest that requirements.txt and the pins allow

_apet_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

_apet_say() { echo "[apet] $*" >&2; }

# Is $1 an interpreter that is new enough? Says why not.
_apet_check_python() {
    local version
    if ! version=$("$1" -c 'import platform; print(platform.python_version())' 2>/dev/null); then
        _apet_say "no Python found as '$1'; install Python 3.11 or newer, or set PYTHON to one"
        return 1
    fi
    if ! "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        _apet_say "ApET needs Python 3.11 or newer, but '$1' is $version; set PYTHON to a newer one"
        return 1
    fi
}

# Does the interpreter PYTHON have what it needs, so that it can be used as it is?
_apet_check_packages() {
    if ! "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(not (u.find_spec("torch") and u.find_spec("transformers")))'; then
        _apet_say "APET_VENV=none, but '$PYTHON' lacks torch or transformers; install requirements.txt or unset APET_VENV"
        return 1
    fi
}

# What decides the contents of the environment, as one hash.
_apet_fingerprint() {
    "$PYTHON" - "$_apet_root" "$@" <<'PY'
import hashlib, pathlib, sys

state = hashlib.sha256(repr((sys.version, sys.argv[1:])).encode())
for name in ("requirements.txt", "constraints.txt", "pyproject.toml"):
    state.update(pathlib.Path(sys.argv[1], name).read_bytes())
print(state.hexdigest())
PY
}

# Makes the environment in folder $1 unless a working one is there.
_apet_make_venv() {
    if [ -x "$1/bin/python" ] && "$1/bin/python" -m pip --version >/dev/null 2>&1; then
        return
    fi
    _apet_check_python "$PYTHON" || return
    _apet_say "making the virtual environment $1 with $PYTHON"
    if ! "$PYTHON" -m venv "$1"; then
        _apet_say "that failed (Debian and Ubuntu: apt-get install python3-venv); or set APET_VENV=none"
        return 1
    fi
    "$1/bin/python" -m pip install --quiet --upgrade pip
}

# Installs ApET with the extras $2 (comma-separated) into folder $1, unless a stamp says that this was done.
_apet_install() {
    local stamp="$1/.apet-installed-${2:-base}" wanted options
    read -r -a options <<<"${APET_PINS:--c $_apet_root/constraints.txt}"
    wanted=$(_apet_fingerprint "$2" "${APET_PINS:-}") || return
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return
    fi
    _apet_say "installing ApET${2:+ with the extras $2} into $1; this happens once and takes some minutes"
    [ -t 2 ] || options+=(--quiet)
    # setuptools warns about every editable install of a folder with several packages.
    PYTHONWARNINGS=ignore "$PYTHON" -m pip install -r "$_apet_root/requirements.txt" -e "$_apet_root${2:+[$2]}" \
        ${options[@]+"${options[@]}"} >&2 || return
    echo "$wanted" >"$stamp"
}

apet_env() {
    local extras venv="${APET_VENV:-.venv}"
    extras=$(IFS=,; echo "$*")
    export PYTHON="${PYTHON:-python3}"
    if [ "$venv" = none ]; then
        _apet_check_python "$PYTHON" && _apet_check_packages || return
        _apet_say "using $(command -v "$PYTHON") as it is"
        return
    fi
    [[ "$venv" = /* ]] || venv="$_apet_root/$venv"
    _apet_make_venv "$venv" || return
    PYTHON="$venv/bin/python"
    _apet_check_python "$PYTHON" && _apet_install "$venv" "$extras" || return
    export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
}

# `apet_test_apart EXTRA [pytest arguments]`: run pytest where that extra of pyproject.toml is, in .venv/EXTRA unless
# APET_VENV names another environment.
apet_test_apart() {
    export APET_VENV="${APET_VENV:-.venv/$1}"
    apet_env test "$1" || return
    exec "$PYTHON" -m pytest -q -p no:cacheprovider "${@:2}"
}
