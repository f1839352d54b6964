//! Presets: the values of one selection as a file.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use crate::{
    Adapter, ApplyTo, Base, DType, Kind, Layer, Layers, Result, Selection, Values,
    file::{self, File},
    metadata::{Common, kind_of, layer_map},
    values::{LayerValues, Origin},
};

/// Suffixes of a layer's tensors, after its diffusers path.
const COND: &str = ".v_aes";
const UNCOND: &str = ".v_aes_uncond";

impl Values {
    /// Opens a preset.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::read(&File::open(path.as_ref())?)
    }

    /// Opens a preset that is already in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self> {
        Self::read(&File::from_bytes(bytes)?)
    }

    /// Writes a preset, whole or not at all. Equal values give equal bytes.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        file::write_atomically(path.as_ref(), &self.to_bytes()?)
    }

    /// Every metadata key of a preset file of these values. For values fresh from a mapped adapter
    /// the first call reads that whole file.
    pub fn metadata(&self) -> BTreeMap<String, String> {
        let mut metadata = self.inherited().clone();
        metadata.extend(self.common().write(Kind::Preset));
        let names = self.labels().iter().map(|label| label.name.as_str());
        let selection: BTreeMap<&str, f32> = names.zip(self.weights().iter().copied()).collect();
        let json = |value| serde_json::to_string(value).expect("string keys and finite numbers");
        metadata.insert("vmix.selection".to_owned(), json(&selection));
        metadata.insert("vmix.origin".to_owned(), self.origin().to_owned());
        if self.base() == Base::Other {
            let ldm_names: BTreeMap<&str, &str> = self
                .layers()
                .iter()
                .filter_map(|layer| Some((layer.name.as_str(), layer.ldm_name.as_deref()?)))
                .collect();
            let ldm_names = serde_json::to_string(&ldm_names).expect("string keys and values");
            metadata.insert("vmix.ldm_names".to_owned(), ldm_names);
        }
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
        let layers = read_layers(file, common.base)?;
        let weights = read_weights(file, &common)?;
        let origin = file.parse_meta("vmix.origin", "a SHA-256 in hexadecimal", |v| {
            let hex = v
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
            (v.len() == 64 && hex).then(|| v.to_owned())
        })?;
        let contrast = common.apply_to == ApplyTo::Contrast;
        let mut dtype = None;
        let tensors = layers
            .iter()
            .map(|layer| {
                let mut read = |suffix| {
                    let name = format!("{}{suffix}", layer.name);
                    let shape = [common.context_tokens, layer.inner_dim];
                    let view = file.tensor_of_shape(&name, &shape)?;
                    let dtype: DType = *dtype.get_or_insert(view.dtype);
                    if view.dtype != dtype {
                        let found = view.dtype.name();
                        let expected = format!("{dtype}, as the other tensors");
                        return Err(file.tensor_error(&name, expected, found));
                    }
                    let tensor = view.to_tensor();
                    if !tensor.is_finite() {
                        return Err(file.tensor_error(&name, "finite values", "NaN or infinity"));
                    }
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
        let origin = Origin::Hash(origin);
        Ok(Self::new(
            common, layers, weights, origin, inherited, tensors,
        ))
    }
}

/// The layers of a known base from its table; those of another from the file.
fn read_layers(file: &File, base: Base) -> Result<Layers> {
    if let Some(layers) = base.layers() {
        return Ok(layers);
    }
    let ldm_names: BTreeMap<String, String> = layer_map(
        file,
        "vmix.ldm_names",
        "a JSON object of the LDM name of every layer, by diffusers name",
    )?;
    if ldm_names.is_empty() {
        return Err(file.meta_error("vmix.ldm_names", "at least one layer", "none"));
    }
    let layers = ldm_names
        .into_iter()
        .map(|(name, ldm_name)| {
            let tensor = format!("{name}{COND}");
            let inner_dim = match *file.tensor(&tensor)?.shape {
                [_, inner_dim] if inner_dim > 0 => inner_dim,
                ref shape => {
                    let found = format!("shape {shape:?}");
                    return Err(file.tensor_error(&tensor, "shape [context tokens, width]", found));
                }
            };
            Ok(Layer {
                name,
                ldm_name: Some(ldm_name),
                inner_dim,
            })
        })
        .collect::<Result<_>>()?;
    Layers::sorted(layers)
        .map_err(|found| file.meta_error("vmix.ldm_names", "a name of its own per layer", found))
}

/// The weights of the selection, which must name exactly the labels.
fn read_weights(file: &File, common: &Common) -> Result<Vec<f32>> {
    const KEY: &str = "vmix.selection";
    let expected = "a JSON object of the finite weight of every label";
    let selection: BTreeMap<String, f32> = layer_map(file, KEY, expected)?;
    if selection.len() != common.labels.len() {
        let found = format!("{} of {} labels", selection.len(), common.labels.len());
        return Err(file.meta_error(KEY, expected, found));
    }
    common
        .labels
        .weights(&Selection::weights(selection))
        .map_err(|e| file.meta_error(KEY, expected, e.to_string()))
}

/// An adapter or a preset, whichever the file is.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Opened {
    /// Any selection of its labels.
    Adapter(Adapter),
    /// V_a of one selection.
    Preset(Values),
}

/// Opens an adapter or a preset; the file's own metadata says which it is.
pub fn open(path: impl AsRef<Path>) -> Result<Opened> {
    let file = File::open(path.as_ref())?;
    Ok(match kind_of(&file)? {
        Kind::Adapter => Opened::Adapter(Adapter::read(file)?),
        Kind::Preset => Opened::Preset(Values::read(&file)?),
    })
}
