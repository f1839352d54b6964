//! Some labels of an adapter, and several adapters in one.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::json;

use crate::{
    Adapter, CoefficientKind, DType, Error, Label, Labels, Result, Row, Tensor,
    adapter::{AES_EMB, ATTENTION, CONTEXT_ROWS, GRAM_FACTOR, PROFILE, ROWS},
    error::nearest,
    metadata::Made,
};

/// Makes one adapter with some labels of one or several, in the order of `labels`; with all of them where
/// `labels` is `None`.
///
/// A label that is dropped stays where a selection leaves it out: at its neutral weight, or at 0. So the
/// result gives the values that the original gives where only the kept labels are selected. Several
/// adapters must be linear, for the same U-Net and of the same `apply_to`. AesEmb and `attention` are kept
/// where all of them have it; rows of different dtypes become f32.
///
/// # Errors
/// No adapter or no label, a name that no adapter has or that two have, or adapters that do not fit
/// together.
pub fn merge<'a>(adapters: &'a [Adapter], labels: Option<&[&'a str]>) -> Result<Adapter> {
    let Some((first, others)) = adapters.split_first() else {
        return Err(Error::argument("adapters", "at least one", "none"));
    };
    for (i, other) in others.iter().enumerate() {
        check_fit(first, other, i + 1)?;
    }
    let labels_of = |adapter: &'a Adapter| adapter.labels().iter().map(|label| &*label.name);
    let known: Vec<&str> = adapters.iter().flat_map(labels_of).collect();
    let mut counts: HashMap<&str, usize> = HashMap::new();
    for &name in &known {
        *counts.entry(name).or_default() += 1;
    }
    let names: Vec<&str> = match labels {
        Some(names) => names.to_vec(),
        None => known.clone(),
    };
    if names.is_empty() {
        return Err(Error::argument("labels", "at least one label", "none"));
    }
    for name in &names {
        match counts.get(name) {
            Some(1) => (),
            None => {
                return Err(Error::UnknownLabel {
                    name: (*name).to_owned(),
                    nearest: nearest(name, known.iter().copied()),
                    known: known.join(", "),
                });
            }
            Some(_) => {
                let found = format!("`{name}` in two adapters");
                return Err(Error::argument(
                    "labels",
                    "labels of different names",
                    found,
                ));
            }
        }
    }
    let wanted: HashSet<&str> = names.iter().copied().collect();
    let parts: Vec<Part> = adapters
        .iter()
        .filter_map(|a| Part::of(a, &wanted))
        .collect();
    join(&parts, &names)
}

/// Refuses an adapter, the one of this index, that cannot be joined with the first.
fn check_fit(first: &Adapter, other: &Adapter, index: usize) -> Result<()> {
    let refuse = |index: usize, adapter: &Adapter, what: &str, expected: String, found: String| {
        let argument = format!("adapters[{index}] ({}): {what}", adapter.file().name());
        Err(Error::argument(argument, expected, found))
    };
    for (index, adapter) in [(0, first), (index, other)] {
        let kind = adapter.coefficient_kind();
        if kind != CoefficientKind::Linear {
            let expected = "`linear`, to join several".to_owned();
            return refuse(
                index,
                adapter,
                "coefficients",
                expected,
                format!("`{kind}`"),
            );
        }
    }
    let tokens = [first, other].map(|adapter| adapter.context_tokens().to_string());
    let width = |adapter: &Adapter, other: &Adapter| {
        // A linear file need not say it.
        let width = adapter.context_dim().or(other.context_dim());
        width.map_or(String::new(), |width| width.to_string())
    };
    for (what, a, b) in [
        ("base", first.base().name(), other.base().name()),
        ("apply_to", first.apply_to().name(), other.apply_to().name()),
        ("context tokens", &*tokens[0], &*tokens[1]),
        (
            "context width",
            &*width(first, other),
            &*width(other, first),
        ),
    ] {
        if a != b {
            let expected = format!("`{a}`, as in adapters[0]");
            return refuse(index, other, what, expected, format!("`{b}`"));
        }
    }
    if **first.layers() != **other.layers() {
        let expected = "those of adapters[0]".to_owned();
        return refuse(index, other, "layers", expected, "others".into());
    }
    Ok(())
}

/// What is kept of one adapter.
struct Part<'a> {
    adapter: &'a Adapter,
    /// The kept labels, in its own order.
    labels: Vec<usize>,
    rows: Vec<Kept>,
}

/// A row of the result.
struct Kept {
    /// Which row of the adapter it is.
    origin: usize,
    /// What its part of the profile is multiplied with.
    factor: f32,
    /// What it belongs to, by the positions of the adapter's labels.
    row: Row,
}

impl<'a> Part<'a> {
    fn of(adapter: &'a Adapter, names: &HashSet<&str>) -> Option<Self> {
        let known = adapter.labels();
        let is_kept = |i: &usize| names.contains(known[*i].name.as_str());
        let labels: Vec<usize> = (0..known.len()).filter(is_kept).collect();
        let first = *labels.first()?;
        let mut rows = Vec::new();
        for (origin, &row) in adapter.row_sides().iter().enumerate() {
            let mut keep = |factor, row| {
                rows.push(Kept {
                    origin,
                    factor,
                    row,
                });
            };
            match row.label() {
                Some(label) if !is_kept(&label) => {
                    let factor = left_out(&known[label], row, adapter.coefficient_kind());
                    if factor != 0.0 {
                        // This row must not depend on weights. Both sides of a kept label have it,
                        // whose scales w and 1 - w add up to 1.
                        keep(factor, Row::Positive(first));
                        keep(factor, Row::Negative(first));
                    }
                }
                _ => keep(1.0, row),
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
fn left_out(label: &Label, row: Row, kind: CoefficientKind) -> f32 {
    match (kind, row) {
        (CoefficientKind::Linear, _) => 0.0, // neutral is 0
        (CoefficientKind::LayerNorm, Row::Positive(_)) => label.left_out(),
        (CoefficientKind::LayerNorm, Row::Negative(_)) => 1.0 - label.left_out(),
        (CoefficientKind::LayerNorm, Row::Constant) => 1.0,
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
        let tensor = |name| Ok::<_, Error>(part.adapter.file().tensor(name)?.to_tensor());
        let context = tensor(CONTEXT_ROWS)?;
        let context_rows = Tensor::rounded(
            [rows, context.shape()[1]],
            part.picked(&context),
            DType::F32,
        );
        tensors.insert(CONTEXT_ROWS.to_owned(), context_rows);
        let factor = gram_factor(part, &tensor(GRAM_FACTOR)?);
        tensors.insert(GRAM_FACTOR.to_owned(), factor);
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

/// L of the rows that are kept.
fn gram_factor(part: &Part<'_>, of_all: &Tensor) -> Tensor {
    // The place of a row among those that are not constant.
    let mut next = 0;
    let places = part.adapter.row_sides().iter().map(|row| {
        let place = next;
        next += usize::from(*row != Row::Constant);
        place
    });
    let places: Vec<usize> = places.collect();
    let (numbers, m) = (of_all.to_f32(), of_all.shape()[1]);
    let kept = part.rows.iter().filter(|kept| kept.row != Row::Constant);
    let rows: Vec<f32> = kept
        .flat_map(|kept| numbers[places[kept.origin] * m..][..m].iter().copied())
        .collect();
    Tensor::rounded([rows.len() / m, m], rows, DType::F32)
}

/// Part and position in it of every label.
fn places(parts: &[Part<'_>], names: &[&str]) -> Vec<(usize, usize)> {
    let mut by_name = HashMap::new();
    for (i, part) in parts.iter().enumerate() {
        let known = part.adapter.labels();
        for &label in &part.labels {
            by_name.insert(known[label].name.as_str(), (i, label));
        }
    }
    names.iter().map(|name| by_name[name]).collect()
}

/// The features of the labels, in the order of the names.
fn aes_emb(parts: &[Part<'_>], pieces: &[Tensor], names: &[&str]) -> Tensor {
    let d = pieces[0].shape()[2];
    let pieces: Vec<Vec<f32>> = pieces.iter().map(Tensor::to_f32).collect();
    let mut features = Vec::with_capacity(names.len() * 2 * d);
    for (part, label) in places(parts, names) {
        features.extend(&pieces[part][label * 2 * d..][..2 * d]);
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
    let labels = places(parts, names).into_iter();
    let labels = labels.map(|(part, label)| parts[part].adapter.labels()[label].clone());
    let labels = Labels::new(labels.collect())?;
    metadata.insert("vmix.labels".to_owned(), labels.to_json());
    let sides = parts.iter().flat_map(|part| {
        let known = part.adapter.labels();
        part.rows.iter().map(|kept| match kept.row.label() {
            Some(label) => json!({"label": known[label].name, "side": kept.row.side()}),
            None => json!({"side": kept.row.side()}),
        })
    });
    let sides: Vec<_> = sides.collect();
    metadata.insert("vmix.rows".to_owned(), json!(sides).to_string());
    if parts.len() > 1 {
        let made = all.iter().filter_map(|one| one.get(Made::KEY));
        let made: Vec<serde_json::Map<String, serde_json::Value>> = made
            .filter_map(|made| serde_json::from_str(made).ok())
            .collect();
        // What all of them say, such as the checkpoint, goes on being said.
        let mut joined = made.first().cloned().unwrap_or_default();
        joined.retain(|key, value| made.iter().all(|one| one.get(key) == Some(&*value)));
        joined.insert("method".to_owned(), Made::MERGED.into());
        joined.insert("parts".to_owned(), made.into());
        metadata.insert(Made::KEY.to_owned(), json!(joined).to_string());
    }
    Ok(metadata)
}
