//! Value-mixed cross-attention (paper, eq. 9), plain and correct.

use candle_core::{D, Device, Tensor as Candle};

use crate::{Error, Result, Tensor};

/// softmax(Q·Kᵀ/√d)·(V_c + λ·V_a), computed in f32 and rounded to Q's dtype.
///
/// - `query` \[B, L_q, H·D\], `key` and `value` \[B, L_k, H·D\];
/// - `aes_value`, V_a \[C, H·D\], where L_k is a multiple of C: longer contexts repeat it;
/// - `strength`, λ; at 0 the result is bit-identical to attention without V_a;
/// - `heads`, H.
///
/// Returns \[B, L_q, H·D\].
pub fn attention(
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    aes_value: &Tensor,
    strength: f32,
    heads: usize,
) -> Result<Tensor> {
    let &[batch, queries, width] = query.shape() else {
        let expected = "shape [batch, queries, heads · head dim]";
        return Err(Error::argument("query", expected, shape_of(query)));
    };
    let &[_, keys, _] = key.shape() else {
        let expected = "shape [batch, keys, heads · head dim]";
        return Err(Error::argument("key", expected, shape_of(key)));
    };
    let &[tokens, _] = aes_value.shape() else {
        let expected = "shape [context tokens, heads · head dim]";
        return Err(Error::argument("aes_value", expected, shape_of(aes_value)));
    };
    for (argument, tensor, shape) in [
        ("key", key, [batch, keys, width].as_slice()),
        ("value", value, &[batch, keys, width]),
        ("aes_value", aes_value, &[tokens, width]),
    ] {
        if tensor.shape() != shape {
            let expected = format!("shape {shape:?}");
            return Err(Error::argument(argument, expected, shape_of(tensor)));
        }
    }
    if batch == 0 || queries == 0 {
        let expected = "at least one row and one query";
        return Err(Error::argument("query", expected, shape_of(query)));
    }
    if heads == 0 || width == 0 || width % heads != 0 {
        let expected = format!("a divisor of the query's width {width}");
        return Err(Error::argument("heads", expected, heads.to_string()));
    }
    if tokens == 0 || keys == 0 || keys % tokens != 0 {
        let expected = format!("a multiple of the {tokens} tokens of aes_value");
        return Err(Error::argument(
            "number of keys",
            expected,
            keys.to_string(),
        ));
    }
    if !strength.is_finite() {
        return Err(Error::argument(
            "strength",
            "a finite number",
            strength.to_string(),
        ));
    }

    let head_dim = width / heads;
    let split = |tensor: Candle, rows: usize| {
        let tensor = tensor.reshape((batch, rows, heads, head_dim))?;
        tensor.transpose(1, 2)?.contiguous()
    };
    let mut value = candle(value)?;
    if strength != 0.0 {
        let aes_value = candle(aes_value)?.affine(strength.into(), 0.0)?;
        value = value.broadcast_add(&aes_value.repeat((keys / tokens, 1))?)?;
    }
    let key = split(candle(key)?, keys)?.transpose(2, 3)?.contiguous()?;
    let scores = split(candle(query)?, queries)?.matmul(&key)?;
    let scores = scores.affine(1.0 / (head_dim as f64).sqrt(), 0.0)?;
    let mixed = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&split(value, keys)?)?;
    let mixed = mixed.transpose(1, 2)?.flatten_all()?.to_vec1()?;
    Ok(Tensor::rounded(query.shape(), mixed, query.dtype()))
}

fn candle(tensor: &Tensor) -> Result<Candle> {
    Ok(Candle::from_vec(
        tensor.to_f32(),
        tensor.shape(),
        &Device::Cpu,
    )?)
}

fn shape_of(tensor: &Tensor) -> String {
    format!("shape {:?}", tensor.shape())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DType, Data};
    use proptest::prelude::*;

    fn tensor(shape: &[usize], seed: u64) -> Tensor {
        // A small linear congruential generator: reproducible numbers in [-2, 2).
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            ((state >> 40) as f32 / (1u64 << 22) as f32) - 2.0
        };
        let data = (0..shape.iter().product()).map(|_| next()).collect();
        Tensor::new(shape, Data::F32(data))
    }

    /// The paper's two branches (eq. 3, 8 and 9), one scalar at a time in f64.
    fn two_branches(
        q: &Tensor,
        k: &Tensor,
        v_c: &Tensor,
        v_a: &Tensor,
        l: f32,
        heads: usize,
    ) -> Vec<f64> {
        let &[batch, queries, width] = q.shape() else {
            unreachable!()
        };
        let (keys, tokens, dim) = (k.shape()[1], v_a.shape()[0], width / heads);
        let f = |t: &Tensor| t.to_f32().into_iter().map(f64::from).collect::<Vec<_>>();
        let (q, k, v_c, v_a) = (f(q), f(k), f(v_c), f(v_a));
        let mut out = Vec::new();
        for b in 0..batch {
            for i in 0..queries {
                for column in 0..width {
                    let head = column / dim * dim;
                    let score = |j: usize| {
                        let dot = |c: usize| {
                            q[(b * queries + i) * width + head + c]
                                * k[(b * keys + j) * width + head + c]
                        };
                        (0..dim).map(dot).sum::<f64>() / (dim as f64).sqrt()
                    };
                    let top = (0..keys).map(score).fold(f64::NEG_INFINITY, f64::max);
                    let total: f64 = (0..keys).map(|j| (score(j) - top).exp()).sum();
                    let branch = |value: &dyn Fn(usize) -> f64| -> f64 {
                        (0..keys)
                            .map(|j| (score(j) - top).exp() / total * value(j))
                            .sum()
                    };
                    let content = branch(&|j| v_c[(b * keys + j) * width + column]);
                    let aesthetic = branch(&|j| v_a[j % tokens * width + column]);
                    out.push(content + f64::from(l) * aesthetic);
                }
            }
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn equals_the_papers_two_branches(
            (batch, queries, tokens, chunks) in (1..3usize, 1..6usize, 1..8usize, 1..3usize),
            (heads, dim) in (1..4usize, 1..9usize),
            strength in -2f32..2.0,
            seed: u64,
        ) {
            let (keys, width) = (tokens * chunks, heads * dim);
            let q = tensor(&[batch, queries, width], seed);
            let k = tensor(&[batch, keys, width], seed ^ 1);
            let v_c = tensor(&[batch, keys, width], seed ^ 2);
            let v_a = tensor(&[tokens, width], seed ^ 3);
            let found = attention(&q, &k, &v_c, &v_a, strength, heads).unwrap().to_f32();
            let expected = two_branches(&q, &k, &v_c, &v_a, strength, heads);
            for (found, expected) in found.iter().zip(expected) {
                // Outputs are at most 6; sums of up to 27 terms in f32 against f64.
                prop_assert!((f64::from(*found) - expected).abs() < 2e-5, "{found} {expected}");
            }
            let off = attention(&q, &k, &v_c, &v_a, 0.0, heads).unwrap();
            let none = Tensor::new([tokens, width], Data::F32(vec![0.0; tokens * width]));
            prop_assert_eq!(off, attention(&q, &k, &v_c, &none, 1.0, heads).unwrap());
        }
    }

    #[test]
    fn halves_are_computed_in_f32_and_rounded_once() {
        let half = |t: Tensor, dtype| Tensor::rounded(t.shape().to_vec(), t.to_f32(), dtype);
        for dtype in [DType::F16, DType::BF16] {
            let q = half(tensor(&[1, 3, 8], 1), dtype);
            let [k, v] = [2, 3].map(|seed| half(tensor(&[1, 4, 8], seed), dtype));
            let a = half(tensor(&[4, 8], 4), dtype);
            let wide = |t: &Tensor| half(t.clone(), DType::F32);
            let exact = attention(&wide(&q), &wide(&k), &wide(&v), &wide(&a), 0.7, 2).unwrap();
            let found = attention(&q, &k, &v, &a, 0.7, 2).unwrap();
            assert_eq!(found, half(exact, dtype));
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let [q, k, a] = [&[1, 2, 4][..], &[1, 6, 4], &[3, 4]].map(|shape| tensor(shape, 0));
        let error = |q, k, v, a, l, h| attention(q, k, v, a, l, h).unwrap_err().to_string();
        for (found, expected) in [
            (
                error(&a, &k, &k, &a, 1.0, 2),
                "query: expected shape [batch, queries",
            ),
            (
                error(&q, &k, &q, &a, 1.0, 2),
                "value: expected shape [1, 6, 4], found shape [1, 2, 4]",
            ),
            (
                error(&q, &k, &k, &q, 1.0, 2),
                "aes_value: expected shape [context tokens",
            ),
            (
                error(&q, &k, &k, &a, 1.0, 3),
                "heads: expected a divisor of the query's width 4",
            ),
            (
                error(&q, &k, &k, &a, f32::NAN, 2),
                "strength: expected a finite number, found NaN",
            ),
            (
                error(&q, &q, &q, &a, 1.0, 2),
                "number of keys: expected a multiple of the 3 tokens",
            ),
        ] {
            assert!(found.starts_with(expected), "{found}");
        }
    }
}
