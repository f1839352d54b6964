//! Any bytes as a file: what opens is used, and comes back as it was written.

#![no_main]

use std::{collections::BTreeMap, slice};

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use safetensors::{Dtype, SafeTensors};
use vmix::{
    Adapter, ApplyTo, CoefficientKind, DType, Data, Row, Selection, Tensor, Untrained, Values,
    merge,
};

/// Larger results only take time: their size is checked by a test.
const MAX_RESULT: usize = 1 << 18;

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

fuzz_target!(|bytes: &[u8]| {
    if let Ok(adapter) = Adapter::from_bytes(bytes.to_vec()) {
        use_adapter(&adapter);
    }
    if let Ok(values) = Values::from_bytes(bytes.to_vec()) {
        assert_comes_back(&values);
    }
    if let Ok(untrained) = Untrained::from_bytes(bytes.to_vec()) {
        let (n, d) = (untrained.labels().len(), untrained.context_dim());
        assert_eq!(untrained.aes_emb().shape(), [n, 2, d]);
        assert_finite(untrained.aes_emb());
    }
    // The paper's matrices come from a trainer, but nothing in them is believed either.
    if let Some((tensors, metadata)) = parts(bytes) {
        for dtype in DTYPES {
            if let Ok(adapter) = Adapter::from_matrices(&tensors, &metadata, dtype) {
                assert_eq!(adapter.dtype(), dtype);
                use_adapter(&adapter);
            }
        }
    }
});

// Changes the header alone, usually, and mends its length: else nearly all changes end at once.
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    const START: usize = 8;
    let length = data[..size]
        .first_chunk::<START>()
        .and_then(|length| usize::try_from(u64::from_le_bytes(*length)).ok())
        .filter(|length| *length <= size - START);
    let Some(length) = length.filter(|_| !seed.is_multiple_of(4)) else {
        return fuzzer_mutate(data, size, max_size);
    };
    let tensors = data[START + length..size].to_vec();
    let room = max_size - START - tensors.len();
    let length = fuzzer_mutate(&mut data[START..], length, room);
    data[..START].copy_from_slice(&(length as u64).to_le_bytes());
    let end = START + length + tensors.len();
    data[START + length..end].copy_from_slice(&tensors);
    end
});

/// What a file holds, if it is a safetensors file of floats.
fn parts(bytes: &[u8]) -> Option<(BTreeMap<String, Tensor>, BTreeMap<String, String>)> {
    let (_, header) = SafeTensors::read_metadata(bytes).ok()?;
    let metadata = header.metadata().clone()?.into_iter().collect();
    let file = SafeTensors::deserialize(bytes).ok()?;
    let tensors = file.iter().map(|(name, view)| {
        let data = match view.dtype() {
            Dtype::F32 => Data::F32(bytemuck::pod_collect_to_vec(view.data())),
            Dtype::F16 => Data::F16(bytemuck::pod_collect_to_vec(view.data())),
            Dtype::BF16 => Data::BF16(bytemuck::pod_collect_to_vec(view.data())),
            _ => return None,
        };
        Some((name.to_owned(), Tensor::new(view.shape(), data)))
    });
    Some((tensors.collect::<Option<_>>()?, metadata))
}

fn use_adapter(adapter: &Adapter) {
    let (n, rows) = (adapter.labels().len(), adapter.row_sides().len());
    let (tokens, d) = (adapter.context_tokens(), adapter.context_dim());
    for label in 0..n {
        let mut sides = adapter.row_sides().iter();
        assert!(
            sides.any(|row| row.label() == Some(label)),
            "a row for every label"
        );
    }
    let mut width = rows.saturating_add(d.unwrap_or(0));
    for layer in adapter.layers().iter() {
        let rows_of = adapter.rows(&layer.name).expect("its name");
        assert_eq!(rows_of.shape(), [rows, layer.inner_dim]);
        assert_eq!(rows_of.dtype(), adapter.dtype());
        assert_finite(rows_of);
        width = width.saturating_add(layer.inner_dim);
    }
    if width.saturating_mul(tokens) > MAX_RESULT {
        return;
    }
    let tensors = adapter.tensors().expect("they were read");
    let again = Adapter::from_tensors(&tensors, adapter.metadata()).expect("it opened before");
    let merged = merge(slice::from_ref(adapter), None).expect("every label is kept");
    let every = Selection::only(0..n); // `All` is refused where coefficients are linear
    let selections = [Selection::Default, every, Selection::None];
    for selection in &selections {
        // Finite weights may overflow together.
        let coefficients = adapter.coefficients(selection).ok();
        assert_eq!(again.coefficients(selection).ok(), coefficients);
        assert_eq!(merged.coefficients(selection).ok(), coefficients);
        if let Some(coefficients) = &coefficients {
            assert_eq!(coefficients.shape(), [tokens, rows]);
            assert_finite(coefficients);
            if *selection == selections[1] {
                assert_are_all(adapter, &tensors["profile"], coefficients);
            }
        }
        let f_t = adapter.aes_embed(selection).expect("a valid selection");
        assert_eq!(f_t.is_some(), tensors.contains_key("aes_emb"));
        if let Some(f_t) = f_t {
            assert_eq!(f_t.shape(), [n, d.expect("AesEmb has it")]);
        }
        if let Ok(f_a) = adapter.project(selection) {
            let is_linear = adapter.coefficient_kind() == CoefficientKind::Linear;
            assert_eq!(f_a.is_none(), is_linear);
            if let Some(f_a) = f_a {
                assert_eq!(f_a.shape(), [tokens, d.expect("AesEmb has it")]);
                assert_finite(&f_a);
            }
        }
        for apply_to in [ApplyTo::Cond, ApplyTo::Both, ApplyTo::Contrast] {
            for dtype in DTYPES {
                let Ok(values) = adapter.values(selection, apply_to, dtype) else {
                    continue;
                };
                assert!(coefficients.is_some());
                assert_eq!((values.apply_to(), values.dtype()), (apply_to, dtype));
                assert_comes_back(&values);
            }
        }
    }
    if let Ok(batch) = adapter.batch_coefficients(&selections) {
        assert_eq!(batch.shape(), [selections.len(), tokens, rows]);
    }
    for dtype in DTYPES {
        if let Ok(other) = adapter.to_dtype(dtype) {
            assert_eq!(other.dtype(), dtype);
        } else {
            assert!(dtype != DType::F32 && dtype != adapter.dtype());
        }
    }
    // A factor may overflow, and a row that no weight moves becomes two.
    let first = adapter.labels()[0].name.as_str();
    if let Ok(one) = merge(slice::from_ref(adapter), Some(&[first])) {
        assert_eq!(one.labels()[..], adapter.labels()[..1]);
    }
}

/// With every label at 1 there is nothing of the negatives, and constants are as the profile has them.
fn assert_are_all(adapter: &Adapter, profile: &Tensor, coefficients: &Tensor) {
    let is_linear = adapter.coefficient_kind() == CoefficientKind::Linear;
    let pairs = profile.to_f32().into_iter().zip(coefficients.to_f32());
    for ((p, a), row) in pairs.zip(adapter.row_sides().iter().cycle()) {
        match row {
            Row::Negative(_) => assert_eq!(a, 0.0),
            Row::Positive(_) if !is_linear => {}
            Row::Positive(_) | Row::Constant => assert_eq!(a, p),
        }
    }
}

fn assert_finite(tensor: &Tensor) {
    assert!(tensor.to_f32().iter().all(|x| x.is_finite()));
}

fn assert_comes_back(values: &Values) {
    let bytes = values.to_bytes().expect("a preset can be written");
    let back = Values::from_bytes(bytes.clone()).expect("what was written opens");
    assert_eq!(back.to_bytes().expect("again"), bytes);
    assert_eq!(back.labels(), values.labels());
    assert_eq!(back.weights(), values.weights());
    assert_eq!(back.layers()[..], values.layers()[..]);
    assert_eq!(back.metadata(), values.metadata());
    let shape = |inner_dim| [values.context_tokens(), inner_dim];
    for layer in values.layers().iter() {
        let (found, expected) = (back.get(&layer.name), values.get(&layer.name));
        let (found, expected) = (found.expect("its name"), expected.expect("its name"));
        assert_eq!(found, expected);
        assert_eq!(found.shape(), shape(layer.inner_dim));
        assert_finite(found);
        let uncond = back.get_uncond(&layer.name).expect("its name");
        assert_eq!(uncond, values.get_uncond(&layer.name).expect("its name"));
        assert_eq!(uncond.is_some(), values.apply_to() == ApplyTo::Contrast);
    }
}
