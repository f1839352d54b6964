"""VMix in pipelines of diffusers.

load_vmix(pipe, "adapter.safetensors", "vibrant color")   # loads
set_vmix(pipe, {"vibrant color": 1.3})                    # other label weights
set_vmix_scale(pipe, 0.8)                                 # λ
get_vmix(pipe), list_vmix(pipe)
unload_vmix(pipe)
fit_vmix(pipe, {"light": ("bright", "dark")})             # an adapter, from words
"""

from vmix.diffusers.fitting import fit_vmix
from vmix.diffusers.mixing import (
    get_vmix,
    list_vmix,
    load_vmix,
    set_vmix,
    set_vmix_scale,
    unload_vmix,
)

__all__ = [
    "fit_vmix",
    "get_vmix",
    "list_vmix",
    "load_vmix",
    "set_vmix",
    "set_vmix_scale",
    "unload_vmix",
]
