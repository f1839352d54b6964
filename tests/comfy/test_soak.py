"""Hundreds of prompts on one server: nothing fails, nothing grows."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import host
import pytest
from comfy_server import Server
from workflows import apply, demo, node, sampled

pytestmark = [pytest.mark.full, pytest.mark.usefixtures("comfyui")]
PROMPTS = int(os.environ.get("VMIX_SOAK_PROMPTS", "300"))
WARM = PROMPTS // 6  # by then every model, adapter and kernel has been used


def resident(process: int) -> int:
    """Bytes of memory that the process has for itself; mapped files are not its own."""
    fields = dict(
        line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines()
    )
    return int(fields["RssAnon"].split()[0]) * 1024


def test_soak(model_file: Any, tmp_path: Path) -> None:
    import bases
    import vmix

    layers = {x.name: (x.ldm_name, 320) for x in vmix.unet_layers("sd15")}
    mini = bases.Base("sd15", None, layers)
    for seed in (3, 4):
        bases.give_adapter(mini, tmp_path, seed=seed)
    # A heap that gives back what is freed: otherwise ComfyUI's own loading and freeing of
    # checkpoints fragments it, by some per cent in a few hundred prompts without our nodes.
    steady = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    server = Server(tmp_path / "comfyui", environment=steady)
    try:
        checkpoint = server.put("checkpoints", model_file("sd15-mini-text"))
        adapters = [server.put("vmix", tmp_path / f"sd15-{seed}.safetensors") for seed in (3, 4)]
        demo_adapter = server.put(
            "vmix", host.ROOT / "comfy_nodes" / "demo" / "adapter.safetensors", "demo.safetensors"
        )

        def of_the_demo(i: int) -> Any:
            weights = {"sharp focus": i % 5 / 2, "natural lighting": i % 3 / 2}
            prompt = demo(aesthetics=json.dumps(weights), strength=i % 7 / 4, seed=i, steps=2)
            if i % 2:
                prompt["load"] = node("VMixLoader", vmix_name=demo_adapter)
                for name in ("apply", "aesthetics"):
                    prompt[name]["inputs"]["vmix"] = ["load", 0]
            return prompt

        def of_the_mini(i: int) -> Any:
            prompt = {
                "checkpoint": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
                "load": node("VMixLoader", vmix_name=adapters[i % 2]),
                "choose": node(
                    "VMixAesthetics", vmix=["load", 0],
                    aesthetics=json.dumps({"light": i % 5 / 2}),
                ),
                "apply": apply(["checkpoint", 0], ["load", 0], aesthetics=["choose", 0]),
            }  # fmt: skip
            return sampled(
                prompt, ["apply", 0], ["checkpoint", 1], ["checkpoint", 2], seed=i, steps=1
            )

        kinds = itertools.cycle([of_the_demo, of_the_demo, of_the_mini, of_the_mini])
        memory = []
        for i, make in zip(range(PROMPTS), kinds, strict=False):
            assert server.run(make(i))["image"]["images"]
            memory.append(resident(server.process.pid))
        # The largest of a few, as loading and freeing a model go up and down.
        first, last = (max(memory[end - 8 : end]) for end in (WARM, PROMPTS))
        print(f"after {WARM}: {first / 1e6:.0f} MB, after {PROMPTS}: {last / 1e6:.0f} MB")
        assert last <= 1.02 * first
        log = server.said()
        assert "Traceback" not in log.split("To see the GUI go to")[-1]
    finally:
        server.stop()
