//! Base models: single-file checkpoints and folders of diffusers pipelines.

use std::{collections::BTreeMap, path::Path, path::PathBuf, sync::Arc};

use serde::Deserialize;

use crate::{
    Base, Error, Layer, Layers, Result,
    component::{Component, read},
    file::File,
    ldm_name,
};

/// A Stable Diffusion model, mapped: nothing of it is read before it is needed.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    path: PathBuf,
    base: Base,
    layers: Layers,
    context_dim: usize,
    pub(crate) source: Source,
}

/// Where the text encoders are.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    File(Arc<File>),
    Folder(PathBuf),
}

/// A cross-attention's W_V, after its path.
const TO_V: &str = ".to_v.weight";
const ATTN2_TO_V: &str = ".attn2.to_v.weight";

#[derive(Deserialize)]
struct UnetConfig {
    #[serde(default)]
    layers_per_block: serde_json::Value,
}

impl Checkpoint {
    /// Opens a checkpoint: a safetensors file with the names of LDM (as ComfyUI loads), a U-Net alone,
    /// or the folder of a diffusers pipeline.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if !path.exists() {
            let missing = "no such file or folder; expected a safetensors file, or the folder of a \
                           diffusers pipeline";
            return Err(Error::Io {
                path: path.to_owned(),
                source: std::io::Error::new(std::io::ErrorKind::NotFound, missing),
            });
        }
        if path.is_dir() {
            return Self::from_folder(path);
        }
        if let Some(extension) = path.extension().and_then(|e| e.to_str())
            && ["ckpt", "pt", "pth", "bin"].contains(&extension)
        {
            return Err(Error::argument(
                path.display().to_string(),
                "a safetensors file or the folder of a diffusers pipeline",
                format!(
                    "a file .{extension}, a pickle, which can run programs and is never loaded"
                ),
            ));
        }
        let file = Arc::new(File::map(path)?);
        let prefix = ["model.diffusion_model.", "diffusion_model.", "unet.", ""]
            .into_iter()
            .find(|prefix| {
                let mut names = file.tensor_names();
                names.any(|name| {
                    name.strip_prefix(prefix).is_some_and(|name| {
                        name.ends_with(ATTN2_TO_V) && !name.starts_with("model.")
                    })
                })
            });
        let prefix = prefix.ok_or_else(|| {
            file.tensor_error(
                "model.diffusion_model.<block>.attn2.to_v.weight",
                "the cross-attention layers of a Stable Diffusion U-Net",
                "none",
            )
        })?;
        let unet = Component::new(file.clone(), prefix);
        Self::new(path, &unet, LAYERS_PER_BLOCK, Source::File(file))
    }

    fn from_folder(path: &Path) -> Result<Self> {
        let folder = path.join("unet");
        if !folder.is_dir() {
            return Err(Error::argument(
                path.display().to_string(),
                "the folder of a diffusers pipeline",
                "a folder without `unet` in it",
            ));
        }
        let unet = Component::open(&folder, "diffusion_pytorch_model")?;
        let config = folder.join("config.json");
        let UnetConfig { layers_per_block } =
            serde_json::from_slice(&read(&config)?).map_err(|e| {
                Error::argument(config.display().to_string(), "a JSON object", e.to_string())
            })?;
        let layers_per_block = layers_per_block.as_u64().and_then(|n| n.try_into().ok());
        Self::new(
            path,
            &unet,
            layers_per_block.unwrap_or(LAYERS_PER_BLOCK),
            Source::Folder(path.to_owned()),
        )
    }

    fn new(path: &Path, unet: &Component, layers_per_block: usize, source: Source) -> Result<Self> {
        let mut context_dim = None;
        let mut widths = BTreeMap::new();
        for tensor in unet.tensor_names() {
            let Some(name) = tensor.strip_suffix(TO_V).filter(|n| n.ends_with(".attn2")) else {
                continue;
            };
            let &[inner_dim, dim] = unet.tensor(tensor)?.shape else {
                return Err(unet.error(tensor, "shape [inner_dim, d]", "another"));
            };
            let dim_of_all = *context_dim.get_or_insert(dim);
            if inner_dim == 0 || dim == 0 || dim != dim_of_all {
                let expected = format!("shape [inner_dim, {dim_of_all}]");
                return Err(unet.error(tensor, expected, format!("shape [{inner_dim}, {dim}]")));
            }
            widths.insert(name.to_owned(), inner_dim);
        }
        let Some(context_dim) = context_dim else {
            return Err(Error::argument(
                path.display().to_string(),
                "the cross-attention layers of a Stable Diffusion U-Net",
                "none",
            ));
        };
        let ldm = widths.keys().any(|name| name.starts_with("input_blocks."));
        let layers = if ldm {
            ldm_layers(&widths)
        } else {
            diffusers_layers(&widths, layers_per_block)
        };
        let layers = layers.ok_or_else(|| Error::Unsupported {
            argument: path.display().to_string(),
            expected: "the layers of SD1.5 (16, context 768) or SDXL (70, context 2048)".to_owned(),
            found: format!("{} layers, context {context_dim}", widths.len()),
        })?;
        let base = [Base::Sd15, Base::Sdxl].into_iter().find(|base| {
            let known = base.layers().expect("a known base");
            base.context_dim() == Some(context_dim) && *known == layers
        });
        let layers = Layers::sorted(layers)
            .map_err(|found| Error::argument(path.display().to_string(), "layers", found))?;
        Ok(Self {
            path: path.to_owned(),
            base: base.unwrap_or(Base::Other),
            layers,
            context_dim,
            source,
        })
    }

    /// The file or folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The kind of its U-Net.
    pub fn base(&self) -> Base {
        self.base
    }

    /// The cross-attention layers, down to up.
    pub fn layers(&self) -> &Layers {
        &self.layers
    }

    /// Width d of the context that the U-Net receives.
    pub fn context_dim(&self) -> usize {
        self.context_dim
    }
}

/// diffusers' `layers_per_block` of SD1.5 and SDXL.
const LAYERS_PER_BLOCK: usize = 2;

/// The layers of a single file, which are those of a known base, if of other widths.
fn ldm_layers(widths: &BTreeMap<String, usize>) -> Option<Vec<Layer>> {
    [Base::Sd15, Base::Sdxl].into_iter().find_map(|base| {
        let known = base.layers()?;
        if known.len() != widths.len() {
            return None;
        }
        let found = known.iter().map(|layer| {
            Some(Layer {
                inner_dim: *widths.get(layer.ldm_name.as_ref()?)?,
                ..layer.clone()
            })
        });
        found.collect()
    })
}

fn diffusers_layers(widths: &BTreeMap<String, usize>, per_block: usize) -> Option<Vec<Layer>> {
    let layers = widths.iter().map(|(name, &inner_dim)| {
        Some(Layer {
            name: name.clone(),
            ldm_name: Some(ldm_name(name, per_block)?),
            inner_dim,
        })
    });
    let layers: Vec<Layer> = layers.collect::<Option<_>>()?;
    // In the order of the tables, so that both can be compared.
    Some(Layers::sorted(layers).ok()?.to_vec())
}
