//! The text encoder and what is made with it, on the demo's base: candle-transformers and candle are
//! the oracles.

use candle_core::{DType as CandleDType, Device, Result, Tensor, safetensors::load};
use candle_nn::{LayerNorm, Module, VarBuilder};
use candle_transformers::models::clip::text_model::{
    Activation, ClipTextConfig, ClipTextTransformer,
};
use vmix::{Checkpoint, Labels, Opened, TextEncoder, init_adapter};

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

/// AesEmb holds the features of the labels' texts; of several phrasings their mean.
#[test]
fn init_files_hold_the_features_of_the_labels() -> Result<()> {
    let base = Checkpoint::open(BASE).unwrap();
    let labels = Labels::from_toml(
        "[[label]]\nname = 'red'\npositive = ['bright red', 'a red apple']\nnegative = ''\n\
         [[label]]\nname = 'blue'\nnegative = 'grey'",
    )
    .unwrap();
    let untrained = init_adapter(&base, &labels, |_, _| ()).unwrap();
    assert_eq!(untrained.labels(), &labels);
    assert_eq!(
        (untrained.context_tokens(), untrained.context_dim()),
        (32, 96)
    );
    let found = tensor(untrained.aes_emb())?;
    assert_eq!(found.dims(), [2, 2, 96]);
    let encoder = base.text_encoder().unwrap();
    let texts = ["bright red", "a red apple", "", "blue", "grey"];
    let features = tensor(&encoder.features(&texts, |_, _| ()).unwrap())?;
    let mean = ((features.get(0)? + features.get(1)?)? / 2.0)?;
    assert_close(&found.get(0)?.get(0)?, &mean);
    for ([label, side], row) in [[0, 1], [1, 0], [1, 1]].into_iter().zip(2..) {
        assert_close(&found.get(label)?.get(side)?, &features.get(row)?);
    }

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("init.safetensors");
    untrained.save(&path).unwrap();
    assert!(std::fs::metadata(&path).unwrap().len() < 5000);
    let Opened::Untrained(opened) = vmix::open(&path).unwrap() else {
        panic!("not an init file");
    };
    assert_eq!(opened.metadata(), untrained.metadata());
    assert_eq!(opened.aes_emb(), untrained.aes_emb());
    let error = vmix::Adapter::open(&path).unwrap_err().to_string();
    assert!(
        error.ends_with("`vmix.kind`: expected `adapter`, found `init`"),
        "{error}"
    );
    Ok(())
}
