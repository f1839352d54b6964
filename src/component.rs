//! The tensors of one part of a base model: a prefix in a single-file checkpoint, or a folder of a
//! diffusers pipeline with one file or several.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    sync::Arc,
};

use serde::Deserialize;

use crate::{
    Error, Result,
    file::{File, View},
};

/// Tensors that share a prefix, which their names here do not have.
#[derive(Debug, Clone)]
pub(crate) struct Component {
    files: Vec<Arc<File>>,
    prefix: String,
}

/// What lists the files of a component that is split.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Component {
    pub fn new(file: Arc<File>, prefix: impl Into<String>) -> Self {
        Self {
            files: vec![file],
            prefix: prefix.into(),
        }
    }

    /// Opens a folder of a diffusers pipeline, whose file is named `{stem}.safetensors`, or
    /// `{stem}.fp16.safetensors`, or is split into several that `{stem}.safetensors.index.json` lists.
    pub fn open(folder: &Path, stem: &str) -> Result<Self> {
        let names = [
            format!("{stem}.safetensors"),
            format!("{stem}.fp16.safetensors"),
        ];
        let single = names.iter().find(|name| folder.join(name).exists());
        let indices = [
            format!("{stem}.safetensors.index.json"),
            format!("{stem}.safetensors.index.fp16.json"),
        ];
        let index = indices.iter().find(|name| folder.join(name).exists());
        let names = match (single, index) {
            (Some(name), _) => BTreeSet::from([name.clone()]),
            (None, Some(index)) => split_files(&folder.join(index))?,
            (None, None) => {
                return Err(Error::argument(
                    folder.display().to_string(),
                    format!("a file {} in it", names[0]),
                    other_format(folder),
                ));
            }
        };
        let files = names
            .iter()
            .map(|name| Ok(Arc::new(File::map(&folder.join(name))?)))
            .collect::<Result<_>>()?;
        Ok(Self {
            files,
            prefix: String::new(),
        })
    }

    /// Names of all tensors, without the prefix.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        let names = self.files.iter().flat_map(|file| file.tensor_names());
        names.filter_map(|name| name.strip_prefix(self.prefix.as_str()))
    }

    pub fn has_tensor(&self, name: &str) -> bool {
        let name = self.full_name(name);
        self.files.iter().any(|file| file.has_tensor(&name))
    }

    pub fn tensor(&self, name: &str) -> Result<View<'_>> {
        self.file_of(name).tensor(&self.full_name(name))
    }

    pub fn tensor_of_shape(&self, name: &str, shape: &[usize]) -> Result<View<'_>> {
        self.file_of(name)
            .tensor_of_shape(&self.full_name(name), shape)
    }

    pub fn small_tensor(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.file_of(name)
            .small_tensor(&self.full_name(name), shape)
    }

    pub fn error(
        &self,
        tensor: &str,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Error {
        self.file_of(tensor)
            .tensor_error(&self.full_name(tensor), expected, found)
    }

    fn full_name(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// The file that has the tensor; one that has not will say so.
    fn file_of(&self, name: &str) -> &File {
        let name = self.full_name(name);
        let mut files = self.files.iter();
        files
            .find(|file| file.has_tensor(&name))
            .unwrap_or(&self.files[0])
    }
}

/// The files that an index names: names only, so that no path leads out of the folder.
fn split_files(index: &Path) -> Result<BTreeSet<String>> {
    let refused = |found: String| {
        Error::argument(
            index.display().to_string(),
            "a JSON object with a `weight_map` from tensor to file name",
            found,
        )
    };
    let Index { weight_map } =
        serde_json::from_slice(&read(index)?).map_err(|e| refused(e.to_string()))?;
    let names: BTreeSet<String> = weight_map.into_values().collect();
    if names.is_empty() {
        return Err(refused("no tensor".to_owned()));
    }
    match names.iter().find(|name| name.contains(['/', '\\'])) {
        None => Ok(names),
        Some(name) => Err(refused(format!("the path `{name}`"))),
    }
}

/// What is in a folder without safetensors, for the message.
fn other_format(folder: &Path) -> String {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names
        .find(|name| name.ends_with(".bin") || name.ends_with(".ckpt"))
        .map_or("none".to_owned(), |name| {
            format!("{name}, a pickle, which can run programs and is never loaded")
        })
}

/// Longest JSON file that is read: a tokenizer's vocabulary is 1 MB.
const LONGEST_JSON: u64 = 64 << 20;

/// A small file that a model folder brings along.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    let io_error = |source| Error::Io {
        path: path.to_owned(),
        source,
    };
    let size = fs::metadata(path).map_err(io_error)?.len();
    if size > LONGEST_JSON {
        return Err(Error::argument(
            path.display().to_string(),
            format!("at most {LONGEST_JSON} bytes"),
            format!("{size}"),
        ));
    }
    fs::read(path).map_err(io_error)
}
