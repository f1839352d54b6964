//! How text models name their tensors: as transformers does, or as OpenCLIP does.

use super::Activation;

/// The names of a text model's tensors.
#[derive(Debug, Clone)]
pub(crate) enum Names {
    /// Of transformers, after a prefix that newer versions leave out.
    Transformers { prefix: &'static str },
    /// Of OpenCLIP, in the single files of SDXL.
    OpenClip,
}

impl Names {
    pub fn token_embedding(&self) -> String {
        match self {
            Self::Transformers { prefix } => format!("{prefix}embeddings.token_embedding.weight"),
            Self::OpenClip => "token_embedding.weight".to_owned(),
        }
    }

    pub fn position_embedding(&self) -> String {
        match self {
            Self::Transformers { prefix } => {
                format!("{prefix}embeddings.position_embedding.weight")
            }
            Self::OpenClip => "positional_embedding".to_owned(),
        }
    }

    fn block(&self, layer: usize, transformers: &str, open_clip: &str) -> String {
        match self {
            Self::Transformers { prefix } => {
                format!("{prefix}encoder.layers.{layer}.{transformers}")
            }
            Self::OpenClip => format!("transformer.resblocks.{layer}.{open_clip}"),
        }
    }

    pub fn norm1(&self, layer: usize) -> String {
        self.block(layer, "layer_norm1", "ln_1")
    }

    pub fn norm2(&self, layer: usize) -> String {
        self.block(layer, "layer_norm2", "ln_2")
    }

    /// One of the query, key and value projections, numbered so; `None` where they are one tensor.
    pub fn projection(&self, layer: usize, which: usize) -> Option<String> {
        let name = ["q_proj", "k_proj", "v_proj"][which];
        matches!(self, Self::Transformers { .. })
            .then(|| self.block(layer, &format!("self_attn.{name}"), ""))
    }

    /// The three projections in one tensor, without `weight` or `bias`.
    pub fn in_projection(&self, layer: usize) -> String {
        self.block(layer, "", "attn.in_proj_")
    }

    pub fn out_projection(&self, layer: usize) -> String {
        self.block(layer, "self_attn.out_proj", "attn.out_proj")
    }

    pub fn fc1(&self, layer: usize) -> String {
        self.block(layer, "mlp.fc1", "mlp.c_fc")
    }

    pub fn fc2(&self, layer: usize) -> String {
        self.block(layer, "mlp.fc2", "mlp.c_proj")
    }

    pub fn final_norm(&self) -> String {
        match self {
            Self::Transformers { prefix } => format!("{prefix}final_layer_norm"),
            Self::OpenClip => "ln_final".to_owned(),
        }
    }

    /// The projection of the pooled feature: \[p, d\] in transformers, \[d, p\] in OpenCLIP.
    pub fn text_projection(&self) -> &'static str {
        match self {
            Self::Transformers { .. } => "text_projection.weight",
            Self::OpenClip => "text_projection",
        }
    }

    /// Of the models that have these names in single-file checkpoints.
    pub fn activation(&self) -> Activation {
        match self {
            Self::Transformers { .. } => Activation::QuickGelu,
            Self::OpenClip => Activation::Gelu,
        }
    }
}
