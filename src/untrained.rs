//! Init files: labels and their features, the start of a training.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use crate::{
    Base, Kind, Labels, Result, Tensor,
    adapter::AES_EMB,
    file::{self, File},
    metadata::{Common, read_feature_width, read_layers},
};

/// Labels and AesEmb for a base, without rows. `vmix init` makes it and the trainer reads it. Cheap to
/// clone.
#[derive(Debug, Clone)]
pub struct Untrained(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    file: File,
    common: Common,
    aes_emb: Tensor,
}

impl Untrained {
    /// Reads and checks an init file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::read(File::read(path.as_ref())?)
    }

    /// Opens an init file that is already in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self> {
        Self::read(File::from_bytes(bytes)?)
    }

    #[cfg(feature = "clip")]
    pub(crate) fn from_parts(
        aes_emb: &Tensor,
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self> {
        Self::from_bytes(file::serialize([(AES_EMB, aes_emb)], metadata)?)
    }

    pub(crate) fn read(file: File) -> Result<Self> {
        let common = Common::read(&file, Kind::Init)?;
        read_layers(&file, common.base, |_| Ok(1))?; // the names; nothing here has a width
        let labels = common.labels.len();
        let d = read_feature_width(&file, common.base, labels)?;
        let aes_emb = file.finite_tensor(AES_EMB, &[labels, 2, d], None)?;
        file.refuse_other_tensors(|name| name == AES_EMB)?;
        Ok(Self(Arc::new(Inner {
            file,
            common,
            aes_emb,
        })))
    }

    /// Writes the file, whole or not at all.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        file::write_atomically(path.as_ref(), self.0.file.bytes())
    }

    /// The kind of U-Net it is for.
    pub fn base(&self) -> Base {
        self.0.common.base
    }

    /// The labels, in the order of the file.
    pub fn labels(&self) -> &Labels {
        &self.0.common.labels
    }

    /// C, the tokens of one chunk of context.
    pub fn context_tokens(&self) -> usize {
        self.0.common.context_tokens
    }

    /// d, the width of the context.
    pub fn context_dim(&self) -> usize {
        self.0.aes_emb.shape()[2]
    }

    /// AesEmb \[N, 2, d\]: positive and negative feature of every label (paper, eq. 4).
    pub fn aes_emb(&self) -> &Tensor {
        &self.0.aes_emb
    }

    /// Every metadata key of the file.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        self.0.file.metadata()
    }
}
