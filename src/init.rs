//! New adapters: AesEmb from a base's own text encoders (paper, section 3.2, "only once").

use std::collections::BTreeMap;

use crate::{
    Adapter, ApplyTo, Base, Checkpoint, DType, Error, Kind, Label, Labels, Layer, Layers, Result,
    Tensor, metadata::Common,
};

/// What a new adapter is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Start {
    /// To be trained: it changes nothing yet.
    #[default]
    Training,
    /// To be used as it is, on the direction from each label's negative to its positive through the
    /// base's own W_V. **Experimental**, and not the trained adapter of the paper.
    TrainingFree,
}

/// What [`init_adapter`] is to make.
#[derive(Debug, Clone, Default)]
pub struct InitOptions {
    /// Whether the adapter is to be trained.
    pub start: Start,
    /// Element type of W_Va; the base's own unless given.
    pub dtype: Option<DType>,
    /// Seeds the initial weights of F, which are drawn as torch draws those of a linear layer.
    pub seed: u64,
}

/// Makes an adapter for a base model: AesEmb filled with the features of the labels' texts, F drawn at
/// random, Z zero and every W_Va a copy of the base's W_V. `progress` is told how many of how many
/// steps are done.
pub fn init_adapter(
    base: &Checkpoint,
    labels: &Labels,
    options: &InitOptions,
    progress: impl FnMut(usize, usize),
) -> Result<Adapter> {
    let encoder = base.text_encoder()?;
    let texts: Vec<&str> = labels
        .iter()
        .flat_map(|label| [label.positive.as_str(), label.negative.as_str()])
        .collect();
    let features = encoder.features(&texts, progress)?.to_f32();
    let parts = Parts {
        base: base.base(),
        layers: base.layers(),
        context_tokens: encoder.context_tokens(),
        context_dim: encoder.context_dim(),
        labels,
    };
    if options.start == Start::TrainingFree {
        return parts.training_free(features);
    }
    let (n, c, d) = (labels.len(), parts.context_tokens, parts.context_dim);
    let mut tensors = BTreeMap::from([
        ("aes_emb".to_owned(), parts.aes_emb(features)),
        (
            "projection.linear.weight".to_owned(),
            f32_tensor([c, n], linear_weights(c, n, options.seed)),
        ),
        (
            "projection.norm.weight".to_owned(),
            f32_tensor([d], vec![1.0; d]),
        ),
        (
            "projection.norm.bias".to_owned(),
            f32_tensor([d], vec![0.0; d]),
        ),
        (
            "projection.zero.weight".to_owned(),
            f32_tensor([d, d], vec![0.0; d * d]),
        ),
        (
            "projection.zero.bias".to_owned(),
            f32_tensor([d], vec![0.0; d]),
        ),
    ]);
    for layer in base.layers().iter() {
        let own = base.value_weight(layer)?.to_tensor();
        if !own.is_finite() {
            return Err(base.value_weight_error(layer, "NaN or infinity"));
        }
        let tensor = match options.dtype {
            Some(dtype) if dtype != own.dtype() => {
                let rounded = Tensor::rounded(own.shape(), own.to_f32(), dtype);
                if !rounded.is_finite() {
                    return Err(base.value_weight_error(layer, format!("values beyond {dtype}")));
                }
                rounded
            }
            _ => own,
        };
        tensors.insert(format!("{}.to_v_aes.weight", layer.name), tensor);
    }
    let mut metadata = parts.metadata(labels);
    for (key, value) in [
        ("vmix.projection", "learned"),
        ("vmix.norm_eps", "1e-5"),
        ("vmix.value_weights", "own"),
        ("modelspec.title", "An untrained VMix adapter"),
    ] {
        metadata.insert(key.to_owned(), value.to_owned());
    }
    Adapter::from_tensors(&tensors, &metadata)
}

/// Makes a training-free adapter from features \[N, 2, d\] that a host's own text encoder gave, as
/// ComfyUI's: those of every label's positive and negative at the first end-of-text position of the
/// context. `layers` are those of its U-Net; none are needed for SD1.5 and SDXL, which are known by d.
pub fn training_free_adapter(
    labels: &Labels,
    features: &Tensor,
    context_tokens: usize,
    layers: Vec<Layer>,
) -> Result<Adapter> {
    let &[n, 2, d] = features.shape() else {
        return Err(Error::argument(
            "features",
            format!("shape [{}, 2, d]", labels.len()),
            format!("shape {:?}", features.shape()),
        ));
    };
    if n != labels.len() || d == 0 {
        return Err(Error::argument(
            "features",
            format!("shape [{}, 2, d]", labels.len()),
            format!("shape [{n}, 2, {d}]"),
        ));
    }
    let known = [Base::Sd15, Base::Sdxl]
        .into_iter()
        .find(|base| base.context_dim() == Some(d));
    let (base, layers) = if layers.is_empty() {
        let base = known.ok_or_else(|| Error::Argument {
            argument: "layers".to_owned(),
            expected: format!("those of the U-Net, for a context of width {d}"),
            found: "none (SD1.5 has width 768, SDXL 2048)".to_owned(),
        })?;
        (base, base.layers().expect("a known base"))
    } else {
        let layers = Layers::sorted(layers)
            .map_err(|found| Error::argument("layers", "a name of its own per layer", found))?;
        let is_known = |base: &Base| base.layers().is_some_and(|known| *known == *layers);
        (known.filter(is_known).unwrap_or(Base::Other), layers)
    };
    let parts = Parts {
        base,
        layers: &layers,
        context_tokens,
        context_dim: d,
        labels,
    };
    parts.training_free(features.to_f32())
}

/// What every new adapter is made from.
struct Parts<'a> {
    base: Base,
    layers: &'a Layers,
    context_tokens: usize,
    context_dim: usize,
    labels: &'a Labels,
}

impl Parts<'_> {
    fn training_free(&self, features: Vec<f32>) -> Result<Adapter> {
        let labels: Vec<Label> = self
            .labels
            .iter()
            .map(|label| Label {
                neutral: Some(0.0),
                ..label.clone()
            })
            .collect();
        let gains = vec![GAIN; labels.len()];
        let tensors = BTreeMap::from([
            (
                "projection.gain".to_owned(),
                f32_tensor([gains.len()], gains),
            ),
            ("aes_emb".to_owned(), self.aes_emb(features)),
        ]);
        let labels = Labels::checked(labels).expect("they were a list before");
        let mut metadata = self.metadata(&labels);
        for (key, value) in [
            ("vmix.projection", "difference"),
            ("vmix.value_weights", "base"),
            (
                "modelspec.title",
                "A training-free VMix adapter (experimental)",
            ),
        ] {
            metadata.insert(key.to_owned(), value.to_owned());
        }
        if self.base == Base::Other {
            let widths = self
                .layers
                .iter()
                .map(|layer| (&layer.name, layer.inner_dim));
            metadata.insert(
                "vmix.inner_dims".to_owned(),
                json(&widths.collect::<BTreeMap<_, _>>()),
            );
        }
        Adapter::from_tensors(&tensors, &metadata)
    }

    fn aes_emb(&self, features: Vec<f32>) -> Tensor {
        f32_tensor([self.labels.len(), 2, self.context_dim], features)
    }

    fn metadata(&self, labels: &Labels) -> BTreeMap<String, String> {
        let common = Common {
            base: self.base,
            labels: labels.clone(),
            context_tokens: self.context_tokens,
            apply_to: ApplyTo::Cond,
        };
        let mut metadata = common.write(Kind::Adapter);
        let architecture = match self.base {
            Base::Sd15 => "stable-diffusion-v1/vmix",
            Base::Sdxl => "stable-diffusion-xl-v1-base/vmix",
            Base::Other => "unet/vmix",
        };
        for (key, value) in [
            ("vmix.context_dim", self.context_dim.to_string().as_str()),
            ("vmix.feature", "context_eot"),
            ("vmix.trained", "no"),
            ("modelspec.sai_model_spec", "1.0.0"),
            ("modelspec.architecture", architecture),
            ("modelspec.implementation", "diffusers"),
        ] {
            metadata.insert(key.to_owned(), value.to_owned());
        }
        if self.base == Base::Other {
            let names = self
                .layers
                .iter()
                .map(|layer| (&layer.name, &layer.ldm_name));
            metadata.insert(
                "vmix.ldm_names".to_owned(),
                json(&names.collect::<BTreeMap<_, _>>()),
            );
        }
        metadata
    }
}

/// The gain of every label's difference: strength 1 is then gentle (docs/training-free).
const GAIN: f32 = 0.25;

fn f32_tensor(shape: impl Into<Vec<usize>>, values: Vec<f32>) -> Tensor {
    Tensor::rounded(shape, values, DType::F32)
}

fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("string keys, strings and numbers")
}

/// Weights \[C, N\] between ±1/√N, as torch initialises a linear layer.
fn linear_weights(tokens: usize, labels: usize, seed: u64) -> Vec<f32> {
    let bound = (labels as f64).sqrt().recip();
    let mut state = seed;
    let mut uniform = || {
        // SplitMix64: equal seeds give equal files on every machine.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    (0..tokens * labels)
        .map(|_| ((2.0 * uniform() - 1.0) * bound) as f32)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_weights_are_spread_as_torchs() {
        let weights = linear_weights(77, 4, 0);
        assert!(weights.iter().all(|w| w.abs() <= 0.5));
        let mean = weights.iter().sum::<f32>() / 308.0;
        let square = weights.iter().map(|w| w * w).sum::<f32>() / 308.0;
        // Of a uniform distribution on ±1/2: mean 0 ± 0.0165, variance 1/12 ± 0.0043.
        assert!(
            mean.abs() < 0.06 && (square - 1.0 / 12.0).abs() < 0.015,
            "{mean} {square}"
        );
        assert_ne!(weights, linear_weights(77, 4, 1));
    }
}
