//! Some labels of an adapter, and several adapters in one.

use std::collections::BTreeMap;

use serde_json::json;

use crate::{
    Adapter, CoefficientKind, DType, Error, Label, LabelKey, Labels, Method, Result, Row, Side,
    Tensor,
    adapter::{AES_EMB, ATTENTION, CONTEXT_ROWS, GRAM, PROFILE, ROWS},
    error::nearest,
    metadata::Made,
};

/// Makes one adapter with some labels of one or several, in the order of `labels`; with all of them where
/// `labels` is `None`.
///
/// A label that is dropped stays where a selection leaves it out: at its neutral weight, or at 0. So the
/// result gives the values that the original gives where only the kept labels are selected. Several
/// adapters must be linear, and for the same U-Net.
///
/// # Errors
/// No adapter or no label, a name that no adapter has or that two have, or adapters that do not fit
/// together.
pub fn merge(adapters: &[Adapter], labels: Option<&[&str]>) -> Result<Adapter> {
    let Some((first, others)) = adapters.split_first() else {
        return Err(Error::argument("adapters", "at least one", "none"));
    };
    for other in others {
        check_fit(first, other)?;
    }
    let everything = || adapters.iter().flat_map(|adapter| adapter.labels().iter());
    let names: Vec<&str> = match labels {
        Some(names) => names.to_vec(),
        None => everything().map(|label| label.name.as_str()).collect(),
    };
    if names.is_empty() {
        return Err(Error::argument("labels", "at least one label", "none"));
    }
    for name in &names {
        match everything().filter(|label| label.name == *name).count() {
            1 => (),
            0 => {
                let known: Vec<&str> = everything().map(|label| label.name.as_str()).collect();
                return Err(Error::UnknownLabel {
                    name: (*name).to_owned(),
                    nearest: nearest(name, known.iter().copied()),
                    known: known.join(", "),
                });
            }
            _ => {
                let found = format!("`{name}` in two adapters");
                return Err(Error::argument(
                    "labels",
                    "labels of different names",
                    found,
                ));
            }
        }
    }
    let parts: Vec<Part> = adapters
        .iter()
        .filter_map(|a| Part::of(a, &names))
        .collect();
    join(&parts, &names)
}

fn check_fit(first: &Adapter, other: &Adapter) -> Result<()> {
    let refuse = |what: &str, expected: String, found: String| {
        Err(Error::argument(
            format!("{what} of the adapters"),
            expected,
            found,
        ))
    };
    for adapter in [first, other] {
        if adapter.coefficient_kind() != CoefficientKind::Linear {
            let found = format!("`{}`", adapter.coefficient_kind());
            return refuse("coefficients", "`linear`, to join several".into(), found);
        }
    }
    for (what, a, b) in [
        ("base", first.base().name(), other.base().name()),
        ("apply_to", first.apply_to().name(), other.apply_to().name()),
    ] {
        if a != b {
            return refuse(what, format!("`{a}` in all"), format!("`{b}`"));
        }
    }
    for (what, a, b) in [
        (
            "context tokens",
            Some(first.context_tokens()),
            Some(other.context_tokens()),
        ),
        ("context width", first.context_dim(), other.context_dim()),
    ] {
        if a != b {
            let shown = |size: Option<usize>| size.map_or("none".into(), |size| size.to_string());
            return refuse(what, format!("{} in all", shown(a)), shown(b));
        }
    }
    if **first.layers() != **other.layers() {
        return refuse("layers", "the same layers".into(), "different ones".into());
    }
    Ok(())
}

/// What is kept of one adapter.
struct Part<'a> {
    adapter: &'a Adapter,
    /// The kept labels, in its own order.
    labels: Vec<usize>,
    rows: Vec<Kept<'a>>,
}

/// A row of the result.
struct Kept<'a> {
    /// Which row of the adapter it is.
    origin: usize,
    /// What its part of the profile is multiplied with.
    factor: f32,
    label: Option<&'a str>,
    side: Side,
}

impl<'a> Part<'a> {
    fn of(adapter: &'a Adapter, names: &[&str]) -> Option<Self> {
        let known = adapter.labels();
        let is_kept = |i: &usize| names.contains(&known[*i].name.as_str());
        let labels: Vec<usize> = (0..known.len()).filter(is_kept).collect();
        let first = known[*labels.first()?].name.as_str();
        let mut rows = Vec::new();
        for (origin, &Row { label, side }) in adapter.row_sides().iter().enumerate() {
            let mut keep = |factor, label, side| {
                rows.push(Kept {
                    origin,
                    factor,
                    label,
                    side,
                });
            };
            match label {
                Some(label) if !labels.contains(&label) => {
                    let factor = left_out(&known[label], side, adapter.coefficient_kind());
                    if factor != 0.0 {
                        // A row that no weight moves: w and 1 − w of a kept label add up to 1.
                        keep(factor, Some(first), Side::Positive);
                        keep(factor, Some(first), Side::Negative);
                    }
                }
                label => keep(1.0, label.map(|i| known[i].name.as_str()), side),
            }
        }
        Some(Self {
            adapter,
            labels,
            rows,
        })
    }

    fn picked(&self, tensor: &Tensor) -> Vec<f32> {
        let numbers = tensor.to_f32();
        let width = tensor.shape()[1];
        let rows = self.rows.iter();
        rows.flat_map(|row| numbers[row.origin * width..][..width].iter().copied())
            .collect()
    }
}

/// The scale of a row whose label is left out.
fn left_out(label: &Label, side: Side, kind: CoefficientKind) -> f32 {
    match (kind, side) {
        (CoefficientKind::Linear, _) => 0.0, // neutral is 0
        (CoefficientKind::LayerNorm, Side::Positive) => label.left_out(),
        (CoefficientKind::LayerNorm, Side::Negative) => 1.0 - label.left_out(),
        (CoefficientKind::LayerNorm, Side::Constant) => 1.0,
    }
}

fn join(parts: &[Part<'_>], names: &[&str]) -> Result<Adapter> {
    let first = parts[0].adapter;
    let tokens = first.context_tokens();
    let rows: usize = parts.iter().map(|part| part.rows.len()).sum();
    let mut tensors = BTreeMap::new();

    let mut profile = Vec::with_capacity(tokens * rows);
    for token in 0..tokens {
        for part in parts {
            let all = &part.adapter.parts().profile;
            let own = &all[token * part.adapter.row_sides().len()..];
            profile.extend(part.rows.iter().map(|row| own[row.origin] * row.factor));
        }
    }
    tensors.insert(
        PROFILE.to_owned(),
        Tensor::rounded([tokens, rows], profile, DType::F32),
    );
    let dtype = match parts
        .iter()
        .all(|part| part.adapter.dtype() == first.dtype())
    {
        true => first.dtype(),
        false => DType::F32,
    };
    for layer in first.layers().iter() {
        let mut joined = Vec::new();
        for part in parts {
            joined.extend(part.picked(part.adapter.rows(&layer.name)?));
        }
        let joined = Tensor::rounded([rows, layer.inner_dim], joined, dtype);
        tensors.insert(format!("{}{ROWS}", layer.name), joined);
    }
    if first.coefficient_kind() == CoefficientKind::LayerNorm {
        let part = &parts[0];
        let file = part.adapter.tensors()?;
        let context = &file[CONTEXT_ROWS];
        let context_rows =
            Tensor::rounded([rows, context.shape()[1]], part.picked(context), DType::F32);
        tensors.insert(CONTEXT_ROWS.to_owned(), context_rows);
        tensors.insert(GRAM.to_owned(), gram(part, &file[GRAM]));
    }
    let pieces = |name| -> Result<Option<Vec<Tensor>>> {
        let piece = |part: &Part<'_>| {
            let file = part.adapter.file();
            file.has_tensor(name)
                .then(|| Ok(file.tensor(name)?.to_tensor()))
                .transpose()
        };
        parts.iter().map(piece).collect::<Result<Option<Vec<_>>>>()
    };
    if let Some(pieces) = pieces(AES_EMB)? {
        tensors.insert(AES_EMB.to_owned(), aes_emb(parts, &pieces, names));
    }
    if let Some(pieces) = pieces(ATTENTION)? {
        // A measurement of the base; of several the mean.
        let mut mean = vec![0f64; tokens * tokens];
        for piece in &pieces {
            let share = (pieces.len() as f64).recip();
            let pairs = mean.iter_mut().zip(piece.to_f32());
            pairs.for_each(|(mean, x)| *mean += share * f64::from(x));
        }
        let mean = mean.into_iter().map(|x| x as f32).collect();
        let mean = Tensor::rounded([tokens, tokens], mean, DType::F32);
        tensors.insert(ATTENTION.to_owned(), mean);
    }
    Adapter::from_tensors(&tensors, &metadata(parts, names)?)
}

/// G of the rows that are kept.
fn gram(part: &Part<'_>, of_all: &Tensor) -> Tensor {
    let sides = part.adapter.row_sides();
    // The place of a row among those that are not constant.
    let place = |row: usize| {
        sides[..row]
            .iter()
            .filter(|r| r.side != Side::Constant)
            .count()
    };
    let kept = part.rows.iter().filter(|row| row.side != Side::Constant);
    let places: Vec<usize> = kept.map(|row| place(row.origin)).collect();
    let (numbers, size) = (&of_all.to_f32(), of_all.shape()[0]);
    let entries = places
        .iter()
        .flat_map(|j| places.iter().map(move |k| numbers[j * size + k]));
    Tensor::rounded([places.len(); 2], entries.collect(), DType::F32)
}

/// The features of the labels, in the order of the names.
fn aes_emb(parts: &[Part<'_>], pieces: &[Tensor], names: &[&str]) -> Tensor {
    let d = pieces[0].shape()[2];
    let mut features = Vec::with_capacity(names.len() * 2 * d);
    for name in names {
        for (part, piece) in parts.iter().zip(pieces) {
            if let Ok(index) = part.adapter.labels().index(&LabelKey::from(*name)) {
                features.extend(&piece.to_f32()[index * 2 * d..][..2 * d]);
            }
        }
    }
    Tensor::rounded([names.len(), 2, d], features, DType::F32)
}

fn metadata(parts: &[Part<'_>], names: &[&str]) -> Result<BTreeMap<String, String>> {
    let all: Vec<_> = parts.iter().map(|part| part.adapter.metadata()).collect();
    // What the files agree on, but for what holds for one file's bytes only.
    let mut metadata = all[0].clone();
    metadata.retain(|key, value| {
        key != "modelspec.hash_sha256" && all.iter().all(|other| other.get(key) == Some(value))
    });
    let mut labels = Vec::new();
    for name in names {
        for part in parts {
            let known = part.adapter.labels();
            let kept = part.labels.iter().map(|&i| &known[i]);
            labels.extend(kept.filter(|label| label.name == *name).cloned());
        }
    }
    let labels = Labels::new(labels)?;
    metadata.insert("vmix.labels".to_owned(), labels.to_json());
    let sides = parts.iter().flat_map(|part| &part.rows);
    let sides: Vec<_> = sides
        .map(|row| match row.label {
            Some(label) => json!({"label": label, "side": row.side.name()}),
            None => json!({"side": row.side.name()}),
        })
        .collect();
    metadata.insert("vmix.rows".to_owned(), json!(sides).to_string());
    if parts.len() > 1 {
        let made = all.iter().filter_map(|one| one.get(Made::KEY));
        let made: Vec<serde_json::Value> = made
            .filter_map(|made| serde_json::from_str(made).ok())
            .collect();
        let made = json!({"method": Method::Merged.name(), "parts": made}).to_string();
        metadata.insert(Made::KEY.to_owned(), made);
    }
    Ok(metadata)
}
