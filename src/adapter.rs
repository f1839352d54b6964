//! Adapters: AesEmb, the projection and the value weights of one file.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use crate::{
    ApplyTo, Base, Checkpoint, DType, Error, Kind, Labels, Layer, Layers, ProjectionKind, Result,
    Selection, Tensor, ValueWeights, Values,
    file::{self, File},
    metadata::{Common, expect_of_base, layer_map, one_of},
    product::Rows,
    projection::{Projection, Sizes, select},
    threads,
    values::{self, LayerValues, Origin},
};

/// Suffix of a layer's value weights in files, after its diffusers path.
pub(crate) const VALUE_WEIGHT: &str = ".to_v_aes.weight";
const AES_EMB: &str = "aes_emb";

/// A VMix adapter, open for reading. Cheap to clone, and usable from many threads at once.
#[derive(Debug, Clone)]
pub struct Adapter(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    file: Arc<File>,
    common: Common,
    layers: Layers,
    sizes: Sizes,
    /// [N, 2, d]: positive and negative feature of every label (paper, eq. 4).
    aes_emb: Vec<f32>,
    projection: Projection,
    projection_kind: ProjectionKind,
    value_weights: ValueWeights,
}

impl Adapter {
    /// Opens a file by mapping it: the header and the small tensors are read and checked, the
    /// value weights (most of the file) when they are first used.
    ///
    /// The file must not be truncated or rewritten in place while it is open; replacing it, as
    /// [`Adapter::save`] does, is safe.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::read(File::open(path.as_ref())?)
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
        let tensors = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
        Self::from_bytes(file::serialize(tensors, metadata)?)
    }

    pub(crate) fn read(file: File) -> Result<Self> {
        let common = Common::read(&file, Kind::Adapter)?;
        file.parse_meta("vmix.feature", "`context_eot`", |v| {
            (v == "context_eot").then_some(())
        })?;
        file.meta("vmix.trained", "how it was trained, or `no`")?;
        let projection_kind = one_of(
            &file,
            "vmix.projection",
            ProjectionKind::NAMES,
            ProjectionKind::from_name,
        )?;
        let value_weights = one_of(
            &file,
            "vmix.value_weights",
            ValueWeights::NAMES,
            ValueWeights::from_name,
        )?;

        // The width is taken from AesEmb, whose size the file's own length vouches for.
        let labels = common.labels.len();
        let aes_emb = file.tensor(AES_EMB)?;
        let &[_, _, dim] = aes_emb.shape else {
            let found = format!("shape {:?}", aes_emb.shape);
            return Err(file.tensor_error(AES_EMB, format!("shape [{labels}, 2, d]"), found));
        };
        let aes_emb = file.small_tensor(AES_EMB, &[labels, 2, dim])?;
        if dim == 0 {
            return Err(file.tensor_error(AES_EMB, "a width above 0", "0"));
        }
        file.parse_meta(
            "vmix.context_dim",
            &format!("`{dim}`, as in {AES_EMB}"),
            |v| (v.parse() == Ok(dim)).then_some(()),
        )?;
        expect_of_base(
            &file,
            common.base,
            "vmix.context_dim",
            common.base.context_dim(),
            dim,
        )?;
        let sizes = Sizes {
            labels,
            tokens: common.context_tokens,
            dim,
        };

        let (projection, projection_tensors) = match projection_kind {
            ProjectionKind::Learned => {
                let eps = file.parse_meta("vmix.norm_eps", "a number above 0", |v| {
                    v.parse()
                        .ok()
                        .filter(|eps: &f64| *eps > 0.0 && eps.is_finite())
                })?;
                let projection = Projection::read_learned(&file, sizes, eps)?;
                (projection, Projection::LEARNED_TENSORS)
            }
            ProjectionKind::Difference => (
                Projection::read_difference(&file, sizes)?,
                Projection::DIFFERENCE_TENSORS,
            ),
        };

        let layers = read_layers(&file, common.base, value_weights)?;
        check_result_size(&file, sizes, &layers)?;
        if value_weights == ValueWeights::Own {
            for layer in layers.iter() {
                file.tensor_of_shape(&value_weight(layer), &[layer.inner_dim, dim])?;
            }
        }
        file.refuse_other_tensors(|name| {
            name == AES_EMB
                || projection_tensors.contains(&name)
                || value_weights == ValueWeights::Own
                    && name.strip_suffix(VALUE_WEIGHT).is_some_and(|layer| {
                        layers.get(layer).is_ok_and(|known| known.name == layer)
                    })
        })?;
        Ok(Self(Arc::new(Inner {
            file: Arc::new(file),
            common,
            layers,
            sizes,
            aes_emb,
            projection,
            projection_kind,
            value_weights,
        })))
    }

    pub(crate) fn file(&self) -> &File {
        &self.0.file
    }

    /// Element type of its value weights, if it has any and they have one in common.
    pub fn dtype(&self) -> Option<DType> {
        let names = self.0.layers.iter().map(value_weight);
        let mut dtypes = names.map(|name| Some(self.0.file.tensor(&name).ok()?.dtype));
        let first = dtypes.next()?;
        dtypes.all(|dtype| dtype == first).then_some(first)?
    }

    /// Writes the adapter, whole or not at all. Equal adapters give equal bytes.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        file::write_atomically(path.as_ref(), self.0.file.bytes())
    }

    /// The kind of U-Net it was made for.
    pub fn base(&self) -> Base {
        self.0.common.base
    }

    /// The labels, in the order of AesEmb's rows.
    pub fn labels(&self) -> &Labels {
        &self.0.common.labels
    }

    /// The cross-attention layers it has values for, down to up.
    pub fn layers(&self) -> &Layers {
        &self.0.layers
    }

    /// C, the tokens of one chunk of context.
    pub fn context_tokens(&self) -> usize {
        self.0.sizes.tokens
    }

    /// d, the width of the context.
    pub fn context_dim(&self) -> usize {
        self.0.sizes.dim
    }

    /// How the features of the labels become f_a.
    pub fn projection(&self) -> ProjectionKind {
        self.0.projection_kind
    }

    /// Where W_Va comes from.
    pub fn value_weights(&self) -> ValueWeights {
        self.0.value_weights
    }

    /// What the adapter was trained to be applied to; the default of every host.
    pub fn apply_to(&self) -> ApplyTo {
        self.0.common.apply_to
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

    /// f_t \[N, d\]: the features of a selection, looked up in AesEmb (paper, section 3.3).
    pub fn aes_embed(&self, selection: &Selection) -> Result<Tensor> {
        let Sizes { labels, dim, .. } = self.0.sizes;
        let weights = self.labels().weights(selection)?;
        let f_t = select(&self.0.aes_emb, &weights, dim);
        Ok(Tensor::rounded([labels, dim], f_t, DType::F32))
    }

    /// f_a \[C, d\]: the aesthetic context of a selection (paper, eq. 6).
    pub fn project(&self, selection: &Selection) -> Result<Tensor> {
        let weights = self.labels().weights(selection)?;
        let Sizes { tokens, dim, .. } = self.0.sizes;
        let f_a =
            self.0
                .projection
                .project(&self.0.file, &self.0.aes_emb, &weights, self.0.sizes)?;
        Ok(Tensor::rounded([tokens, dim], f_a, DType::F32))
    }

    /// V_a \[C, inner_dim\] of every layer for a selection (paper, eq. 7), accumulated in f32 and
    /// rounded to `dtype`. With [`ApplyTo::Contrast`] also that of the opposite selection.
    pub fn values(&self, selection: &Selection, apply_to: ApplyTo, dtype: DType) -> Result<Values> {
        let inner = &*self.0;
        if inner.value_weights == ValueWeights::Base {
            return Err(Error::Unsupported {
                argument: "values".to_owned(),
                expected: "an adapter with value weights of its own, or a base model".to_owned(),
                found: "one whose metadata `vmix.value_weights` is `base`: its V_a are f_a \
                        through the base model's own to_v"
                    .to_owned(),
            });
        }
        self.values_by(selection, apply_to, |layer, contexts| {
            let name = value_weight(layer);
            let weight = inner.file.tensor(&name)?;
            let values = values::layer_values(contexts, inner.sizes, weight, dtype)
                .map_err(|found| inner.file.tensor_error(&name, "finite values", found));
            inner.file.let_go(weight);
            values
        })
    }

    /// [`Adapter::values`] with the W_V of a base model, for an adapter that has no value weights of
    /// its own ([`ValueWeights::Base`]).
    pub fn values_on(
        &self,
        base: &Checkpoint,
        selection: &Selection,
        apply_to: ApplyTo,
        dtype: DType,
    ) -> Result<Values> {
        let inner = &*self.0;
        if inner.value_weights == ValueWeights::Own {
            return Err(Error::argument(
                "base",
                "none, as this adapter has value weights of its own",
                base.path().display().to_string(),
            ));
        }
        if (&*inner.layers, inner.sizes.dim) != (&**base.layers(), base.context_dim()) {
            let describe = |base: Base, layers: &Layers, dim| {
                format!("{base} ({} layers, context {dim})", layers.len())
            };
            return Err(Error::argument(
                base.path().display().to_string(),
                describe(inner.common.base, &inner.layers, inner.sizes.dim)
                    + ", as this adapter was made for",
                describe(base.base(), base.layers(), base.context_dim()),
            ));
        }
        self.values_by(selection, apply_to, |layer, contexts| {
            values::layer_values(contexts, inner.sizes, base.value_weight(layer)?, dtype)
                .map_err(|found| base.value_weight_error(layer, found))
        })
    }

    /// The values of every layer, given how f_a of the pass or passes becomes those of one.
    fn values_by(
        &self,
        selection: &Selection,
        apply_to: ApplyTo,
        layer_values: impl Fn(&Layer, &Rows) -> Result<LayerValues> + Sync,
    ) -> Result<Values> {
        let inner = &*self.0;
        let weights = self.labels().weights(selection)?;
        let mut contexts =
            inner
                .projection
                .project(&inner.file, &inner.aes_emb, &weights, inner.sizes)?;
        if apply_to == ApplyTo::Contrast {
            let opposite = inner.projection.project_opposite(
                &inner.file,
                &inner.aes_emb,
                &weights,
                inner.sizes,
            )?;
            contexts.extend(opposite);
        }
        let contexts = Rows::new(&contexts, inner.sizes.dim)?;
        let tensors = threads::try_map(&inner.layers, |layer| layer_values(layer, &contexts))?;
        Ok(Values::new(
            Common {
                apply_to,
                ..inner.common.clone()
            },
            inner.layers.clone(),
            weights,
            Origin::of(&inner.file),
            self.inherited_metadata(),
            tensors,
        ))
    }

    /// Reads every value weight and refuses those that are not finite.
    pub fn validate(&self) -> Result<()> {
        if self.0.value_weights == ValueWeights::Base {
            return Ok(());
        }
        threads::try_map(&self.0.layers, |layer| {
            let name = value_weight(layer);
            if self.0.file.tensor(&name)?.to_tensor().is_finite() {
                return Ok(());
            }
            Err(self
                .0
                .file
                .tensor_error(&name, "finite values", "NaN or infinity"))
        })?;
        Ok(())
    }

    /// What a preset keeps of its adapter's metadata: licence, author, training.
    fn inherited_metadata(&self) -> BTreeMap<String, String> {
        let kept = ["vmix.trained", "vmix.projection"];
        self.metadata()
            .iter()
            .filter(|(key, _)| key.starts_with("modelspec.") || kept.contains(&key.as_str()))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    }
}

fn value_weight(layer: &Layer) -> String {
    format!("{}{VALUE_WEIGHT}", layer.name)
}

/// The layers of a known base from its table; those of another from the file.
fn read_layers(file: &File, base: Base, value_weights: ValueWeights) -> Result<Layers> {
    if let Some(layers) = base.layers() {
        return Ok(layers);
    }
    let mut ldm_names = layer_map::<String>(
        file,
        "vmix.ldm_names",
        "a JSON object of the LDM name of every layer, by diffusers name",
    )?;
    let inner_dims: Vec<(String, usize)> = match value_weights {
        ValueWeights::Own => file
            .tensor_names()
            .filter_map(|name| name.strip_suffix(VALUE_WEIGHT))
            .map(|layer| {
                let shape = file.tensor(&format!("{layer}{VALUE_WEIGHT}"))?.shape;
                Ok((layer.to_owned(), shape.first().copied().unwrap_or(0)))
            })
            .collect::<Result<_>>()?,
        ValueWeights::Base => layer_map(
            file,
            "vmix.inner_dims",
            "a JSON object of the value width of every layer, by diffusers name",
        )?
        .into_iter()
        .collect(),
    };
    let layers: Vec<Layer> = inner_dims
        .into_iter()
        .map(|(name, inner_dim)| {
            let ldm_name = ldm_names.remove(&name).ok_or_else(|| {
                file.meta_error(
                    "vmix.ldm_names",
                    format!("the LDM name of `{name}`"),
                    "none",
                )
            })?;
            if inner_dim == 0 {
                return Err(file.tensor_error(&name, "values of a width above 0", "0"));
            }
            Ok(Layer {
                name,
                ldm_name: Some(ldm_name),
                inner_dim,
            })
        })
        .collect::<Result<_>>()?;
    if let Some(name) = ldm_names.into_keys().min() {
        let found = format!("`{name}`, which has no `{name}{VALUE_WEIGHT}`");
        return Err(file.meta_error("vmix.ldm_names", "the layers of this file", found));
    }
    if layers.is_empty() {
        return Err(file.meta_error("vmix.ldm_names", "at least one layer", "none"));
    }
    Layers::sorted(layers)
        .map_err(|found| file.meta_error("vmix.ldm_names", "a name of its own per layer", found))
}

/// Numbers that f_a and V_a of all layers may have together: 40 times those of SDXL.
const MAX_RESULT: usize = 1 << 28;

/// Refuses small files that ask for huge results, before anything is allocated.
fn check_result_size(file: &File, sizes: Sizes, layers: &Layers) -> Result<()> {
    let widths = layers.iter().map(|layer| layer.inner_dim);
    let total = widths
        .chain([sizes.dim])
        .try_fold(0usize, usize::checked_add)
        .and_then(|width| width.checked_mul(sizes.tokens));
    match total {
        Some(total) if total <= MAX_RESULT => Ok(()),
        _ => Err(file.meta_error(
            "vmix.context_tokens",
            format!("at most {MAX_RESULT} numbers in the values of all layers"),
            format!("more, with {} tokens", sizes.tokens),
        )),
    }
}
