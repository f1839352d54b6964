//! Any bytes as a file: what opens is used, and comes back as it was written.

#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use vmix::{Adapter, ApplyTo, DType, Selection, ValueWeights, Values};

/// Larger results only take time: their size is checked by a test.
const MAX_RESULT: usize = 1 << 18;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(adapter) = Adapter::from_bytes(bytes.to_vec()) {
        use_adapter(&adapter);
    }
    if let Ok(values) = Values::from_bytes(bytes.to_vec()) {
        assert_comes_back(&values);
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

fn use_adapter(adapter: &Adapter) {
    let valid = adapter.validate().is_ok();
    let widths = adapter.layers().iter().map(|layer| layer.inner_dim);
    let width = widths.fold(adapter.context_dim(), usize::saturating_add);
    if width.saturating_mul(adapter.context_tokens()) > MAX_RESULT {
        return;
    }
    for selection in [Selection::Default, Selection::All, Selection::None] {
        let f_t = adapter.aes_embed(&selection).expect("a valid selection");
        let (n, d) = (adapter.labels().len(), adapter.context_dim());
        assert_eq!(f_t.shape(), [n, d]);
        // Finite weights may overflow together.
        if let Ok(f_a) = adapter.project(&selection) {
            assert_eq!(f_a.shape(), [adapter.context_tokens(), d]);
        }
        for apply_to in [ApplyTo::Cond, ApplyTo::Both, ApplyTo::Contrast] {
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let Ok(values) = adapter.values(&selection, apply_to, dtype) else {
                    continue;
                };
                assert!(valid && adapter.value_weights() == ValueWeights::Own);
                assert_eq!((values.apply_to(), values.dtype()), (apply_to, dtype));
                assert_comes_back(&values);
            }
        }
    }
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
        assert!(found.to_f32().iter().all(|x| x.is_finite()));
        let uncond = back.get_uncond(&layer.name).expect("its name");
        assert_eq!(uncond, values.get_uncond(&layer.name).expect("its name"));
        assert_eq!(uncond.is_some(), values.apply_to() == ApplyTo::Contrast);
    }
}
