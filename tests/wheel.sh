#!/usr/bin/env bash
# The wheel as a user gets it: built in release, installed into an empty environment, used.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

.venv/bin/maturin build --release --out "$work" --interpreter "${PYTHON:-python3.11}"
"${PYTHON:-python3.11}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-index "$work"/*.whl
cd "$work" # away from the sources
venv/bin/python - <<'PYTHON'
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
licences = {path.name for path in pathlib.Path(vmix.__file__).parents[1].rglob("LICENSE-*")}
assert licences == {"LICENSE-MIT", "LICENSE-APACHE", "LICENSE-CLIP"}, licences
PYTHON
venv/bin/vmix init --base "$root/comfy_nodes/demo/model" --label "a red apple" --training-free \
    --out red.safetensors
venv/bin/vmix validate red.safetensors
echo "wheel of $(venv/bin/vmix --version): 1 passed"
