//! Adapters to test with, made without the library's own arithmetic.

use std::collections::BTreeMap;

use vmix::{Adapter, Base, DType, Data, Tensor};

/// The parts of an adapter, to be changed by a test before they become a file: the paper's matrices, or
/// what a file of format 2 holds.
pub struct Parts {
    pub tensors: BTreeMap<String, Tensor>,
    pub metadata: BTreeMap<String, String>,
}

pub const LABELS: [&str; 3] = ["vibrant color", "natural lighting", "sharp focus"];

/// Reproducible numbers in [-1, 1), by a linear congruential generator.
pub fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

pub fn tensor(shape: &[usize], seed: u64) -> Tensor {
    Tensor::new(shape, Data::F32(numbers(shape.iter().product(), seed)))
}

/// A small linear adapter for the U-Net of [`small`]: what its file holds. One label has two rows of its
/// positive side.
pub fn linear() -> Parts {
    let mut parts = small().file();
    parts
        .tensors
        .retain(|name, _| name.ends_with(".attn2.rows"));
    for (i, tensor) in parts.tensors.values_mut().enumerate() {
        let width = tensor.shape()[1];
        *tensor = self::tensor(&[7, width], 20 + i as u64);
    }
    parts.put("profile", tensor(&[5, 7], 30));
    let labels: Vec<String> = LABELS
        .iter()
        .map(|name| {
            format!(
                r#"{{"name": "{name}", "positive": ["{name}"], "negative": [""], "default": 0,
                    "neutral": 0, "range": [-1.5, 1.5]}}"#
            )
        })
        .collect();
    parts.set("vmix.labels", &format!("[{}]", labels.join(", ")));
    let row = |label: usize, side| format!(r#"{{"label": "{}", "side": "{side}"}}"#, LABELS[label]);
    let rows = [
        row(0, "positive"),
        row(0, "negative"),
        row(1, "positive"),
        row(1, "negative"),
        row(2, "negative"),
        row(2, "positive"),
        row(0, "positive"),
    ];
    parts.set("vmix.rows", &format!("[{}]", rows.join(", ")));
    parts.set("vmix.coefficients", "linear");
    parts.set("vmix.made", r#"{"method": "fitted", "base": "small"}"#);
    parts
}

/// A small adapter of a U-Net that has no table: two layers of widths 8 and 4, d = 6, C = 5.
pub fn small() -> Parts {
    let layers = [
        ("up_blocks.0.attentions.0.transformer_blocks.0.attn2", 4),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn2", 8),
    ];
    let mut parts = parts("other", 5, 6, &layers);
    let ldm_names = r#"{
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2":
            "input_blocks.1.1.transformer_blocks.0.attn2",
        "up_blocks.0.attentions.0.transformer_blocks.0.attn2":
            "output_blocks.0.1.transformer_blocks.0.attn2"}"#;
    parts.set("vmix.ldm_names", ldm_names);
    parts
}

/// An adapter of a known base, all zeros.
pub fn zeros(base: Base) -> Parts {
    let layers = base.layers().unwrap();
    let layers: Vec<_> = layers.iter().map(|l| (&*l.name, l.inner_dim)).collect();
    let (tokens, dim) = (base.context_tokens().unwrap(), base.context_dim().unwrap());
    let mut parts = parts(base.name(), tokens, dim, &layers);
    for tensor in parts.tensors.values_mut() {
        let zeros = vec![half::f16::ZERO; tensor.shape().iter().product()];
        *tensor = Tensor::new(tensor.shape(), Data::F16(zeros));
    }
    parts
}

fn parts(base: &str, tokens: usize, dim: usize, layers: &[(&str, usize)]) -> Parts {
    let labels: Vec<String> = LABELS
        .iter()
        .enumerate()
        .map(|(i, name)| {
            format!(r#"{{"name": "{name}", "positive": ["{name}"], "negative": ["rare{i}"]}}"#)
        })
        .collect();
    let n = LABELS.len();
    let mut parts = Parts {
        tensors: BTreeMap::new(),
        metadata: BTreeMap::new(),
    };
    for (key, value) in [
        ("vmix.base", base),
        ("vmix.labels", &format!("[{}]", labels.join(", "))),
        ("vmix.context_tokens", &tokens.to_string()),
        ("vmix.norm_eps", "1e-5"),
        ("vmix.apply_to", "both"),
        ("vmix.made", r#"{"method": "trained", "steps": 3}"#),
        ("modelspec.license", "MIT"),
    ] {
        parts.set(key, value);
    }
    for (name, shape, seed) in [
        ("aes_emb", vec![n, 2, dim], 1),
        ("projection.linear.weight", vec![tokens, n], 2),
        ("projection.norm.weight", vec![dim], 3),
        ("projection.norm.bias", vec![dim], 4),
        ("projection.zero.weight", vec![dim, dim], 5),
        ("projection.zero.bias", vec![dim], 6),
    ] {
        parts.put(name, tensor(&shape, seed));
    }
    for (seed, (layer, inner_dim)) in layers.iter().enumerate() {
        let weight = tensor(&[*inner_dim, dim], 10 + seed as u64);
        parts.put(&format!("{layer}.to_v_aes.weight"), weight);
    }
    parts
}

impl Parts {
    pub fn set(&mut self, key: &str, value: &str) {
        self.metadata.insert(key.to_owned(), value.to_owned());
    }

    pub fn put(&mut self, name: &str, tensor: Tensor) {
        self.tensors.insert(name.to_owned(), tensor);
    }

    /// An adapter of the paper's matrices.
    pub fn adapter(&self) -> vmix::Result<Adapter> {
        Adapter::from_matrices(&self.tensors, &self.metadata, DType::F32)
    }

    /// What the file of that adapter holds.
    pub fn file(&self) -> Self {
        let adapter = self.adapter().unwrap();
        Self {
            tensors: adapter.tensors().unwrap(),
            metadata: adapter.metadata().clone(),
        }
    }

    /// An adapter of what a file holds.
    pub fn opened(&self) -> vmix::Result<Adapter> {
        Adapter::from_tensors(&self.tensors, &self.metadata)
    }

    pub fn f64s(&self, name: &str) -> Vec<f64> {
        let values = self.tensors[name].to_f32();
        values.into_iter().map(f64::from).collect()
    }
}
