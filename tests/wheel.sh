#!/usr/bin/env bash
# The wheel as a user gets it: built in release, installed into an empty environment of every Python
# from 3.10 to 3.13 that is installed, used.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

.venv/bin/maturin build --release --out "$work" --interpreter "${PYTHON:-python3.11}"
# pyenv puts a shim of each on the path, which fails where no version is chosen.
for folder in "${PYENV_ROOT:-${HOME:-}/.pyenv}"/versions/*/bin; do
    PATH=$folder:$PATH
done
passed=0
for version in 3.10 3.11 3.12 3.13; do
    if ! interpreter=$("python$version" -c 'import sys; print(sys.executable)' 2>/dev/null); then
        echo "wheel: SKIPPED on Python $version, which is not installed"
        continue
    fi
    venv=$work/$version
    "$root/.venv/bin/uv" venv --quiet --python "$interpreter" "$venv"
    "$root/.venv/bin/uv" pip install --quiet --no-index --python "$venv/bin/python" "$work"/*.whl
    cd "$work" # away from the sources
    "$venv/bin/python" - <<'PYTHON'
import pathlib
import vmix

layers = vmix.unet_layers("sdxl")
assert len(layers) == 70, len(layers)
assert "site-packages" in vmix.__file__, vmix.__file__
try:
    vmix.open("absent.safetensors")
except vmix.VMixError as error:
    assert "absent.safetensors" in str(error)
else:
    raise AssertionError("a file that does not exist was opened")
package = pathlib.Path(vmix.__file__).parent
assert (package / "_native.pyi").exists()
for base in ("sd15", "sdxl"):
    assert (package / "train" / "configs" / base / "unet" / "config.json").exists(), base
for name in ("prompts.txt", "fit_labels.toml", "fit_labels_anime.toml"):
    assert (package / "fit" / name).exists(), name
licences = {path.name for path in pathlib.Path(vmix.__file__).parents[1].rglob("LICENSE-*")}
assert licences == {"LICENSE-MIT", "LICENSE-APACHE", "LICENSE-CLIP"}, licences
PYTHON
    "$venv/bin/vmix" init --base "$root/comfy_nodes/demo/model" --label "a red apple" \
        --out "red-$version.safetensors"
    "$venv/bin/vmix" validate "red-$version.safetensors"
    echo "wheel of $("$venv/bin/vmix" --version) on Python $version: used"
    passed=$((passed + 1))
done
echo "wheel: used on $passed of 4 Pythons"
((passed))
