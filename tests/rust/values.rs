//! From labels to V_a, against the paper's equations written out in f64.

use std::sync::Arc;

use crate::parts::{LABELS, Parts, linear, small};
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
        // G in f32 is magnified by 1/√eps ≈ 300 where a token's features nearly cancel.
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
        close(&adapter.project(&selection).unwrap().unwrap().to_f32(), &f_a);
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
        let f_t = adapter.aes_embed(&selection).unwrap().unwrap();
        assert_eq!(f_t.shape(), [3, 6]);
        assert_eq!(f_t.to_f32(), rows.copied().collect::<Vec<_>>());
    }
}

#[test]
fn matrices_of_every_dtype_are_widened_and_results_rounded_once() {
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

/// The rows of the positive side times max(w, 0) and those of the negative side times max(−w, 0).
#[test]
fn linear_adapters_are_sums_of_their_rows() {
    let parts = linear();
    let adapter = parts.opened().unwrap();
    let sides = [
        (0, 1.0),
        (0, -1.0),
        (1, 1.0),
        (1, -1.0),
        (2, -1.0),
        (2, 1.0),
        (0, 1.0),
    ];
    let weights = [0.5f32, -1.25, 1.5];
    let selection = Selection::weights(LABELS.into_iter().zip(weights));
    let values = adapter
        .values(&selection, ApplyTo::Contrast, DType::F32)
        .unwrap();
    let profile = parts.f64s("profile");
    for layer in adapter.layers().iter() {
        let rows = parts.f64s(&format!("{}.rows", layer.name));
        let expected = |sign: f64| -> Vec<f64> {
            let entry = |i: usize| {
                let (c, j) = (i / layer.inner_dim, i % layer.inner_dim);
                let scale = |(label, side): (usize, f64)| {
                    (sign * side * f64::from(weights[label])).max(0.0)
                };
                let sides = sides.into_iter().enumerate();
                sides
                    .map(|(r, side)| {
                        scale(side) * profile[c * 7 + r] * rows[r * layer.inner_dim + j]
                    })
                    .sum()
            };
            (0..5 * layer.inner_dim).map(entry).collect()
        };
        close(&values.get(&layer.name).unwrap().to_f32(), &expected(1.0));
        let uncond = values.get_uncond(&layer.name).unwrap().unwrap();
        close(&uncond.to_f32(), &expected(-1.0));
    }
    assert!(adapter.project(&selection).unwrap().is_none());
    assert!(adapter.aes_embed(&selection).unwrap().is_none());
    // At its default, 0, no label does anything.
    let none = adapter
        .values(&Selection::Default, ApplyTo::Cond, DType::F16)
        .unwrap();
    for layer in adapter.layers().iter() {
        assert!(
            none.get(&layer.name)
                .unwrap()
                .to_f32()
                .iter()
                .all(|x| *x == 0.0)
        );
    }
}

/// A·B is V_a, for one selection and for a batch, of every row that a host may upload.
#[test]
fn coefficients_times_rows_are_values() {
    for adapter in [small().adapter().unwrap(), linear().opened().unwrap()] {
        let rows = adapter.row_sides().len();
        let selections = [
            Selection::only(["natural lighting"]),
            Selection::None,
            Selection::weights([("sharp focus", -0.7), ("vibrant color", 1.3)]),
        ];
        let batch = adapter.batch_coefficients(&selections).unwrap();
        assert_eq!(batch.shape(), [3, 5, rows]);
        for (i, selection) in selections.iter().enumerate() {
            let a = adapter.coefficients(selection).unwrap();
            assert_eq!(a.shape(), [5, rows]);
            let a = a.to_f32();
            assert_eq!(batch.to_f32()[i * a.len()..][..a.len()], a);
            let values = adapter
                .values(selection, ApplyTo::Cond, DType::F32)
                .unwrap();
            for layer in adapter.layers().iter() {
                let b = adapter.rows(&layer.name).unwrap();
                assert_eq!(b.shape(), [rows, layer.inner_dim]);
                let b = b.to_f32();
                let entry = |i: usize| {
                    let (c, j) = (i / layer.inner_dim, i % layer.inner_dim);
                    let product =
                        |r| f64::from(a[c * rows + r]) * f64::from(b[r * layer.inner_dim + j]);
                    (0..rows).map(product).sum()
                };
                let expected: Vec<f64> = (0..5 * layer.inner_dim).map(entry).collect();
                close(&values.get(&layer.name).unwrap().to_f32(), &expected);
            }
        }
    }
    let empty = small().adapter().unwrap().batch_coefficients(&[]).unwrap();
    assert_eq!(empty.shape(), [0, 5, 7]);
}

/// A label that is dropped stays where a selection leaves it out, in both kinds of adapters.
#[test]
fn merged_adapters_give_the_values_of_the_originals() {
    let mut neutral = small();
    let labels = neutral.metadata["vmix.labels"].replace(
        r#""name": "sharp focus","#,
        r#""name": "sharp focus", "neutral": 0.25,"#,
    );
    neutral.set("vmix.labels", &labels);
    for adapter in [neutral.adapter().unwrap(), linear().opened().unwrap()] {
        let kept = vmix::merge(
            std::slice::from_ref(&adapter),
            Some(&["natural lighting", "vibrant color"]),
        )
        .unwrap();
        let names: Vec<_> = kept.labels().iter().map(|label| &*label.name).collect();
        assert_eq!(names, ["natural lighting", "vibrant color"]);
        for selection in [
            Selection::weights([("natural lighting", 0.3), ("vibrant color", -0.5)]),
            Selection::None,
        ] {
            let values = |adapter: &vmix::Adapter| {
                adapter
                    .values(&selection, ApplyTo::Contrast, DType::F32)
                    .unwrap()
            };
            let (found, expected) = (values(&kept), values(&adapter));
            for layer in adapter.layers().iter() {
                let f64s = |values: &Tensor| -> Vec<f64> {
                    values.to_f32().into_iter().map(f64::from).collect()
                };
                let cond = f64s(expected.get(&layer.name).unwrap());
                close(&found.get(&layer.name).unwrap().to_f32(), &cond);
            }
        }
    }

    // Two halves of a linear adapter make the whole again.
    let whole = linear().opened().unwrap();
    let part = |labels: &[&str]| vmix::merge(std::slice::from_ref(&whole), Some(labels)).unwrap();
    let halves = [
        part(&["vibrant color", "sharp focus"]),
        part(&["natural lighting"]),
    ];
    let joined = vmix::merge(&halves, Some(&LABELS)).unwrap();
    let selection = Selection::weights(LABELS.into_iter().zip([0.5, -1.25, 1.5]));
    for layer in whole.layers().iter() {
        let values = |adapter: &vmix::Adapter| {
            let values = adapter
                .values(&selection, ApplyTo::Cond, DType::F32)
                .unwrap();
            values.get(&layer.name).unwrap().to_f32()
        };
        let expected: Vec<f64> = values(&whole).into_iter().map(f64::from).collect();
        close(&values(&joined), &expected);
    }
    assert!(joined.metadata()["vmix.made"].contains(r#""method":"merged""#));

    let trained = small().adapter().unwrap();
    for (adapters, labels, expected) in [
        (vec![], None, "adapters: expected at least one, found none"),
        (
            vec![trained.clone(), trained.clone()],
            None,
            "adapters[0] (tensors): coefficients: expected `linear`, to join several, found `layernorm`",
        ),
        (
            vec![whole.clone(), whole.clone()],
            None,
            "labels: expected labels of different names, found `vibrant color` in two adapters",
        ),
        (
            vec![whole.clone()],
            Some(["vibrant colour"]),
            "unknown label `vibrant colour` (did you mean `vibrant color`?); known labels: \
             vibrant color, natural lighting, sharp focus",
        ),
    ] {
        let labels = labels.as_ref().map(|labels| &labels[..]);
        let error = vmix::merge(&adapters, labels).unwrap_err().to_string();
        assert_eq!(error, expected);
    }
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

/// What `vmix fit` wrote: `light: bright | dark` on the demo's model, rank 2.
#[test]
fn a_fitted_adapter_is_like_any_other() {
    let file = include_bytes!("../data/fitted.safetensors");
    let adapter = vmix::Adapter::from_bytes(file.to_vec()).unwrap();
    let label = &adapter.labels()[0];
    assert_eq!((label.default, label.neutral), (0.0, Some(0.0)));
    assert_eq!(label.range, [-1.5, 1.5]);
    assert!(label.effect["explained_negative"] > 0.5);
    let layer = "mid_block.attentions.0.transformer_blocks.0.attn2";
    let at = |selection: &Selection| {
        let values = adapter.values(selection, ApplyTo::Cond, DType::F32);
        values.unwrap().get(layer).unwrap().to_f32()
    };
    let profile = adapter.tensors().unwrap()["profile"].to_f32();
    let rows = adapter.rows(layer).unwrap().to_f32();
    let (tokens, count) = (adapter.context_tokens(), adapter.row_sides().len());
    let width = rows.len() / count;
    for (weight, first) in [(1.0, 0), (-1.0, count / 2)] {
        let found = at(&Selection::weights([("light", weight)]));
        for c in 0..tokens {
            for j in 0..width {
                let terms = (first..first + count / 2)
                    .map(|r| f64::from(profile[c * count + r]) * f64::from(rows[r * width + j]));
                let expected: f64 = terms.sum();
                // A few products in f32.
                let difference = (f64::from(found[c * width + j]) - expected).abs();
                assert!(difference <= 1e-5 * (1.0 + expected.abs()), "{c} {j}");
            }
        }
    }
    assert!(at(&Selection::Default).iter().all(|x| *x == 0.0));
    let error = adapter.weights(&Selection::All).unwrap_err().to_string();
    assert_eq!(
        error,
        "selection: expected names of fitted labels (light), found `all`"
    );
}
