//! Value-mixed cross-attention (paper, eq. 9).

mod blocks;
mod engine;
mod mix;
mod plain;
mod portable;
mod vectors;

pub use engine::Kernel;
pub use mix::mix_values;

use engine::Engine;

use crate::{
    Error, Result, Tensor,
    view::{TensorView, TensorViewMut},
};

/// softmax(Q·Kᵀ·scale + mask)·(V_c + λ·V_a) over tensors that lie where they are, computed in f32.
///
/// B batch entries, L_q queries, L_k keys, H heads of width D, C context tokens. Masks may have
/// size 1 in a dimension in which they do not vary.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Attention<'a> {
    /// Q, `[B, L_q, H, D]`.
    pub query: TensorView<'a>,
    /// K_c, `[B, L_k, H, D]`.
    pub key: TensorView<'a>,
    /// V_c, `[B, L_k, H, D]`.
    pub value: TensorView<'a>,
    /// V_a, `[1 or B, C, H, D]` or `[1 or B, C, 1, H·D]`, where L_k is a multiple of C: longer
    /// contexts repeat it. Without it this is ordinary attention.
    pub aes_value: Option<TensorView<'a>>,
    /// λ, one for all or one per batch entry; at 0 the result is bit-identical to attention
    /// without V_a.
    pub strength: &'a [f32],
    /// What scores are multiplied with; 1/√D where it is `None`.
    pub scale: Option<f32>,
    /// Added to the scaled scores, `[B, L_q, H, L_k]`; −∞ hides a key. A query all of whose keys
    /// are hidden gives zeros; NaN and +∞ give NaN.
    pub mask: Option<TensorView<'a>>,
    /// What λ is multiplied with for each query, `[B, L_q, 1, 1]`: the strength of a region.
    pub query_mask: Option<TensorView<'a>>,
    /// What computes it; [`Kernel::chosen`] where it is `None`.
    pub kernel: Option<Kernel>,
}

impl<'a> Attention<'a> {
    /// Attention without V_a or masks, with the usual scale and λ = 1.
    pub fn new(query: TensorView<'a>, key: TensorView<'a>, value: TensorView<'a>) -> Self {
        Self {
            query,
            key,
            value,
            aes_value: None,
            strength: &[1.0],
            scale: None,
            mask: None,
            query_mask: None,
            kernel: None,
        }
    }

    /// Writes the result into `output`, `[B, L_q, H, D]`, and the attention maps (the softmax) of
    /// as many heads as `map`, `[B, L_q, heads, L_k]`, has, from the given one on.
    ///
    /// # Errors
    /// When shapes do not fit together, or a λ or the scale is not finite. Then nothing is written.
    pub fn forward(
        &self,
        output: &mut TensorViewMut<'_>,
        map: Option<(&mut TensorViewMut<'_>, usize)>,
    ) -> Result<()> {
        let [batch, queries, heads, dim] = self.query.shape();
        let keys = self.key.shape()[1];
        expect_shape("key", self.key.shape(), [batch, keys, heads, dim])?;
        expect_shape("value", self.value.shape(), [batch, keys, heads, dim])?;
        expect_shape("output", output.shape(), [batch, queries, heads, dim])?;
        if let Some(mask) = self.mask {
            expect_broadcast("mask", mask.shape(), [batch, queries, heads, keys])?;
        }
        if let Some(mask) = self.query_mask {
            expect_broadcast("query_mask", mask.shape(), [batch, queries, 1, 1])?;
        }
        if let Some((map, first)) = &map {
            let found = map.shape();
            expect_shape("attention_map", found, [batch, queries, found[2], keys])?;
            if first.checked_add(found[2]).is_none_or(|end| end > heads) {
                return Err(Error::argument(
                    "attention_map",
                    format!("some of {heads} heads"),
                    format!("{} heads from head {first} on", found[2]),
                ));
            }
        }
        let kernel = match self.kernel {
            None => Kernel::chosen()?,
            Some(kernel) if kernel.is_available() => kernel,
            Some(kernel) => {
                let expected = "a kernel that this processor has";
                return Err(Error::argument("kernel", expected, kernel.name()));
            }
        };
        let scale = self.scale.unwrap_or(1.0 / (dim as f32).sqrt());
        // A head of width 0 has scores of 0, whatever they are multiplied with.
        if !scale.is_finite() && dim > 0 {
            let found = scale.to_string();
            return Err(Error::argument("scale", "a finite number", found));
        }
        let strengths = Strengths::new(self.strength, batch)?;
        let aes_value = self
            .aes_value
            .map(|v| fit_aes_value(v, batch, keys, heads, dim))
            .transpose()?;
        if [batch, queries, heads].contains(&0) || dim == 0 && map.is_none() {
            return Ok(());
        }
        if keys == 0 || dim == 0 {
            let found = format!("{keys} keys, heads of width {dim}");
            return Err(Error::argument(
                "key",
                "at least one key and a width",
                found,
            ));
        }

        let checked = Checked {
            query: self.query,
            key: self.key,
            value: self.value,
            aes_value,
            strengths,
            scale,
            mask: self.mask,
            query_mask: self.query_mask,
            keys,
        };
        if kernel == Kernel::Plain {
            return plain::forward(&checked, output, map);
        }
        let map = map.map(|(map, first)| (map.raw_rows(), first));
        let map = map.as_ref().map(|(map, first)| (map, *first));
        let engine = Engine::new(kernel, keys, dim);
        blocks::forward(&checked, &engine, &output.raw_rows(), map)
    }
}

/// Arguments that fit together, none of them empty.
struct Checked<'a> {
    query: TensorView<'a>,
    key: TensorView<'a>,
    value: TensorView<'a>,
    /// `[1 or B, C, H, D]`
    aes_value: Option<TensorView<'a>>,
    strengths: Strengths<'a>,
    scale: f32,
    mask: Option<TensorView<'a>>,
    query_mask: Option<TensorView<'a>>,
    keys: usize,
}

impl<'a> Checked<'a> {
    fn dim(&self) -> usize {
        self.query.shape()[3]
    }

    /// Whether a query has a strength of its own, which cannot be folded into the values.
    fn is_regional(&self) -> bool {
        self.aes_value.is_some() && self.query_mask.is_some()
    }

    /// V_a and λ of a batch entry, unless λ is 0.
    fn aes_value_of(&self, b: usize) -> Option<(TensorView<'a>, f32)> {
        let strength = self.strengths.of(b);
        self.aes_value
            .map(|v_a| (v_a, strength))
            .filter(|_| strength != 0.0)
    }
}

/// softmax(Q·Kᵀ/√d)·(V_c + λ·V_a) of dense tensors, computed in f32 and rounded to Q's dtype.
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
    let view = |argument: &'static str, tensor| split_heads(argument, tensor, heads);
    let query_view = view("query", query)?;
    let mut attention = Attention::new(query_view, view("key", key)?, view("value", value)?);
    let &[tokens, width] = aes_value.shape() else {
        let expected = "shape [context tokens, heads · head dim]";
        return Err(Error::argument("aes_value", expected, shape_of(aes_value)));
    };
    let aes_value = TensorView::dense("aes_value", aes_value, [1, tokens, 1, width])?;
    attention.aes_value = Some(aes_value);
    attention.strength = std::slice::from_ref(&strength);
    if query.bytes().is_empty() {
        let expected = "at least one row and one query";
        return Err(Error::argument("query", expected, shape_of(query)));
    }
    let mut out = zeros(query.bytes().len() / query.dtype().size())?;
    let mut output = TensorViewMut::dense(&mut out, query_view.shape());
    attention.forward(&mut output, None)?;
    Ok(Tensor::rounded(query.shape(), out, query.dtype()))
}

fn split_heads<'a>(argument: &str, tensor: &'a Tensor, heads: usize) -> Result<TensorView<'a>> {
    let &[batch, tokens, width] = tensor.shape() else {
        let expected = "shape [batch, tokens, heads · head dim]";
        return Err(Error::argument(argument, expected, shape_of(tensor)));
    };
    if heads == 0 || width == 0 || !width.is_multiple_of(heads) {
        let expected = format!("a divisor of the width {width} of {argument}");
        return Err(Error::argument("heads", expected, heads.to_string()));
    }
    TensorView::dense(argument, tensor, [batch, tokens, heads, width / heads])
}

/// λ of every batch entry.
struct Strengths<'a>(&'a [f32]);

impl<'a> Strengths<'a> {
    fn new(strength: &'a [f32], batch: usize) -> Result<Self> {
        if strength.len() != 1 && strength.len() != batch {
            let expected = match batch {
                0 | 1 => "1 number".to_owned(),
                _ => format!("1 number, or {batch}, one per batch entry"),
            };
            let found = strength.len().to_string();
            return Err(Error::argument("strength", expected, found));
        }
        match strength.iter().find(|x| !x.is_finite()) {
            None => Ok(Self(strength)),
            Some(x) => Err(Error::argument("strength", "finite numbers", x.to_string())),
        }
    }

    fn of(&self, batch_entry: usize) -> f32 {
        self.0[batch_entry % self.0.len()]
    }
}

/// V_a with the heads of the values it is added to.
fn fit_aes_value<'a>(
    aes_value: TensorView<'a>,
    batch: usize,
    keys: usize,
    heads: usize,
    dim: usize,
) -> Result<TensorView<'a>> {
    const NAME: &str = "aes_value";
    let view = aes_value.with_heads(NAME, heads, dim)?;
    let [entries, tokens, ..] = view.shape();
    if entries != 1 && entries != batch {
        let expected = format!("1 batch entry, or {batch}");
        return Err(Error::argument(NAME, expected, entries.to_string()));
    }
    if tokens == 0 || !keys.is_multiple_of(tokens) {
        let expected = format!("a multiple of the {tokens} tokens of aes_value");
        return Err(Error::argument(
            "number of keys",
            expected,
            keys.to_string(),
        ));
    }
    Ok(view)
}

fn expect_shape(argument: &str, found: [usize; 4], expected: [usize; 4]) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let (expected, found) = (format!("shape {expected:?}"), format!("shape {found:?}"));
    Err(Error::argument(argument, expected, found))
}

fn expect_broadcast(argument: &str, found: [usize; 4], full: [usize; 4]) -> Result<()> {
    if (0..4).all(|i| found[i] == full[i] || found[i] == 1) {
        return Ok(());
    }
    let expected = format!("shape {full:?}, or 1 where it does not vary");
    Err(Error::argument(
        argument,
        expected,
        format!("shape {found:?}"),
    ))
}

/// Zeros, or an error where there is not so much memory.
fn zeros(count: usize) -> Result<Vec<f32>> {
    let mut data = reserve(count)?;
    data.resize(count, 0.0);
    Ok(data)
}

fn reserve(count: usize) -> Result<Vec<f32>> {
    let mut data = Vec::new();
    match data.try_reserve_exact(count) {
        Ok(()) => Ok(data),
        Err(_) => Err(Error::OutOfMemory {
            bytes: count.saturating_mul(size_of::<f32>()),
        }),
    }
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
                "query: expected shape [batch, tokens",
            ),
            (
                error(&q, &k, &q, &a, 1.0, 2),
                "value: expected shape [1, 6, 2, 2], found shape [1, 2, 2, 2]",
            ),
            (
                error(&q, &k, &k, &q, 1.0, 2),
                "aes_value: expected shape [context tokens",
            ),
            (
                error(&q, &k, &k, &a, 1.0, 3),
                "heads: expected a divisor of the width 4 of query",
            ),
            (
                error(&q, &k, &k, &a, f32::NAN, 2),
                "strength: expected finite numbers, found NaN",
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
