//! The text encoder and what is made with it, on the demo's base: candle-transformers and candle are
//! the oracles.

use candle_core::{DType as CandleDType, Device, Result, Tensor, safetensors::load};
use candle_nn::{LayerNorm, Module, VarBuilder};
use candle_transformers::models::clip::text_model::{
    Activation, ClipTextConfig, ClipTextTransformer,
};
use vmix::{
    ApplyTo, Checkpoint, DType, Data, InitOptions, Labels, Selection, Start, TextEncoder,
    init_adapter, training_free_adapter,
};

const BASE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/comfy_nodes/demo/model");
const TEXTS: [&str; 3] = [
    "a red apple",
    "",
    "a small dog on a bench, natural lighting",
];

fn weights() -> Result<VarBuilder<'static>> {
    let tensors = load(
        format!("{BASE}/text_encoder/model.safetensors"),
        &Device::Cpu,
    )?;
    // transformers writes the names with or without the model's own.
    let named = tensors.into_iter().map(|(name, tensor)| {
        let name = name.strip_prefix("text_model.").unwrap_or(&name).to_owned();
        Ok((name, tensor.to_dtype(CandleDType::F32)?))
    });
    let named = named.collect::<Result<_>>()?;
    Ok(VarBuilder::from_tensors(
        named,
        CandleDType::F32,
        &Device::Cpu,
    ))
}

/// The model of candle-transformers with so many of its two blocks.
fn theirs(blocks: usize) -> Result<ClipTextTransformer> {
    let config = ClipTextConfig {
        vocab_size: 1457,
        embed_dim: 96,
        activation: Activation::QuickGelu,
        intermediate_size: 384,
        max_position_embeddings: 32,
        pad_with: None,
        num_hidden_layers: blocks,
        num_attention_heads: 4,
        projection_dim: 96,
    };
    ClipTextTransformer::new(weights()?, &config)
}

fn tensor(ours: &vmix::Tensor) -> Result<Tensor> {
    Tensor::from_vec(ours.to_f32(), ours.shape(), &Device::Cpu)
}

/// Sums of some hundred numbers of magnitude 1 to 10 in another order, over two blocks.
fn assert_close(ours: &Tensor, theirs: &Tensor) {
    let worst = (ours - theirs)
        .and_then(|d| d.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>())
        .unwrap();
    assert!(worst < 2e-5, "{worst}");
}

#[test]
fn hidden_states_are_those_of_candle_transformers() -> Result<()> {
    let encoder = TextEncoder::open(BASE).unwrap();
    let (model, tokenizer) = (
        encoder.models().next().unwrap(),
        encoder.tokenizers().next().unwrap(),
    );
    let mut ids: Vec<Vec<u32>> = TEXTS.map(|text| tokenizer.encode(text).unwrap()).into();
    let ends: Vec<usize> = ids.iter().map(|ids| ids.len() - 1).collect();
    let longest = ids.iter().map(Vec::len).max().unwrap();
    for ids in &mut ids {
        ids.resize(longest, tokenizer.end());
    }
    let ours = model.encode(&ids).unwrap();

    let ids = Tensor::new(ids, &Device::Cpu)?;
    let last = theirs(2)?.forward_with_mask(&ids, usize::MAX)?;
    assert_close(&tensor(&ours.last)?, &last);

    // Theirs applies the final LayerNorm whatever the number of blocks.
    let weights = weights()?.pp("final_layer_norm");
    let norm = LayerNorm::new(weights.get(96, "weight")?, weights.get(96, "bias")?, 1e-5);
    let penultimate = theirs(1)?.forward_with_mask(&ids, usize::MAX)?;
    assert_close(&norm.forward(&tensor(&ours.penultimate)?)?, &penultimate);

    for (row, end) in ends.into_iter().enumerate() {
        let feature = last.get(row)?.get(end)?;
        assert_close(&tensor(&ours.pooled)?.get(row)?, &feature);
        let features = encoder.features(&TEXTS, |_, _| ()).unwrap();
        assert_close(&tensor(&features)?.get(row)?, &feature);
    }
    Ok(())
}

#[test]
fn values_on_a_base_are_the_difference_through_its_own_value_weights() -> Result<()> {
    let base = Checkpoint::open(BASE).unwrap();
    let labels = Labels::from_entries(["red: bright red", "blue"], Start::TrainingFree).unwrap();
    let options = InitOptions {
        start: Start::TrainingFree,
        ..InitOptions::default()
    };
    let adapter = init_adapter(&base, &labels, &options, |_, _| ()).unwrap();
    let selection = Selection::Weights(vec![("red".into(), 0.5)]);
    let values = adapter
        .values_on(&base, &selection, ApplyTo::Cond, DType::F32)
        .unwrap();

    let features = base.text_encoder().unwrap();
    let features = features.features(&["bright red", ""], |_, _| ()).unwrap();
    let features = tensor(&features)?;
    let f_a = ((features.get(0)? - features.get(1)?)? * (0.25 * 0.5))?;
    let unet = load(
        format!("{BASE}/unet/diffusion_pytorch_model.safetensors"),
        &Device::Cpu,
    )?;
    assert_eq!(values.layers().len(), 7);
    for layer in values.layers().iter() {
        let own = unet[&format!("{}.to_v.weight", layer.name)].to_dtype(CandleDType::F32)?;
        let expected = f_a.unsqueeze(0)?.matmul(&own.t()?)?;
        let v_a = tensor(values.get(&layer.name).unwrap())?;
        assert_close(&v_a, &expected.broadcast_as(v_a.shape())?);
    }
    Ok(())
}

#[test]
fn a_base_of_other_layers_is_refused() {
    let base = Checkpoint::open(BASE).unwrap();
    let labels = Labels::from_entries(["red"], Start::TrainingFree).unwrap();
    let features = vmix::Tensor::new([1, 2, 768], Data::F32(vec![0.0; 2 * 768]));
    let sd15 = training_free_adapter(&labels, &features, 77, Vec::new()).unwrap();
    let own = crate::parts::small().adapter().unwrap();
    for (adapter, complaint) in [
        (
            sd15,
            "expected sd15 (16 layers, context 768), as this adapter was made for, found other (7",
        ),
        (
            own,
            "expected none, as this adapter has value weights of its own",
        ),
    ] {
        let refused = adapter.values_on(&base, &Selection::All, ApplyTo::Cond, DType::F32);
        let message = refused.unwrap_err().to_string();
        assert!(message.contains(complaint), "{message}");
    }
}
