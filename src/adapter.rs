//! Adapters: value rows for any choice of label weights.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use crate::{
    ApplyTo, Base, CoefficientKind, DType, Error, Kind, LabelKey, Labels, Layers, Result, Row,
    Selection, Tensor, Values,
    coefficients::{Coefficients, Scaling},
    file::{self, File},
    metadata::{Common, Made, one_of, read_apply_to, read_feature_width, read_json, read_layers},
    rows::Product,
    threads,
    values::{LayerValues, Origin},
};

/// Suffix of a layer's rows in files, after its diffusers path.
pub(crate) const ROWS: &str = ".rows";
pub(crate) const AES_EMB: &str = "aes_emb";
pub(crate) const CONTEXT_ROWS: &str = "context.rows";
pub(crate) const PROFILE: &str = "profile";
pub(crate) const GRAM_FACTOR: &str = "gram_factor";
pub(crate) const ATTENTION: &str = "attention";

/// A VMix adapter. It is read whole and checked when it is opened. Cheap to clone, and usable from many
/// threads at once.
#[derive(Debug, Clone)]
pub struct Adapter(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    file: Arc<File>,
    common: Common,
    apply_to: ApplyTo,
    layers: Layers,
    coefficients: Coefficients,
    /// B \[R, inner_dim\] of every layer.
    rows: Vec<Arc<Tensor>>,
    /// d, where the file says it.
    context_dim: Option<usize>,
    /// \[N, 2, d\]: positive and negative feature of every label (paper, eq. 4).
    aes_emb: Option<Vec<f32>>,
    /// \[R, d\]: f_a = A·context.rows.
    context_rows: Option<Tensor>,
}

impl Adapter {
    /// Reads and checks an adapter file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::read(File::read(path.as_ref())?)
    }

    /// Opens an adapter that is already in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self> {
        Self::read(File::from_bytes(bytes)?)
    }

    /// Makes an adapter from its parts, named and shaped as in a file (`docs/format.md`).
    pub fn from_tensors(
        tensors: &BTreeMap<String, Tensor>,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self> {
        let pairs = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
        Self::read(File::named("tensors", file::serialize(pairs, metadata)?)?)
    }

    pub(crate) fn read(file: File) -> Result<Self> {
        let common = Common::read(&file, Kind::Adapter)?;
        let apply_to = read_apply_to(&file)?;
        Made::check(&file)?;
        let kind = one_of(
            &file,
            "vmix.coefficients",
            CoefficientKind::NAMES,
            CoefficientKind::from_name,
        )?;
        let rows = read_sides(&file, &common.labels, kind)?;
        let (tokens, count) = (common.context_tokens, rows.len());
        let layers = read_layers(&file, common.base, |layer| {
            let expected = format!("shape [{count}, inner_dim]");
            file.width(&format!("{layer}{ROWS}"), 1, &expected)
        })?;
        let context_dim = match file.has_tensor(AES_EMB) {
            true => Some(read_feature_width(&file, common.base, common.labels.len())?),
            false => common.base.context_dim(),
        };
        check_size(&file, tokens, count, context_dim.unwrap_or(0), &layers)?;

        let profile = file.f32_tensor(PROFILE, &[tokens, count])?;
        let aes_emb = |d| file.small_tensor(AES_EMB, &[common.labels.len(), 2, d]);
        let (scaling, aes_emb, context_rows) = match kind {
            CoefficientKind::LayerNorm => {
                let normed = rows.iter().filter(|row| **row != Row::Constant).count();
                let scaling = Scaling::LayerNorm {
                    eps: read_eps(&file)?,
                    factor: read_factor(&file, normed)?,
                };
                let d = context_dim.ok_or_else(|| {
                    let expected = format!("shape [{}, 2, d]", common.labels.len());
                    file.tensor_error(AES_EMB, expected, "no such tensor")
                })?;
                let aes_emb = aes_emb(d)?;
                let shape = [count, d];
                let context_rows = file.small_tensor(CONTEXT_ROWS, &shape)?;
                let context_rows = Tensor::rounded(shape, context_rows, DType::F32);
                (scaling, Some(aes_emb), Some(context_rows))
            }
            CoefficientKind::Linear => {
                let present = file.has_tensor(AES_EMB).then_some(context_dim).flatten();
                (Scaling::Linear, present.map(aes_emb).transpose()?, None)
            }
        };
        if file.has_tensor(ATTENTION) {
            check_attention(&file, tokens)?;
        }
        let mut dtype = None;
        let layer_rows = layers.iter().map(|layer| {
            let name = format!("{}{ROWS}", layer.name);
            let tensor = file.finite_tensor(&name, &[count, layer.inner_dim], dtype)?;
            dtype = Some(tensor.dtype());
            Ok(Arc::new(tensor))
        });
        let layer_rows = layer_rows.collect::<Result<_>>()?;
        file.refuse_other_tensors(|name| match name {
            PROFILE | AES_EMB | ATTENTION => true,
            GRAM_FACTOR | CONTEXT_ROWS => kind == CoefficientKind::LayerNorm,
            name => name
                .strip_suffix(ROWS)
                .is_some_and(|layer| layers.get(layer).is_ok_and(|known| known.name == layer)),
        })?;
        Ok(Self(Arc::new(Inner {
            file: Arc::new(file),
            common,
            apply_to,
            layers,
            coefficients: Coefficients {
                rows,
                profile,
                scaling,
            },
            rows: layer_rows,
            context_dim,
            aes_emb,
            context_rows,
        })))
    }

    pub(crate) fn file(&self) -> &File {
        &self.0.file
    }

    pub(crate) fn parts(&self) -> &Coefficients {
        &self.0.coefficients
    }

    /// Writes the adapter, whole or not at all. Equal adapters give equal bytes.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        file::write_atomically(path.as_ref(), self.0.file.bytes())
    }

    /// The kind of U-Net it was made for.
    pub fn base(&self) -> Base {
        self.0.common.base
    }

    /// The labels, in the order of the file.
    pub fn labels(&self) -> &Labels {
        &self.0.common.labels
    }

    /// The cross-attention layers it has rows for, down to up.
    pub fn layers(&self) -> &Layers {
        &self.0.layers
    }

    /// C, the tokens of one chunk of context.
    pub fn context_tokens(&self) -> usize {
        self.0.common.context_tokens
    }

    /// d, the width of the context, where the base or the file says it.
    pub fn context_dim(&self) -> Option<usize> {
        self.0.context_dim
    }

    /// What the adapter was made to be applied to; the default of every host.
    pub fn apply_to(&self) -> ApplyTo {
        self.0.apply_to
    }

    /// How weights become coefficients.
    pub fn coefficient_kind(&self) -> CoefficientKind {
        self.0.coefficients.kind()
    }

    /// Label and side of every row.
    pub fn row_sides(&self) -> &[Row] {
        &self.0.coefficients.rows
    }

    /// Element type of the rows.
    pub fn dtype(&self) -> DType {
        self.0.rows[0].dtype()
    }

    /// Every metadata key of the file.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        self.0.file.metadata()
    }

    /// Every tensor of the file, as [`Adapter::from_tensors`] takes them.
    pub fn tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        let file = &self.0.file;
        file.tensor_names()
            .map(|name| Ok((name.to_owned(), file.tensor(name)?.to_tensor())))
            .collect()
    }

    /// B \[R, inner_dim\] of the layer with this diffusers or LDM name, in the file's dtype.
    pub fn rows(&self, layer: &str) -> Result<&Arc<Tensor>> {
        Ok(&self.0.rows[self.0.layers.index(layer)?])
    }

    /// The weight of every label. [`Selection::All`] is refused where coefficients are linear: such
    /// labels are fitted one by one, and all of them at once are a look that nobody asked for.
    pub fn weights(&self, selection: &Selection) -> Result<Vec<f32>> {
        let kind = self.coefficient_kind();
        if (selection, kind) == (&Selection::All, CoefficientKind::Linear) {
            let names: Vec<&str> = self.labels().iter().map(|l| l.name.as_str()).collect();
            let expected = format!("names of fitted labels ({})", names.join(", "));
            return Err(Error::argument("selection", expected, "`all`"));
        }
        self.labels().weights(selection)
    }

    /// The weight of every label in the opposite of a selection, which [`ApplyTo::Contrast`] mixes
    /// into the unconditional pass.
    pub fn opposite(&self, selection: &Selection) -> Result<Vec<f32>> {
        self.labels().opposite(&self.weights(selection)?)
    }

    /// A \[C, R\] of a selection, in f32: V_a = A·B.
    pub fn coefficients(&self, selection: &Selection) -> Result<Tensor> {
        let weights = self.weights(selection)?;
        let shape = [self.context_tokens(), self.count()];
        let a = self.0.coefficients.of(&weights, self.labels())?;
        Ok(Tensor::rounded(shape, a, DType::F32))
    }

    /// A \[batch, C, R\] of a selection for every image of a batch, in f32.
    pub fn batch_coefficients(&self, selections: &[Selection]) -> Result<Tensor> {
        let shape = [selections.len(), self.context_tokens(), self.count()];
        let len = shape.into_iter().fold(1, usize::saturating_mul);
        let mut batch = Vec::new();
        if batch.try_reserve_exact(len).is_err() {
            let bytes = len.saturating_mul(size_of::<f32>());
            return Err(Error::OutOfMemory { bytes });
        }
        for selection in selections {
            let weights = self.weights(selection)?;
            batch.extend(self.0.coefficients.of(&weights, self.labels())?);
        }
        Ok(Tensor::rounded(shape, batch, DType::F32))
    }

    /// f_t \[N, d\]: the features of a selection, looked up in AesEmb (paper, section 3.3). `None` where
    /// the file has no AesEmb.
    pub fn aes_embed(&self, selection: &Selection) -> Result<Option<Tensor>> {
        let weights = self.weights(selection)?;
        let (Some(aes_emb), Some(d)) = (&self.0.aes_emb, self.0.context_dim) else {
            return Ok(None);
        };
        let pairs = aes_emb.chunks_exact(2 * d).zip(&weights);
        let kind = self.coefficient_kind();
        // Positive and negative come out exactly as AesEmb holds them.
        let f_t = pairs.flat_map(|(pair, &w)| {
            let (positive, negative) = pair.split_at(d);
            let both = positive.iter().zip(negative);
            // How far it is from the negative, at 0, to the positive, at 1.
            let place = match kind {
                CoefficientKind::LayerNorm => w,
                CoefficientKind::Linear => (1.0 + w) / 2.0,
            };
            both.map(move |(t, t_hat)| (1.0 - place) * t_hat + place * t)
        });
        let f_t = Tensor::rounded([weights.len(), d], f_t.collect(), DType::F32);
        match f_t.is_finite() {
            true => Ok(Some(f_t)),
            false => Err(self.overflow("f_t", DType::F32, &weights)),
        }
    }

    /// f_a \[C, d\]: the aesthetic context of a selection (paper, eq. 6). `None` for linear adapters,
    /// which have none.
    pub fn project(&self, selection: &Selection) -> Result<Option<Tensor>> {
        let weights = self.weights(selection)?;
        let Some(context_rows) = &self.0.context_rows else {
            return Ok(None);
        };
        let a = self.0.coefficients.of(&weights, self.labels())?;
        let product = Product::new(&a, self.count());
        let f_a = product.times(context_rows, DType::F32);
        f_a.map(Some)
            .map_err(|_| self.overflow("f_a", DType::F32, &weights))
    }

    /// V_a \[C, inner_dim\] of every layer for a selection (paper, eq. 7), summed in f32 and rounded to
    /// `dtype`. With [`ApplyTo::Contrast`] also that of the opposite selection.
    pub fn values(&self, selection: &Selection, apply_to: ApplyTo, dtype: DType) -> Result<Values> {
        let inner = &*self.0;
        let weights = self.weights(selection)?;
        let opposite = match apply_to {
            ApplyTo::Contrast => Some(self.opposite(selection)?),
            ApplyTo::Cond | ApplyTo::Both => None,
        };
        let product = |weights: &Vec<f32>| -> Result<Product> {
            let a = inner.coefficients.of(weights, self.labels())?;
            Ok(Product::new(&a, self.count()))
        };
        let cond = product(&weights)?;
        let uncond = opposite.as_ref().map(product).transpose()?;
        let tensors = threads::try_map(&inner.layers, |layer| -> Result<LayerValues> {
            let rows = self.rows(&layer.name)?;
            let times = |product: &Product, weights: &Vec<f32>| {
                let values = product.times(rows, dtype).map(Arc::new);
                values
                    .map_err(|_| self.overflow(&format!("layer `{}`", layer.name), dtype, weights))
            };
            let uncond = uncond.as_ref().zip(opposite.as_ref());
            Ok(LayerValues {
                cond: times(&cond, &weights)?,
                uncond: uncond.map(|(product, w)| times(product, w)).transpose()?,
            })
        })?;
        Ok(Values::new(
            inner.common.clone(),
            apply_to,
            inner.layers.clone(),
            weights,
            Origin::File(inner.file.clone()),
            self.inherited_metadata(),
            tensors,
        ))
    }

    fn count(&self) -> usize {
        self.0.coefficients.rows.len()
    }

    fn overflow(&self, what: &str, dtype: DType, weights: &[f32]) -> Error {
        Error::argument(
            what,
            format!("values that {dtype} can hold"),
            format!("more: {}", self.labels().furthest(weights)),
        )
    }

    /// What a preset keeps of its adapter's metadata: licence, author, how it was made.
    fn inherited_metadata(&self) -> BTreeMap<String, String> {
        self.metadata()
            .iter()
            .filter(|(key, _)| key.starts_with("modelspec.") || *key == Made::KEY)
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    }
}

/// `vmix.rows`.
fn read_sides(file: &File, labels: &Labels, kind: CoefficientKind) -> Result<Vec<Row>> {
    const KEY: &str = "vmix.rows";
    // With a flattened part serde takes an entry from an object alone, and not also from a list.
    #[derive(serde::Deserialize)]
    struct Entry {
        #[serde(default)]
        label: Option<String>,
        side: String,
        #[serde(flatten)]
        _other: BTreeMap<String, serde::de::IgnoredAny>,
    }
    let expected = "a JSON list with `side` and `label` of every row";
    let refuse = |found: String| file.meta_error(KEY, expected, found);
    let entries: Vec<Entry> = read_json(file, KEY, expected)?;
    if entries.is_empty() {
        return Err(refuse("an empty list".into()));
    }
    let position = |label: Option<String>, side: &str| -> Result<usize> {
        let label = label.ok_or_else(|| refuse(format!("a {side} row without a label")))?;
        let unknown = |_| refuse(format!("the label `{label}`, which is not in vmix.labels"));
        labels
            .index(&LabelKey::Name(label.clone()))
            .map_err(unknown)
    };
    let row = |Entry { label, side, .. }: Entry| match (side.as_str(), label) {
        ("positive", label) => Ok(Row::Positive(position(label, &side)?)),
        ("negative", label) => Ok(Row::Negative(position(label, &side)?)),
        ("constant", Some(label)) => {
            Err(refuse(format!("a constant row with the label `{label}`")))
        }
        ("constant", None) if kind == CoefficientKind::LayerNorm => Ok(Row::Constant),
        ("constant", None) => Err(refuse("a constant row in a linear file".into())),
        _ => {
            let expected = "sides among positive, negative, constant";
            Err(file.meta_error(KEY, expected, format!("`{side}`")))
        }
    };
    let rows: Vec<Row> = entries.into_iter().map(row).collect::<Result<_>>()?;
    let mut has_row = vec![false; labels.len()];
    rows.iter()
        .filter_map(|row| row.label())
        .for_each(|label| has_row[label] = true);
    for (label, has_row) in labels.iter().zip(has_row) {
        if !has_row {
            return Err(refuse(format!("no row of label `{}`", label.name)));
        }
        if kind == CoefficientKind::Linear && label.neutral != Some(0.0) {
            let found = label.neutral.map_or("null".into(), |w| w.to_string());
            let found = format!("{found} for label `{}`", label.name);
            return Err(file.meta_error("vmix.labels", "`neutral` 0 in a linear file", found));
        }
    }
    Ok(rows)
}

fn read_eps(file: &File) -> Result<f64> {
    file.parse_meta("vmix.norm_eps", "a number above 0", |v| {
        v.parse()
            .ok()
            .filter(|eps: &f64| *eps > 0.0 && eps.is_finite())
    })
}

fn read_factor(file: &File, rows: usize) -> Result<Vec<f32>> {
    let m = file.width(GRAM_FACTOR, 1, &format!("shape [{rows}, m]"))?;
    file.f32_tensor(GRAM_FACTOR, &[rows, m])
}

fn check_attention(file: &File, tokens: usize) -> Result<()> {
    let attention = file.f32_tensor(ATTENTION, &[tokens, tokens])?;
    if let Some(negative) = attention.iter().find(|x| **x < 0.0) {
        let found = negative.to_string();
        return Err(file.tensor_error(ATTENTION, "entries that are not negative", found));
    }
    let sum: f64 = attention.iter().map(|&x| f64::from(x)).sum();
    // What a mean of many f32 maps may lack.
    if (sum - 1.0).abs() > 1e-3 {
        let found = format!("the sum {sum}");
        return Err(file.tensor_error(ATTENTION, "entries that add up to 1", found));
    }
    Ok(())
}

/// Numbers that A, f_a and V_a of all layers may have together: 40 times those of SDXL.
const MAX_RESULT: usize = 1 << 28;

/// Refuses small files that ask for huge results, before anything is allocated.
pub(crate) fn check_size(
    file: &File,
    tokens: usize,
    rows: usize,
    d: usize,
    layers: &Layers,
) -> Result<()> {
    let widths = layers.iter().map(|layer| layer.inner_dim);
    let total = widths
        .chain([rows, d])
        .try_fold(0usize, usize::checked_add)
        .and_then(|width| width.checked_mul(tokens));
    match total {
        Some(total) if total <= MAX_RESULT => Ok(()),
        _ => Err(file.meta_error(
            "vmix.context_tokens",
            format!("at most {MAX_RESULT} numbers in the values of all layers"),
            format!("more, with {tokens} tokens"),
        )),
    }
}
