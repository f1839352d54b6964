"""The nodes. What they do is in files.py, selection.py, mixing.py and grid.py."""

from __future__ import annotations

import os
from typing import Any

import comfy.ldm.modules.attention
import comfy.sample
import comfy.samplers
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import ComfyExtension, io

from . import demo_model
from .files import APPLY_TO, DTYPES, Selection, VMix, open_file
from .grid import draw_row
from .mixing import Layer, ValueMix, layer_paths
from .selection import block_of, block_strengths, parse_selection, parse_strengths

CATEGORY = "VMix"
FOLDER = "vmix"
KEY = "vmix"  # of our wrappers on a model
BASES = {"sd15": "SD1.5", "sdxl": "SDXL", "other": "a U-Net of its own layout"}

VMIX = io.Custom("VMIX")
AESTHETICS = io.Custom("VMIX_AESTHETICS")


class VMixLoader(io.ComfyNode):  # type: ignore[misc]
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VMixLoader",
            display_name="Load VMix",
            category=CATEGORY,
            description="Opens a VMix adapter or preset from models/vmix.",
            inputs=[
                io.Combo.Input(
                    "vmix_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A file from models/vmix; the file itself says what it is.",
                )
            ],
            outputs=[VMIX.Output(display_name="vmix")],
        )

    @classmethod
    def fingerprint_inputs(cls, vmix_name: str) -> Any:
        stat = os.stat(folder_paths.get_full_path_or_raise(FOLDER, vmix_name))
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    @classmethod
    def execute(cls, vmix_name: str) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise(FOLDER, vmix_name)
        return io.NodeOutput(open_file(path, vmix_name))


class VMixAesthetics(io.ComfyNode):  # type: ignore[misc]
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VMixAesthetics",
            display_name="VMix Aesthetics",
            category=CATEGORY,
            description="One slider for each label of the connected file, with the range that the "
            "file gives it. Labels that are not set have the file's default.",
            inputs=[
                VMIX.Input("vmix", tooltip="The file whose labels these are."),
                io.String.Input(
                    "aesthetics",
                    default="{}",
                    tooltip='JSON, label to weight, such as {"vibrant color": 1.5}. '
                    "The sliders write it.",
                ),
            ],
            outputs=[AESTHETICS.Output(display_name="aesthetics")],
        )

    @classmethod
    def execute(cls, vmix: VMix, aesthetics: str) -> io.NodeOutput:
        weights = vmix.weights(parse_selection(aesthetics))
        # For sliders whose file the browser cannot find by following links.
        return io.NodeOutput(weights, ui={"vmix_labels": [labels_of(vmix)]})


class VMixApply(io.ComfyNode):  # type: ignore[misc]
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VMixApply",
            display_name="Apply VMix",
            category=CATEGORY,
            description="Mixes the values of the chosen labels into every cross-attention layer, "
            "V_c + λ·V_a. Goes between checkpoint and sampler, before or after LoRA, ControlNet "
            "and IP-Adapter, and stacks with itself.",
            inputs=[
                io.Model.Input("model"),
                VMIX.Input("vmix"),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="λ. 0 is exactly the model without VMix.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where in the sampling VMix begins to act.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where in the sampling VMix ceases to act.",
                ),
                apply_to_input(),
                io.String.Input(
                    "blocks",
                    default="",
                    tooltip="Strength per block, times the strength above: in4-8=0.5, mid=1, "
                    "out=0. Blocks that are not named have 1.",
                ),
                AESTHETICS.Input(
                    "aesthetics",
                    optional=True,
                    tooltip="The labels' weights; the file's defaults if not connected.",
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Where in the picture VMix acts, and how much."
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        vmix: VMix,
        strength: float,
        start_percent: float,
        end_percent: float,
        apply_to: str,
        blocks: str,
        aesthetics: Selection | None = None,
        mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:
        return io.NodeOutput(
            applied(
                model,
                vmix,
                aesthetics,
                strength,
                start_percent=start_percent,
                end_percent=end_percent,
                apply_to=apply_to,
                blocks=blocks,
                mask=mask,
            )
        )


class VMixSavePreset(io.ComfyNode):  # type: ignore[misc]
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VMixSavePreset",
            display_name="Save VMix Preset",
            category=CATEGORY,
            description="Saves the values of one selection, which is all that it takes to use it "
            "again, as a file that Load VMix lists.",
            inputs=[
                VMIX.Input("vmix"),
                io.String.Input(
                    "filename_prefix", default="vmix/preset", tooltip="In ComfyUI's output folder."
                ),
                apply_to_input(),
                io.Combo.Input("dtype", options=["float16", "bfloat16", "float32"]),
                AESTHETICS.Input("aesthetics", optional=True),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        vmix: VMix,
        filename_prefix: str,
        apply_to: str,
        dtype: str,
        aesthetics: Selection | None = None,
    ) -> io.NodeOutput:
        path = free_path(filename_prefix, folder_paths.get_output_directory())
        vmix.save_preset(path, aesthetics, apply_to, dtype)
        return io.NodeOutput(ui={"text": [f"saved {path}"]})


class VMixCompare(io.ComfyNode):  # type: ignore[misc]
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VMixCompare",
            display_name="VMix Compare",
            category=CATEGORY,
            description="Samples the same seed with several strengths, or with each label alone, "
            "and puts the pictures side by side.",
            inputs=[
                io.Model.Input("model"),
                VMIX.Input("vmix"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent_image"),
                io.Vae.Input("vae"),
                io.Combo.Input(
                    "compare",
                    options=["strengths", "labels"],
                    tooltip="One picture for each strength, or for each label.",
                ),
                io.String.Input(
                    "strengths",
                    default="0, 0.5, 1, 1.5",
                    tooltip="The strengths to compare, when strengths are compared.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="The strength of every picture, when labels are compared.",
                ),
                apply_to_input(),
                io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=True),
                io.Int.Input("steps", default=20, min=1, max=10000),
                io.Float.Input("cfg", default=7.0, min=0.0, max=100.0, step=0.1, round=0.01),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS),
                io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01),
                AESTHETICS.Input(
                    "aesthetics",
                    optional=True,
                    tooltip="The selection whose strengths are compared.",
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        vmix: VMix,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        vae: Any,
        compare: str,
        strengths: str,
        strength: float,
        apply_to: str,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        aesthetics: Selection | None = None,
    ) -> io.NodeOutput:
        cells: list[tuple[str, Selection | None, float]]
        if compare == "strengths":
            cells = [(f"λ = {s:g}", aesthetics, s) for s in parse_strengths(strengths)]
        else:
            cells = label_cells(vmix, strength)
        # All of them first: a wrong base or label is told before anything is sampled.
        models = [applied(model, vmix, chosen, s, apply_to=apply_to) for _, chosen, s in cells]
        latent = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        noise = comfy.sample.prepare_noise(latent, seed, latent_image.get("batch_index"))
        previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        progress = comfy.utils.ProgressBar(len(cells) * steps)
        columns = []
        for cell, mixed in enumerate(models):

            def show(step: int, x0: Any, x: Any, total: int, cell: int = cell) -> None:
                preview = previewer and previewer.decode_latent_to_preview_image("JPEG", x0)
                progress.update_absolute(
                    cell * steps + round((step + 1) * steps / total), len(cells) * steps, preview
                )

            samples = comfy.sample.sample(
                mixed,
                noise,
                steps,
                cfg,
                sampler_name,
                scheduler,
                positive,
                negative,
                latent,
                denoise=denoise,
                noise_mask=latent_image.get("noise_mask"),
                callback=show,
                disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
                seed=seed,
            )
            columns.append(vae.decode(samples))
        return io.NodeOutput(draw_row([caption for caption, *_ in cells], columns))


class VMixDemoModel(io.ComfyNode):  # type: ignore[misc]
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="VMixDemoModel",
            display_name="VMix Demo Model",
            category=CATEGORY,
            description="A very small model, trained on emoji drawings, with the only public VMix "
            "adapter there is. It comes with the pack and runs on a CPU in seconds, at 64x64 "
            "pixels; it shows what the nodes do and no more.",
            inputs=[],
            outputs=[
                io.Model.Output(),
                io.Clip.Output(),
                io.Vae.Output(),
                VMIX.Output(display_name="vmix"),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*demo_model.load())


def free_path(filename_prefix: str, root: str) -> str:
    """A new file's path below a folder, numbered as ComfyUI numbers what it saves."""
    root = os.path.abspath(root)
    prefix = os.path.normpath(filename_prefix.strip())
    # Not every ComfyUI refuses this itself.
    if os.path.relpath(os.path.join(root, prefix), root).split(os.sep)[0] in (os.pardir, os.curdir):
        raise ValueError(
            f"filename_prefix: expected a name below {root}, found {filename_prefix!r}"
        )
    folder, name, counter, *_ = folder_paths.get_save_image_path(prefix, root)
    # It counts from 1 where capital letters are the only difference, which to some disks is none.
    while os.path.lexists(path := os.path.join(folder, f"{name}_{counter:05}_.safetensors")):
        counter += 1
    return path


def apply_to_input() -> Any:
    return io.Combo.Input(
        "apply_to",
        options=["file", *APPLY_TO],
        tooltip="Which passes of classifier-free guidance are mixed: as the file says; the "
        "conditional one; both alike; or contrast, the opposite selection in the unconditional.",
    )


def applied(
    model: Any,
    vmix: VMix,
    chosen: Selection | None,
    strength: float,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    apply_to: str = "file",
    blocks: str = "",
    mask: torch.Tensor | None = None,
) -> Any:
    """A clone of the model that mixes V_a in. Everything that can be wrong is said here."""
    paths = checked_layers(model, vmix)
    policy = vmix.policy(apply_to)
    weights = vmix.weights(chosen)
    if not start_percent < end_percent:
        raise ValueError(
            f"start_percent and end_percent: expected start before end, "
            f"found {start_percent} and {end_percent}"
        )
    factors = block_strengths(blocks, dict.fromkeys(map(block_of, paths.values())))
    clone = model.clone()
    strengths = {name: strength * factors[block_of(path)] for name, path in paths.items()}
    if not any(strengths.values()):
        return clone
    values = vmix.values(weights, policy)
    dtype, selection = compute_dtype(model), vmix.furthest(weights)
    mix = ValueMix(
        [
            Layer(path, strengths[name], values[name], dtype, selection)
            for name, path in paths.items()
        ],
        vmix.context_tokens,
        policy,
        start_percent,
        end_percent,
        mask=None if mask is None else mask.reshape(-1, *mask.shape[-2:]),
        attention=comfy.ldm.modules.attention.optimized_attention,
    )
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, mix)
    return clone


def checked_layers(model: Any, vmix: VMix) -> dict[str, str]:
    """Diffusers path → LDM path of all layers of the file, which must be those of the model."""
    config = model.model.model_config
    paths = layer_paths(comfy.utils.unet_to_diffusers(config.unet_config))
    found = {}
    for name, path in paths.items():
        to_v = model.get_model_object(f"diffusion_model.{path}.to_v")
        # Another pack's module in its place need not tell its width.
        found[name] = getattr(to_v, "out_features", vmix.layers.get(name))
    context = config.unet_config.get("context_dim") if found else None
    if found == vmix.layers and vmix.context_dim in (None, context):
        return paths
    kind = type(config).__name__
    theirs = f"{len(found)} layers, context {context}" if found else "no such layers"
    ours = f"{len(vmix.layers)} cross-attention layers"
    if vmix.context_dim is not None:
        ours += f", context {vmix.context_dim}"
    first = ""
    for layer in sorted({*found, *vmix.layers}) if found else ():
        if found.get(layer) != vmix.layers.get(layer):
            first = (
                f"; {layer}: expected width {vmix.layers.get(layer, '(no such layer)')}, "
                f"found {found.get(layer, '(no such layer)')}"
            )
            break
    raise ValueError(
        f"{vmix.name} is for {BASES.get(vmix.base, vmix.base)} ({ours}), "
        f"but the model is {kind} ({theirs}){first}"
    )


def compute_dtype(model: Any) -> torch.dtype:
    """What the model's layers compute in, so that V_a takes no more memory than it must."""
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    return dtype if dtype in DTYPES.values() else torch.float32


def label_cells(vmix: VMix, strength: float) -> list[tuple[str, Selection | None, float]]:
    """Captions, selections and strengths: without, all labels, every label alone, none."""
    if vmix.kind == "preset":
        raise ValueError(
            f"{vmix.name} is a preset: it holds one selection, and its labels cannot be compared; "
            "compare strengths, or load the adapter that it was made from"
        )
    names = [label.name for label in vmix.labels]
    return [
        ("without VMix", None, 0.0),
        ("all labels", vmix.alone(*names), strength),
        *((f"only {name}", vmix.alone(name), strength) for name in names),
        ("no label", vmix.alone(), strength),
    ]


def labels_of(vmix: VMix) -> dict[str, Any]:
    """What the sliders are drawn from."""
    return {
        "name": vmix.name,
        "kind": vmix.kind,
        "labels": [
            {
                "name": label.name,
                "dimension": label.dimension,
                "weight": vmix.selection[label.name],  # unless another is chosen
                "neutral": label.neutral,
                "low": label.low,
                "high": label.high,
                "step": label.step,
                "display_names": dict(label.display_names),
            }
            for label in vmix.labels
        ],
    }


def register_folders() -> None:
    """models/vmix, and output/vmix where presets are saved, beside what the user configured."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))
    folder_paths.add_model_folder_path(
        FOLDER, os.path.join(folder_paths.get_output_directory(), FOLDER)
    )
    # A new key comes with no extensions at all, which would list every file.
    folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")


def register_routes() -> None:
    """GET /vmix/labels?vmix_name=… (or ?demo=1), for the sliders."""
    from aiohttp import web
    from server import PromptServer

    async def labels(request: web.Request) -> web.Response:
        try:
            if "demo" in request.query:
                vmix = open_file(demo_model.ADAPTER, demo_model.NAME)
            else:
                name = request.query.get("vmix_name", "")
                # Only names that the loader lists, so that no path leads out of the folder.
                if name not in folder_paths.get_filename_list(FOLDER):
                    raise FileNotFoundError(f"no file {name!r} in models/vmix")
                vmix = open_file(folder_paths.get_full_path_or_raise(FOLDER, name), name)
        except (OSError, RuntimeError, ValueError) as error:
            return web.json_response({"error": str(error)}, status=404)
        return web.json_response(labels_of(vmix))

    if getattr(PromptServer, "instance", None) is not None:
        PromptServer.instance.routes.get("/vmix/labels")(labels)


class VMixExtension(ComfyExtension):  # type: ignore[misc]
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        # Not in on_load, which ComfyUI up to 0.3.64 at least never calls.
        register_folders()
        register_routes()
        return [
            VMixLoader,
            VMixAesthetics,
            VMixApply,
            VMixSavePreset,
            VMixCompare,
            VMixDemoModel,
        ]
