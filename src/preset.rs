//! Presets: the values of one selection as a file.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use crate::{
    Adapter, ApplyTo, Kind, Result, Selection, Tensor, Untrained, Values,
    file::{self, File},
    metadata::{Common, Made, kind_of, read_apply_to, read_json, read_layers, write_ldm_names},
    values::{LayerValues, Origin},
};

/// Suffixes of a layer's tensors, after its diffusers path.
const COND: &str = ".v_aes";
const UNCOND: &str = ".v_aes_uncond";

impl Values {
    /// Opens a preset.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::read(&File::read(path.as_ref())?)
    }

    /// Opens a preset that is already in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self> {
        Self::read(&File::from_bytes(bytes)?)
    }

    /// Writes a preset, whole or not at all. Equal values give equal bytes.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        file::write_atomically(path.as_ref(), &self.to_bytes()?)
    }

    /// Every metadata key of a preset file of these values.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        let mut metadata = self.inherited().clone();
        metadata.extend(self.common().write(Kind::Preset));
        let names = self.labels().iter().map(|label| label.name.as_str());
        let selection: BTreeMap<&str, f32> = names.zip(self.weights().iter().copied()).collect();
        let json = |value| serde_json::to_string(value).expect("string keys and finite numbers");
        metadata.insert("vmix.selection".to_owned(), json(&selection));
        metadata.insert("vmix.origin".to_owned(), self.origin().to_owned());
        metadata.insert("vmix.apply_to".to_owned(), self.apply_to().to_string());
        write_ldm_names(self.base(), self.layers(), &mut metadata);
        metadata
    }

    /// The bytes of a preset file.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut tensors = BTreeMap::new();
        for (layer, values) in self.layers().iter().zip(self.tensors()) {
            tensors.insert(format!("{}{COND}", layer.name), &*values.cond);
            if let Some(uncond) = &values.uncond {
                tensors.insert(format!("{}{UNCOND}", layer.name), uncond);
            }
        }
        let tensors = tensors
            .iter()
            .map(|(name, tensor)| (name.as_str(), *tensor));
        file::serialize(tensors, &self.metadata())
    }

    fn read(file: &File) -> Result<Self> {
        let common = Common::read(file, Kind::Preset)?;
        let apply_to = read_apply_to(file)?;
        Made::check(file)?;
        let layers = read_layers(file, common.base, |layer| {
            let name = format!("{layer}{COND}");
            file.width(&name, 1, "shape [context tokens, inner_dim]")
        })?;
        let weights = read_weights(file, &common)?;
        let origin = file.parse_meta("vmix.origin", "a SHA-256 in hexadecimal", |v| {
            let hex = v
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
            (v.len() == 64 && hex).then(|| v.to_owned())
        })?;
        let contrast = apply_to == ApplyTo::Contrast;
        let mut dtype = None;
        let tensors = layers
            .iter()
            .map(|layer| {
                let mut read = |suffix| -> Result<Arc<Tensor>> {
                    let name = format!("{}{suffix}", layer.name);
                    let shape = [common.context_tokens, layer.inner_dim];
                    let tensor = file.finite_tensor(&name, &shape, dtype)?;
                    dtype = Some(tensor.dtype());
                    Ok(Arc::new(tensor))
                };
                Ok(LayerValues {
                    cond: read(COND)?,
                    uncond: contrast.then(|| read(UNCOND)).transpose()?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        file.refuse_other_tensors(|name| {
            let layer = match name.strip_suffix(UNCOND) {
                Some(layer) if contrast => Some(layer),
                _ => name.strip_suffix(COND),
            };
            layer.is_some_and(|layer| layers.get(layer).is_ok_and(|known| known.name == layer))
        })?;
        // All of it, keys of a later version too: writing replaces those that are known.
        let inherited = file.metadata().clone();
        Ok(Self::new(
            common,
            apply_to,
            layers,
            weights,
            Origin::Known(origin),
            inherited,
            tensors,
        ))
    }
}

/// The weights of the selection, which must name exactly the labels.
fn read_weights(file: &File, common: &Common) -> Result<Vec<f32>> {
    const KEY: &str = "vmix.selection";
    let expected = "a JSON object of the finite weight of every label";
    let selection: BTreeMap<String, f32> = read_json(file, KEY, expected)?;
    if selection.len() != common.labels.len() {
        let found = format!("{} of {} labels", selection.len(), common.labels.len());
        return Err(file.meta_error(KEY, expected, found));
    }
    common
        .labels
        .weights(&Selection::weights(selection))
        .map_err(|e| file.meta_error(KEY, expected, e.to_string()))
}

/// What a file holds.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Opened {
    /// Any selection of its labels.
    Adapter(Adapter),
    /// V_a of one selection.
    Preset(Values),
    /// Labels and their features, to be trained.
    Untrained(Untrained),
}

/// Opens any VMix file; its own metadata says what it is.
pub fn open(path: impl AsRef<Path>) -> Result<Opened> {
    let file = File::read(path.as_ref())?;
    Ok(match kind_of(&file)? {
        Kind::Adapter => Opened::Adapter(Adapter::read(file)?),
        Kind::Preset => Opened::Preset(Values::read(&file)?),
        Kind::Init => Opened::Untrained(Untrained::read(file)?),
    })
}
