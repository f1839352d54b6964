//! From the paper's matrices to rows (`docs/format.md`, "Why this is exact").

use std::collections::BTreeMap;

use crate::{
    Adapter, CoefficientKind, DType, Error, Kind, Labels, Layer, Layers, Result, Row, Tensor,
    adapter::{AES_EMB, CONTEXT_ROWS, GRAM_FACTOR, PROFILE, ROWS, check_size},
    file::{self, File},
    metadata::{Common, FORMAT, Made, read_feature_width, read_layers},
    threads,
};

const VALUE_WEIGHT: &str = ".to_v_aes.weight";
const LINEAR: &str = "projection.linear.weight";
const LINEAR_BIAS: &str = "projection.linear.bias";
const NORM: &str = "projection.norm.weight";
const NORM_BIAS: &str = "projection.norm.bias";
const ZERO: &str = "projection.zero.weight";
const ZERO_BIAS: &str = "projection.zero.bias";

impl Adapter {
    /// Makes an adapter from the matrices that the paper trains, computed in f64 and rounded to `dtype`.
    ///
    /// | tensor | shape | |
    /// |---|---|---|
    /// | `aes_emb` | \[N, 2, d\] | AesEmb (paper, eq. 4) |
    /// | `projection.linear.weight`, `projection.linear.bias` | \[C, N\], \[C\] | F; the bias is optional and has no effect |
    /// | `projection.norm.weight`, `projection.norm.bias` | \[d\] | the LayerNorm of F |
    /// | `projection.zero.weight`, `projection.zero.bias` | \[d, d\], \[d\] | Z |
    /// | `<layer>.to_v_aes.weight` | \[inner_dim, d\] | W_Va of every layer |
    ///
    /// `metadata` is that of the adapter (`docs/format.md`), of which `vmix.format`, `vmix.kind`,
    /// `vmix.rows` and `vmix.coefficients` are set here.
    pub fn from_matrices(
        tensors: &BTreeMap<String, Tensor>,
        metadata: &BTreeMap<String, String>,
        dtype: DType,
    ) -> Result<Self> {
        let mut metadata = metadata.clone();
        metadata.insert("vmix.format".to_owned(), FORMAT.to_owned());
        metadata.insert("vmix.kind".to_owned(), Kind::Adapter.to_string());
        let layernorm = CoefficientKind::LayerNorm.to_string();
        metadata.insert("vmix.coefficients".to_owned(), layernorm);
        let pairs = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
        let matrices =
            Matrices::read(File::named("matrices", file::serialize(pairs, &metadata)?)?)?;
        metadata.insert("vmix.rows".to_owned(), matrices.sides());
        Self::from_tensors(&matrices.tensors(dtype)?, &metadata)
    }
}

/// The matrices of one adapter, checked.
struct Matrices {
    file: File,
    labels: Labels,
    layers: Layers,
    tokens: usize,
    d: usize,
}

impl Matrices {
    fn read(file: File) -> Result<Self> {
        let common = Common::read(&file, Kind::Adapter)?;
        Made::check(&file)?;
        let layers = read_layers(&file, common.base, |layer| {
            let name = format!("{layer}{VALUE_WEIGHT}");
            file.width(&name, 0, "shape [inner_dim, d]")
        })?;
        let (labels, tokens) = (common.labels, common.context_tokens);
        let d = read_feature_width(&file, common.base, labels.len())?;
        check_size(&file, tokens, 2 * labels.len() + 1, d, &layers)?;
        if file.has_tensor(LINEAR_BIAS) {
            file.small_tensor(LINEAR_BIAS, &[tokens])?;
        }
        let known = [
            AES_EMB,
            LINEAR,
            LINEAR_BIAS,
            NORM,
            NORM_BIAS,
            ZERO,
            ZERO_BIAS,
        ];
        file.refuse_other_tensors(|name| {
            let layer = name.strip_suffix(VALUE_WEIGHT);
            known.contains(&name)
                || layer.is_some_and(|name| layers.get(name).is_ok_and(|l| l.name == name))
        })?;
        Ok(Self {
            file,
            labels,
            layers,
            tokens,
            d,
        })
    }

    /// R: two rows of every label, and the constant one.
    fn rows(&self) -> usize {
        2 * self.labels.len() + 1
    }

    /// `vmix.rows`
    fn sides(&self) -> String {
        let sides = self.labels.iter().enumerate().flat_map(|(i, label)| {
            [Row::Positive(i), Row::Negative(i)]
                .map(|row| serde_json::json!({"label": label.name, "side": row.side()}))
        });
        let constant = serde_json::json!({"side": Row::Constant.side()});
        let rows: Vec<_> = sides.chain([constant]).collect();
        serde_json::to_string(&rows).expect("strings")
    }

    fn read_f64(&self, name: &str, shape: &[usize]) -> Result<Vec<f64>> {
        let numbers = self.file.small_tensor(name, shape)?;
        Ok(numbers.into_iter().map(f64::from).collect())
    }

    fn tensors(&self, dtype: DType) -> Result<BTreeMap<String, Tensor>> {
        let (n, c, d, rows) = (self.labels.len(), self.tokens, self.d, self.rows());
        let linear = self.file.small_tensor(LINEAR, &[c, n])?;
        let profile = linear.chunks_exact(n).flat_map(|factors| {
            let both = factors.iter().flat_map(|&factor| [factor, factor]);
            both.chain([1.0])
        });
        let profile = Tensor::rounded([c, rows], profile.collect(), DType::F32);

        let features = self.centred()?;
        let factor = gram_factor(&features, d);
        let m = factor.len() / (2 * n);
        let factor = Tensor::rounded([2 * n, m], narrowed(&factor), DType::F32);
        let context_rows = self.context_rows(features)?;
        let value_rows = threads::try_map(&self.layers, |layer| {
            self.value_rows(layer, &context_rows, dtype)
        })?;

        let aes_emb = self.file.tensor(AES_EMB)?.to_tensor();
        let f_a = Tensor::rounded([rows, d], narrowed(&context_rows), DType::F32);
        let mut tensors = BTreeMap::from([
            (PROFILE.to_owned(), profile),
            (GRAM_FACTOR.to_owned(), factor),
            (AES_EMB.to_owned(), aes_emb),
            (CONTEXT_ROWS.to_owned(), f_a),
        ]);
        for (layer, rows) in self.layers.iter().zip(value_rows) {
            tensors.insert(format!("{}{ROWS}", layer.name), rows);
        }
        Ok(tensors)
    }

    /// t̄ \[2N, d\]: every feature less its own mean.
    fn centred(&self) -> Result<Vec<f64>> {
        let mut features = self.read_f64(AES_EMB, &[self.labels.len(), 2, self.d])?;
        for feature in features.chunks_exact_mut(self.d) {
            let mean = feature.iter().sum::<f64>() / self.d as f64;
            feature.iter_mut().for_each(|x| *x -= mean);
        }
        Ok(features)
    }

    /// \[R, d\]: Z·(γ⊙t̄) of every feature, and Z·β + b_Z.
    fn context_rows(&self, mut features: Vec<f64>) -> Result<Vec<f64>> {
        let d = self.d;
        let gamma = self.read_f64(NORM, &[d])?;
        for feature in features.chunks_exact_mut(d) {
            feature.iter_mut().zip(&gamma).for_each(|(x, g)| *x *= g);
        }
        features.extend(self.read_f64(NORM_BIAS, &[d])?);
        let zero = self.file.small_tensor(ZERO, &[d, d])?;
        let mut rows = times_transposed(&features, &zero, d);
        let constant = rows.len() - d;
        let bias = self.read_f64(ZERO_BIAS, &[d])?;
        rows[constant..]
            .iter_mut()
            .zip(&bias)
            .for_each(|(x, b)| *x += b);
        Ok(rows)
    }

    /// W_Va·row \[R, inner_dim\] of one layer.
    fn value_rows(&self, layer: &Layer, context_rows: &[f64], dtype: DType) -> Result<Tensor> {
        let name = format!("{}{VALUE_WEIGHT}", layer.name);
        let weight = self.file.small_tensor(&name, &[layer.inner_dim, self.d])?;
        let rows = times_transposed(context_rows, &weight, self.d);
        let tensor = Tensor::rounded([self.rows(), layer.inner_dim], narrowed(&rows), dtype);
        if tensor.is_finite() {
            return Ok(tensor);
        }
        Err(Error::argument(
            format!("layer `{}`", layer.name),
            format!("rows that {dtype} can hold"),
            "more",
        ))
    }
}

/// L \[K, m\] with L·Lᵀ = t̄·t̄ᵀ/d: every feature in an orthonormal basis of them all.
///
/// Rounding L to f32 costs no more than rounding the features. The matrix t̄·t̄ᵀ/d in f32 would lose the
/// small variances of features that cancel each other.
fn gram_factor(features: &[f64], d: usize) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(x, y)| x * y).sum() };
    let scale = (d as f64).sqrt().recip();
    let mut basis: Vec<Vec<f64>> = Vec::new();
    let rows: Vec<Vec<f64>> = features
        .chunks_exact(d)
        .map(|feature| {
            let mut rest: Vec<f64> = feature.iter().map(|x| x * scale).collect();
            let whole = dot(&rest, &rest).sqrt();
            let mut row = vec![0.0; basis.len()];
            // The second time removes what rounding left over in the first.
            for _ in 0..2 {
                for (entry, axis) in row.iter_mut().zip(&basis) {
                    let along = dot(&rest, axis);
                    rest.iter_mut().zip(axis).for_each(|(x, a)| *x -= along * a);
                    *entry += along;
                }
            }
            let length = dot(&rest, &rest).sqrt();
            // Anything shorter is rounding: features in f32 differ by more.
            if length > 1e-13 * whole {
                rest.iter_mut().for_each(|x| *x /= length);
                basis.push(rest);
                row.push(length);
            }
            row
        })
        .collect();
    let m = basis.len().max(1);
    rows.into_iter()
        .flat_map(|mut row| {
            row.resize(m, 0.0);
            row
        })
        .collect()
}

/// Rows whose sums grow together, in registers.
const TOGETHER: usize = 8;

/// rows·Wᵀ \[m, n\] in f64 of rows \[m, d\] and W \[n, d\].
fn times_transposed(rows: &[f64], weight: &[f32], d: usize) -> Vec<f64> {
    let n = weight.len() / d;
    let mut out = vec![0.0; rows.len() / d * n];
    for (group, rows) in rows.chunks(TOGETHER * d).enumerate() {
        // Side by side: what all of them have at one place of d.
        let mut across = vec![[0.0; TOGETHER]; d];
        for (r, row) in rows.chunks_exact(d).enumerate() {
            across.iter_mut().zip(row).for_each(|(to, x)| to[r] = *x);
        }
        for (j, weights) in weight.chunks_exact(d).enumerate() {
            let mut sums = [0.0; TOGETHER];
            for (w, column) in weights.iter().zip(&across) {
                for i in 0..TOGETHER {
                    sums[i] += f64::from(*w) * column[i];
                }
            }
            for (r, sum) in sums.iter().take(rows.len() / d).enumerate() {
                out[(group * TOGETHER + r) * n + j] = *sum;
            }
        }
    }
    out
}

fn narrowed(numbers: &[f64]) -> Vec<f32> {
    numbers.iter().map(|&x| x as f32).collect()
}
