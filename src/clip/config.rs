//! The sizes of a CLIP text model.

use std::path::Path;

use serde::Deserialize;

use crate::{
    Error, Result,
    component::{Component, read},
};

/// What stands between the two layers of a block's MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// x·sigmoid(1.702·x), of OpenAI's CLIP.
    QuickGelu,
    /// The exact x·Φ(x), of OpenCLIP.
    Gelu,
}

/// The sizes of a CLIP text model; the keys are those of transformers' `CLIPTextConfig`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ClipConfig {
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width d of the hidden states.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Transformer blocks.
    pub num_hidden_layers: usize,
    /// Heads of the self-attention, which divide the width.
    pub num_attention_heads: usize,
    /// Positions, and so tokens a text may have.
    #[serde(rename = "max_position_embeddings")]
    pub max_positions: usize,
    /// The activation of the MLP.
    #[serde(rename = "hidden_act")]
    pub activation: Activation,
    /// The epsilon of every LayerNorm.
    #[serde(default = "eps")]
    pub layer_norm_eps: f64,
}

fn eps() -> f64 {
    1e-5
}

impl ClipConfig {
    /// OpenAI's CLIP ViT-L/14: the text model of SD1.5, and the first one of SDXL.
    pub const CLIP_L: Self = Self {
        vocab_size: 49_408,
        hidden_size: 768,
        intermediate_size: 3072,
        num_hidden_layers: 12,
        num_attention_heads: 12,
        max_positions: 77,
        activation: Activation::QuickGelu,
        layer_norm_eps: 1e-5,
    };

    /// OpenCLIP ViT-bigG/14: the second text model of SDXL.
    pub const BIG_G: Self = Self {
        vocab_size: 49_408,
        hidden_size: 1280,
        intermediate_size: 5120,
        num_hidden_layers: 32,
        num_attention_heads: 20,
        max_positions: 77,
        activation: Activation::Gelu,
        layer_norm_eps: 1e-5,
    };

    /// Reads the `config.json` of a model folder.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let refused = |found: String| {
            let expected = "the configuration of a CLIP text model";
            Error::argument(path.display().to_string(), expected, found)
        };
        let config: Self =
            serde_json::from_slice(&read(path)?).map_err(|e| refused(e.to_string()))?;
        let heads = config.num_attention_heads;
        if heads == 0 || config.hidden_size == 0 || !config.hidden_size.is_multiple_of(heads) {
            return Err(refused(format!(
                "{heads} heads for a width of {}",
                config.hidden_size
            )));
        }
        if config.num_hidden_layers == 0 {
            return Err(refused("no layers".to_owned()));
        }
        if config.layer_norm_eps <= 0.0 {
            return Err(refused(format!(
                "layer_norm_eps {}, not above 0",
                config.layer_norm_eps
            )));
        }
        Ok(config)
    }

    /// The sizes of a text model in a single-file checkpoint, which has no configuration: all are
    /// read off its tensors, but for heads of width 64, which all of these models have.
    pub(crate) fn infer(weights: &Component, names: &super::Names) -> Result<Self> {
        let shape = |name: String| -> Result<[usize; 2]> {
            let shape = weights.tensor(&name)?.shape;
            shape
                .try_into()
                .map_err(|_| weights.error(&name, "two dimensions", format!("shape {shape:?}")))
        };
        const HEAD: usize = 64;
        let [vocab_size, hidden_size] = shape(names.token_embedding())?;
        let [max_positions, _] = shape(names.position_embedding())?;
        let [intermediate_size, _] = shape(format!("{}.weight", names.fc1(0)))?;
        let layers = (0..).take_while(|&i| weights.has_tensor(&format!("{}.weight", names.fc1(i))));
        if !hidden_size.is_multiple_of(HEAD) || hidden_size == 0 {
            return Err(weights.error(
                &names.token_embedding(),
                format!("a width in multiples of {HEAD}, the width of a head"),
                hidden_size.to_string(),
            ));
        }
        Ok(Self {
            vocab_size,
            hidden_size,
            intermediate_size,
            num_hidden_layers: layers.count(),
            num_attention_heads: hidden_size / HEAD,
            max_positions,
            activation: names.activation(),
            layer_norm_eps: eps(),
        })
    }
}
