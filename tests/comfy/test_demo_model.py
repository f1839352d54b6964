"""The demo model in ComfyUI's classes against the diffusers pipeline that it is.

Both compute in fp32 from the same fp16 files; the tolerances are what another order of the same
sums gives, relative in the Euclidean norm.
"""

from __future__ import annotations

from typing import Any

import host
import pytest
import torch

pytestmark = pytest.mark.usefixtures("comfyui")
TOLERANCE = 1e-5

if not host.missing:
    diffusers = pytest.importorskip("diffusers")
    import comfy.sample
    import comfy.utils
    from bases import difference
    from safetensors.torch import load_file
    from two_branches import two_branches

    from comfy_nodes import demo_model, nodes
    from comfy_nodes.files import open_file
    from comfy_nodes.mixing import layer_paths


@pytest.fixture(scope="module")
def pipe(comfyui: None) -> Any:
    return diffusers.StableDiffusionPipeline.from_pretrained(
        demo_model.MODEL, safety_checker=None, torch_dtype=torch.float32
    )


@pytest.fixture(scope="module")
def demo(comfyui: None) -> Any:
    return demo_model.load()


def test_text(pipe: Any, demo: Any) -> None:
    clip = demo[1]
    for prompt in ("a red apple", "", "a pink donut, green leaves"):
        ids = pipe.tokenizer(prompt, padding="max_length", max_length=32, return_tensors="pt")
        tokens = clip.tokenize(prompt)
        assert [token for token, _ in tokens["l"][0]] == ids.input_ids[0].tolist()
        found = clip.encode_from_tokens(tokens)
        expected = pipe.text_encoder(ids.input_ids).last_hidden_state
        assert difference(found, expected) <= TOLERANCE


def test_unet(pipe: Any, demo: Any) -> None:
    model = demo[0].model.float()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 8, 8, generator=draw)
    context = torch.randn(2, 32, 96, generator=draw)
    for t in (999, 500, 1):
        found = model.diffusion_model(x, torch.tensor([t, t]), context=context)
        expected = pipe.unet(x, t, encoder_hidden_states=context).sample
        assert difference(found, expected) <= TOLERANCE


def test_vae(pipe: Any, demo: Any) -> None:
    vae = demo[2]
    latent = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))
    found = vae.decode(latent)
    expected = pipe.vae.decode(latent).sample
    expected = (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert difference(found, expected) <= TOLERANCE
    found = vae.encode(found)
    expected = pipe.vae.encode(expected.permute(0, 3, 1, 2) * 2 - 1).latent_dist
    # ComfyUI draws from the distribution or takes its mean, by version: look at both.
    assert difference(found, expected.mean) <= 0.2
    format_ = demo[0].model.latent_format
    assert torch.allclose(format_.process_in(latent), latent * pipe.vae.config.scaling_factor)


def test_picture(pipe: Any, demo: Any) -> None:
    """25 steps from one noise, with ComfyUI's sampler and with diffusers' scheduler."""
    model, clip, vae, _ = demo
    positive, negative = (
        clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("a red apple", "")
    )
    latent = torch.zeros(1, 4, 8, 8)
    latent = comfy.sample.fix_empty_latent_channels(model, latent)
    assert latent.shape == (1, 16, 8, 8)
    noise = comfy.sample.prepare_noise(latent, 3)
    samples = comfy.sample.sample(
        model, noise, 25, 3.0, "ddim", "sgm_uniform", positive, negative, latent,
        disable_pbar=True, seed=3,
    )  # fmt: skip
    found = vae.decode(samples)
    expected = torch.from_numpy(
        pipe(
            "a red apple", num_inference_steps=25, guidance_scale=3.0, latents=noise,
            output_type="np",
        ).images
    )  # fmt: skip
    # The schedules differ a little at the first step, where the signal is zero: the same picture,
    # not the same numbers.
    assert (found - expected).abs().mean() <= 0.02


def test_adapter(demo: Any) -> None:
    """What the adapter mixes is what the paper's matrices say that it was made from."""
    model, clip, _, vmix = demo
    file = host.ROOT / "tests" / "data" / "demo_matrices.safetensors"
    matrices = {name: tensor.float() for name, tensor in load_file(file).items()}
    weights = {"vibrant color": 1.0, "natural lighting": 0.25, "sharp focus": 1.75}
    weights = {**weights, "balanced composition": 0.0}
    assert list(weights) == [label.name for label in vmix.labels]
    assert {label.neutral for label in vmix.labels} == {None}  # so that the opposites are 0
    paths = layer_paths(comfy.utils.unet_to_diffusers(demo_model.UNET_CONFIG))
    ours = nodes.applied(model, vmix, weights, 1.0, apply_to="contrast")
    literal = two_branches(
        model, matrices, paths, list(weights.values()), [0.0] * 4, apply_to="contrast"
    )
    prompts = [clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in ("a red apple", "")]
    latent = torch.zeros(1, 16, 8, 8)
    noise = comfy.sample.prepare_noise(latent, 3)

    def sample(mixed: Any) -> torch.Tensor:
        return comfy.sample.sample(
            mixed, noise, 3, 3.0, "ddim", "sgm_uniform", *prompts, latent,
            disable_pbar=True, seed=3,
        )  # fmt: skip

    expected = sample(literal)
    assert difference(expected, sample(model)) > 1e-2
    assert difference(sample(ours), expected) <= 2e-5


def test_layers_have_the_names_of_the_file() -> None:
    """ComfyUI's own map of names agrees with the one that the adapter's file carries."""
    native = open_file(demo_model.ADAPTER).opened
    found = layer_paths(comfy.utils.unet_to_diffusers(demo_model.UNET_CONFIG))
    assert found == {layer.name: layer.ldm_name for layer in native.layers}
