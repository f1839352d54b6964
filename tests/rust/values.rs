//! From labels to V_a, against the paper's equations written out in f64.

use std::sync::Arc;

use crate::parts::{LABELS, Parts, small, tensor};
use half::{bf16, f16};
use proptest::prelude::*;
use vmix::{ApplyTo, DType, Data, Selection, Tensor, Values};

/// f_a \[C, d\]: AesEmb lookup, F and Z (eq. 4 to 6), one scalar at a time.
fn context(parts: &Parts, weights: &[f32]) -> Vec<f64> {
    let (tokens, dim) = (5, 6);
    let aes_emb = parts.f64s("aes_emb");
    let f_t = |label: usize, c: usize| {
        let (t, t_hat) = (
            aes_emb[label * 2 * dim + c],
            aes_emb[(label * 2 + 1) * dim + c],
        );
        t_hat + f64::from(weights[label]) * (t - t_hat)
    };
    let linear = parts.f64s("projection.linear.weight");
    let (gamma, beta) = (
        parts.f64s("projection.norm.weight"),
        parts.f64s("projection.norm.bias"),
    );
    let (zero, bias) = (
        parts.f64s("projection.zero.weight"),
        parts.f64s("projection.zero.bias"),
    );
    let mut f_a = Vec::new();
    for token in 0..tokens {
        let row: Vec<f64> = (0..dim)
            .map(|c| {
                (0..LABELS.len())
                    .map(|i| linear[token * LABELS.len() + i] * f_t(i, c))
                    .sum()
            })
            .collect();
        let mean = row.iter().sum::<f64>() / dim as f64;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / dim as f64;
        let normed: Vec<f64> = (0..dim)
            .map(|c| (row[c] - mean) / (variance + 1e-5).sqrt() * gamma[c] + beta[c])
            .collect();
        f_a.extend(
            (0..dim)
                .map(|o| bias[o] + (0..dim).map(|c| zero[o * dim + c] * normed[c]).sum::<f64>()),
        );
    }
    f_a
}

/// V_a \[C, inner_dim\] (eq. 7).
fn layer_values(parts: &Parts, layer: &str, f_a: &[f64]) -> Vec<f64> {
    let weight = parts.f64s(&format!("{layer}.to_v_aes.weight"));
    let dim = 6;
    f_a.chunks(dim)
        .flat_map(|f| {
            weight
                .chunks(dim)
                .map(move |w| f.iter().zip(w).map(|(a, b)| a * b).sum())
        })
        .collect()
}

fn close(found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        // LayerNorm can magnify f32's 6e-8 by 1/√eps ≈ 300 where a row is nearly constant.
        let tolerance = 2e-5 * (1.0 + expected.abs());
        assert!(
            (f64::from(*found) - expected).abs() < tolerance,
            "{found} {expected}"
        );
    }
}

proptest! {
    #[test]
    fn values_are_the_papers_equations(weights in prop::array::uniform3(-1f32..2.0)) {
        let parts = small();
        let adapter = parts.adapter().unwrap();
        let selection = Selection::weights(LABELS.into_iter().zip(weights));
        let f_a = context(&parts, &weights);
        close(&adapter.project(&selection).unwrap().to_f32(), &f_a);
        let opposite = context(&parts, &[0.0; 3]);
        let values = adapter.values(&selection, ApplyTo::Contrast, DType::F32).unwrap();
        for layer in adapter.layers().iter() {
            let [c, u] = [&f_a, &opposite].map(|f_a| layer_values(&parts, &layer.name, f_a));
            close(&values.get(&layer.name).unwrap().to_f32(), &c);
            close(&values.get_uncond(&layer.name).unwrap().unwrap().to_f32(), &u);
        }
    }
}

#[test]
fn all_and_none_look_up_the_very_features_of_aes_emb() {
    let parts = small();
    let adapter = parts.adapter().unwrap();
    let aes_emb = parts.tensors["aes_emb"].to_f32();
    for (selection, side) in [(Selection::All, 0), (Selection::None, 1)] {
        let rows = aes_emb.chunks(6).skip(side).step_by(2).flatten();
        let f_t = adapter.aes_embed(&selection).unwrap();
        assert_eq!(f_t.shape(), [3, 6]);
        assert_eq!(f_t.to_f32(), rows.copied().collect::<Vec<_>>());
    }
}

#[test]
fn weights_of_every_dtype_are_widened_and_results_rounded_once() {
    for stored in [DType::F32, DType::F16, DType::BF16] {
        let mut parts = small();
        for tensor in parts.tensors.values_mut() {
            let wide = tensor.to_f32();
            let data = match stored {
                DType::F16 => Data::F16(wide.into_iter().map(f16::from_f32).collect()),
                DType::BF16 => Data::BF16(wide.into_iter().map(bf16::from_f32).collect()),
                _ => Data::F32(wide),
            };
            *tensor = Tensor::new(tensor.shape(), data);
        }
        let adapter = parts.adapter().unwrap();
        let f_a = context(&parts, &[1.0; 3]);
        let get = |dtype| {
            let values = adapter
                .values(&Selection::All, ApplyTo::Both, dtype)
                .unwrap();
            assert_eq!(values.dtype(), dtype);
            let layer = &adapter.layers()[0].name;
            values.get(layer).unwrap().clone()
        };
        let wide = get(DType::F32).to_f32();
        close(
            &wide,
            &layer_values(&parts, &adapter.layers()[0].name, &f_a),
        );
        let f16s = wide.iter().map(|x| f16::from_f32(*x)).collect();
        assert_eq!(get(DType::F16).data(), &Data::F16(f16s));
        let bf16s = wide.iter().map(|x| bf16::from_f32(*x)).collect();
        assert_eq!(get(DType::BF16).data(), &Data::BF16(bf16s));
    }
}

#[test]
fn presets_hold_bit_identical_values() {
    let folder = tempfile::tempdir().unwrap();
    let adapter = small().adapter().unwrap();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for apply_to in [ApplyTo::Cond, ApplyTo::Both, ApplyTo::Contrast] {
            let selection = Selection::weights([("sharp focus", 0.3)]);
            let made = adapter.values(&selection, apply_to, dtype).unwrap();
            let path = folder.path().join("preset.safetensors");
            made.save(&path).unwrap();
            let opened = Values::open(&path).unwrap();
            assert_eq!(opened.to_bytes().unwrap(), made.to_bytes().unwrap());
            assert_eq!(opened.weights(), [0.0, 0.0, 0.3]);
            assert_eq!(opened.apply_to(), apply_to);
            assert_eq!(opened.labels(), adapter.labels());
            assert_eq!(opened.origin(), made.origin());
            for layer in adapter.layers().iter() {
                for name in [&layer.name, layer.ldm_name.as_ref().unwrap()] {
                    assert_eq!(opened.get(name).unwrap(), made.get(name).unwrap());
                    let uncond = opened.get_uncond(name).unwrap();
                    assert_eq!(uncond, made.get_uncond(name).unwrap());
                    assert_eq!(uncond.is_some(), apply_to == ApplyTo::Contrast);
                }
            }
        }
    }
}

#[test]
fn the_origin_of_values_is_the_sha256_of_the_adapter_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter.safetensors");
    let in_memory = small().adapter().unwrap();
    in_memory.save(&path).unwrap();
    // By the name of Linux or that of other systems.
    let run = |program: &str, options: &[&str]| {
        let mut command = std::process::Command::new(program);
        command.args(options).arg(&path).output()
    };
    let output = run("sha256sum", &[])
        .or_else(|_| run("shasum", &["-a", "256"]))
        .unwrap();
    let expected = String::from_utf8(output.stdout).unwrap();
    for adapter in [in_memory, vmix::Adapter::open(&path).unwrap()] {
        let values = adapter
            .values(&Selection::All, ApplyTo::Both, DType::F32)
            .unwrap();
        assert_eq!(values.origin(), expected.split_whitespace().next().unwrap());
    }
}

/// The training-free kind: f_a\[c\] = Σ gain_i·w_i·(t_i − t̂_i), and minus that as its opposite.
#[test]
fn difference_projections() {
    let mut parts = small();
    parts.set("vmix.projection", "difference");
    parts
        .tensors
        .retain(|name, _| !name.starts_with("projection."));
    parts.put("projection.gain", tensor(&[3], 7));
    let adapter = parts.adapter().unwrap();
    let (aes_emb, gain) = (parts.f64s("aes_emb"), parts.f64s("projection.gain"));
    let weights = [0.5, 0.0, 1.5];
    let row: Vec<f64> = (0..6)
        .map(|c| {
            let difference = |i: usize| aes_emb[i * 12 + c] - aes_emb[i * 12 + 6 + c];
            (0..3).map(|i| gain[i] * weights[i] * difference(i)).sum()
        })
        .collect();
    let selection = Selection::weights(LABELS.into_iter().zip(weights.map(|w| w as f32)));
    close(
        &adapter.project(&selection).unwrap().to_f32(),
        &row.repeat(5),
    );
    let values = adapter
        .values(&selection, ApplyTo::Contrast, DType::F32)
        .unwrap();
    for layer in adapter.layers().iter() {
        let cond = values.get(&layer.name).unwrap().to_f32();
        let uncond = values.get_uncond(&layer.name).unwrap().unwrap().to_f32();
        close(&cond, &layer_values(&parts, &layer.name, &row.repeat(5)));
        assert_eq!(uncond, cond.iter().map(|x| -x).collect::<Vec<_>>());
    }
}

#[test]
fn weights_of_the_base_need_the_base() {
    let mut parts = small();
    parts.set("vmix.value_weights", "base");
    let dims = r#"{"down_blocks.0.attentions.0.transformer_blocks.0.attn2": 8,
                   "up_blocks.0.attentions.0.transformer_blocks.0.attn2": 4}"#;
    parts.set("vmix.inner_dims", dims);
    parts
        .tensors
        .retain(|name, _| !name.ends_with("to_v_aes.weight"));
    let adapter = parts.adapter().unwrap();
    let dims = adapter.layers().iter().map(|layer| layer.inner_dim);
    assert_eq!(dims.collect::<Vec<_>>(), [8, 4]);
    adapter.project(&Selection::All).unwrap();
    let error = adapter
        .values(&Selection::All, ApplyTo::Both, DType::F32)
        .unwrap_err();
    assert!(
        error.to_string().contains("the base model's own to_v"),
        "{error}"
    );
}

/// Values are shared between threads without a lock, and outlive their adapter.
#[test]
fn values_are_shared_between_threads() {
    let values = {
        let adapter = small().adapter().unwrap();
        adapter
            .values(&Selection::All, ApplyTo::Both, DType::F32)
            .unwrap()
    };
    let layer = values.layers()[0].name.clone();
    let tensors: Vec<_> = std::thread::scope(|scope| {
        let get = || scope.spawn(|| values.get(&layer).unwrap().clone());
        let threads: Vec<_> = (0..4).map(|_| get()).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    assert!(
        tensors
            .iter()
            .all(|tensor| Arc::ptr_eq(tensor, &tensors[0]))
    );
}
