# Sourced after tools/setup_env.sh:   setup_env dev; setup_te
#
# Makes .venv-te, which adds Transformer Engine to .venv, and puts it first in PATH. It is a separate
# environment because Megatron behaves differently as soon as TE can be imported. PyPI has TE's core
# library as a wheel, but its torch extension as source only. Compiling it takes minutes, so the wheel
# is cached in ~/.cache/megatron_prune, by the versions that it fits.

TE_DIR="$ENV_ROOT/.venv-te"
TE_WHEELS="${XDG_CACHE_HOME:-$HOME/.cache}/megatron_prune/wheels"
TE_VERSION="2.20.2"

_te_key() {
    "$ENV_DIR/bin/python" - "$TE_VERSION" <<'PYTHON'
import platform, sys, torch
print(f"te{sys.argv[1]}-torch{torch.__version__}-py{sys.version_info.major}{sys.version_info.minor}-{platform.machine()}")
PYTHON
}

# Succeeds if the wheel for this environment was built already.
te_wheel_is_there() { compgen -G "$TE_WHEELS/$(_te_key)/transformer_engine_torch-*.whl" >/dev/null; }

# The headers come from wheels (torch's own and one more), so no CUDA toolkit is needed.
_te_wheel() { # folder
    local target="$1" made
    compgen -G "$target/transformer_engine_torch-*.whl" >/dev/null && return 0
    command -v g++ >/dev/null || { echo "setup: Transformer Engine's torch extension needs g++" >&2; return 1; }
    echo "setup: compiling Transformer Engine's torch extension (about six minutes on two cores, once)" >&2
    mkdir -p "$target" && made="$(mktemp -d "$target/.making-XXXXXX")" || return 1
    NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_BUILD_USE_NVIDIA_WHEELS=1 MAX_JOBS="${MAX_JOBS:-$(nproc)}" \
        "$TE_DIR/bin/python" -m pip wheel --quiet --disable-pip-version-check --no-cache-dir --no-deps \
        --no-build-isolation --wheel-dir "$made" "transformer-engine-torch==$TE_VERSION" >&2 </dev/null &&
        mv "$made"/transformer_engine_torch-*.whl "$target/"
    local code=$?
    rm -rf "$made"
    return $code
}

_te_install() {
    local pip=("$TE_DIR/bin/python" -m pip --quiet --disable-pip-version-check) wheels cuda
    wheels="$TE_WHEELS/$(_te_key)" || return 1
    cuda="$("$ENV_DIR/bin/python" -c 'import torch; print(torch.version.cuda)')" || return 1
    rm -rf "$TE_DIR"
    echo "setup: making .venv-te (.venv and Transformer Engine $TE_VERSION)" >&2
    "$ENV_DIR/bin/python" -m venv "$TE_DIR" || return 1
    "$TE_DIR/bin/python" - "$ENV_DIR" <<'PYTHON' || return 1
import glob, sys, sysconfig
from pathlib import Path
(below,) = glob.glob(f"{sys.argv[1]}/lib/python*/site-packages")
Path(sysconfig.get_path("purelib"), "below.pth").write_text(f"import site; site.addsitedir({below!r})\n")
PYTHON
    # The extension's build and runtime dependencies; torch and the rest come from .venv.
    "${pip[@]}" install setuptools wheel ninja pybind11 einops onnx onnxscript nvdlfw-inspect \
        "nvidia-cudnn-frontend>=1.29.0" "nvidia-cuda-crt==$cuda.*" nvidia-curand >&2 </dev/null || return 1
    # TE looks for CUDA's headers and libraries in its own site-packages only: links to those that torch brought.
    cp -rsn "$ENV_DIR"/lib/python*/site-packages/nvidia/. "$TE_DIR"/lib/python*/site-packages/nvidia/ || return 1
    _te_wheel "$wheels" || return 1
    "${pip[@]}" install --no-deps "transformer-engine==$TE_VERSION" "transformer-engine-cu13==$TE_VERSION" \
        "$wheels"/transformer_engine_torch-*.whl >&2 </dev/null || return 1
    cp "$ENV_DIR/.installed-dev" "$TE_DIR/.installed"
}

setup_te() {
    if ! cmp -s "$ENV_DIR/.installed-dev" "$TE_DIR/.installed"; then
        exec 9<"$ENV_ROOT"
        if command -v flock >/dev/null; then flock 9; fi
        cmp -s "$ENV_DIR/.installed-dev" "$TE_DIR/.installed" || _te_install || return 1
        exec 9<&-
    fi
    export PATH="$TE_DIR/bin:$PATH" VIRTUAL_ENV="$TE_DIR"
}
