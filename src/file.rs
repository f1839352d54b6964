//! safetensors files: those of VMix in memory, base models mapped. Nothing in them is believed before it
//! is checked.

use std::{
    collections::BTreeMap,
    fs, io,
    io::{Read, Write},
    ops::Range,
    path::Path,
    sync::OnceLock,
};

#[cfg(feature = "clip")]
use memmap2::Mmap;
use safetensors::{SafeTensorError, SafeTensors};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::{DType, Error, Result, Tensor, error::presentable, json::UniqueHeader};

/// Characters of a file's own words in a message.
const LONGEST_FOUND: usize = 400;

/// A safetensors file whose header has been read and checked.
#[derive(Debug)]
pub(crate) struct File {
    name: String,
    bytes: Bytes,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
    sha256: OnceLock<String>,
}

#[derive(Debug)]
enum Bytes {
    #[cfg(feature = "clip")]
    Mapped(Mmap),
    Owned(Vec<u8>),
}

#[derive(Debug)]
struct Entry {
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// A tensor that still lies in its file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    pub dtype: DType,
    pub shape: &'a [usize],
    pub bytes: &'a [u8],
}

/// Of a larger file only the header is read first: base models have gigabytes.
const LARGE: u64 = 1 << 26;
/// The largest file that the format allows.
const LARGEST: u64 = 1 << 32;

impl File {
    /// Reads a VMix file whole. A large file that is none, such as a base model, is not read beyond its
    /// header.
    pub fn read(path: &Path) -> Result<Self> {
        let io_error = |source| Error::Io {
            path: path.to_owned(),
            source,
        };
        // Asked before opening: a pipe would wait for somebody to write.
        refuse_what_is_no_file(path).map_err(io_error)?;
        let mut file = fs::File::open(path).map_err(io_error)?;
        let len = file.metadata().map_err(io_error)?.len();
        let name = path.display().to_string();
        let mut bytes = Vec::new();
        if len > LARGE {
            (&mut file)
                .take(8)
                .read_to_end(&mut bytes)
                .map_err(io_error)?;
            let header = bytes.first_chunk().map_or(0, |n| u64::from_le_bytes(*n));
            (&mut file)
                .take(header.min(LONGEST_HEADER))
                .read_to_end(&mut bytes)
                .map_err(io_error)?;
            let size = usize::try_from(len).unwrap_or(usize::MAX);
            if let Some(detail) = explain(&bytes, size) {
                return Err(Error::Safetensors {
                    file: name,
                    detail: format!(" ({detail})"),
                    source: SafeTensorError::MetadataIncompleteBuffer,
                });
            }
            let holds = |word: &[u8]| bytes.windows(word.len()).any(|part| part == word);
            if !holds(b"vmix.format") {
                return Err(Error::Metadata {
                    file: name,
                    key: "vmix.format".to_owned(),
                    expected: crate::metadata::expected_format(holds(b"lora_")),
                    found: "no such key".to_owned(),
                });
            }
            if len > LARGEST {
                let expected = format!("at most {LARGEST} bytes");
                return Err(Error::argument(name, expected, len.to_string()));
            }
        }
        let size = usize::try_from(len).unwrap_or(usize::MAX);
        if bytes
            .try_reserve_exact(size - bytes.len().min(size))
            .is_err()
        {
            return Err(Error::OutOfMemory { bytes: size });
        }
        file.read_to_end(&mut bytes).map_err(io_error)?;
        Self::parse(name, Bytes::Owned(bytes))
    }

    /// Maps the file and reads its header; no other page is touched.
    #[cfg(feature = "clip")]
    pub fn map(path: &Path) -> Result<Self> {
        let io_error = |source| Error::Io {
            path: path.to_owned(),
            source,
        };
        refuse_what_is_no_file(path).map_err(io_error)?;
        let file = fs::File::open(path).map_err(io_error)?;
        // SAFETY: a mapping is sound as long as nobody truncates or rewrites the file in place
        // while it is open. Like every reader of safetensors we rely on that for base models.
        let map = unsafe { Mmap::map(&file) }.map_err(io_error)?;
        Self::parse(path.display().to_string(), Bytes::Mapped(map))
    }

    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self> {
        Self::named("bytes", bytes)
    }

    /// Bytes, and what messages call them.
    pub fn named(name: &str, bytes: Vec<u8>) -> Result<Self> {
        Self::parse(name.to_owned(), Bytes::Owned(bytes))
    }

    /// What messages call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn parse(name: String, bytes: Bytes) -> Result<Self> {
        let refused = |source| Error::Safetensors {
            file: name.clone(),
            detail: explain(bytes.as_ref(), bytes.as_ref().len())
                .map_or(String::new(), |detail| format!(" ({detail})")),
            source,
        };
        let (header_len, header) = SafeTensors::read_metadata(bytes.as_ref()).map_err(refused)?;
        let data_start = size_of::<u64>() + header_len;
        let json = &bytes.as_ref()[size_of::<u64>()..data_start];
        serde_json::from_slice::<UniqueHeader>(json)
            .map_err(|e| refused(SafeTensorError::InvalidHeaderDeserialization(e)))?;
        let entries = header
            .tensors()
            .into_iter()
            .map(|(tensor, info)| {
                let (start, end) = info.data_offsets;
                let entry = Entry {
                    dtype: info.dtype,
                    shape: info.shape.clone(),
                    range: data_start + start..data_start + end,
                };
                (tensor, entry)
            })
            .collect();
        let metadata = header.metadata().iter().flatten();
        let metadata = metadata.map(|(k, v)| (k.clone(), v.clone())).collect();
        Ok(Self {
            name,
            bytes,
            entries,
            metadata,
            sha256: OnceLock::new(),
        })
    }

    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_ref()
    }

    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    pub fn has_tensor(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// SHA-256 of the whole file in hexadecimal, as `sha256sum` prints it.
    pub fn sha256(&self) -> &str {
        self.sha256.get_or_init(|| {
            let digest = Sha256::digest(self.bytes());
            digest.iter().map(|byte| format!("{byte:02x}")).collect()
        })
    }

    /// The tensor of that name, whatever its shape.
    pub fn tensor(&self, name: &str) -> Result<View<'_>> {
        let entry = self
            .entries
            .get(name)
            .ok_or_else(|| self.tensor_error(name, "a tensor", "no such tensor"))?;
        let dtype = DType::try_from(entry.dtype)
            .map_err(|found| self.tensor_error(name, "F32, F16 or BF16", format!("{found:?}")))?;
        Ok(View {
            dtype,
            shape: &entry.shape,
            bytes: &self.bytes()[entry.range.clone()],
        })
    }

    /// The tensor of that name and shape.
    pub fn tensor_of_shape(&self, name: &str, shape: &[usize]) -> Result<View<'_>> {
        if !self.has_tensor(name) {
            return Err(self.tensor_error(name, format!("shape {shape:?}"), "no such tensor"));
        }
        let view = self.tensor(name)?;
        if view.shape != shape {
            let found = format!("shape {:?}", view.shape);
            return Err(self.tensor_error(name, format!("shape {shape:?}"), found));
        }
        Ok(view)
    }

    /// A small tensor as f32, read and checked to be finite.
    pub fn small_tensor(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let view = self.tensor_of_shape(name, shape)?;
        let mut values = vec![0.0; view.bytes.len() / view.dtype.size()];
        crate::tensor::widen(view.dtype, view.bytes, &mut values);
        match values.iter().find(|x| !x.is_finite()) {
            None => Ok(values),
            Some(x) => Err(self.tensor_error(name, "finite values", x.to_string())),
        }
    }

    /// The size of a matrix along `axis`, above 0; `expected` is its shape for messages.
    pub fn width(&self, name: &str, axis: usize, expected: &str) -> Result<usize> {
        let shape = self.tensor(name)?.shape;
        if shape.len() == 2 && shape[axis] > 0 {
            return Ok(shape[axis]);
        }
        Err(self.tensor_error(name, expected, format!("shape {shape:?}")))
    }

    /// A tensor that must be F32, checked to be finite.
    pub fn f32_tensor(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let dtype = self.tensor_of_shape(name, shape)?.dtype;
        if dtype != DType::F32 {
            let found = format!("{:?}", safetensors::Dtype::from(dtype));
            return Err(self.tensor_error(name, "F32", found));
        }
        self.small_tensor(name, shape)
    }

    /// A tensor in the dtype that it has, checked to be finite and of the dtype of others, if given.
    pub fn finite_tensor(
        &self,
        name: &str,
        shape: &[usize],
        dtype: Option<DType>,
    ) -> Result<Tensor> {
        let view = self.tensor_of_shape(name, shape)?;
        if let Some(dtype) = dtype.filter(|dtype| *dtype != view.dtype) {
            let expected = format!("{dtype}, as the other tensors");
            return Err(self.tensor_error(name, expected, view.dtype.name()));
        }
        let tensor = view.to_tensor();
        match tensor.is_finite() {
            true => Ok(tensor),
            false => Err(self.tensor_error(name, "finite values", "NaN or infinity")),
        }
    }

    /// Refuses tensors that are not among the known ones.
    pub fn refuse_other_tensors(&self, known: impl Fn(&str) -> bool) -> Result<()> {
        match self.tensor_names().find(|name| !known(name)) {
            None => Ok(()),
            Some(name) => Err(self.tensor_error(name, "no such tensor", "one")),
        }
    }

    /// A required metadata value.
    pub fn meta(&self, key: &str, expected: &str) -> Result<&str> {
        match self.metadata.get(key) {
            Some(value) => Ok(value),
            None => Err(self.meta_error(key, expected, "no such key")),
        }
    }

    /// A required metadata value that `parse` understands.
    pub fn parse_meta<T>(
        &self,
        key: &str,
        expected: &str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Result<T> {
        let value = self.meta(key, expected)?;
        parse(value).ok_or_else(|| self.meta_error(key, expected, format!("`{value}`")))
    }

    pub fn meta_error(
        &self,
        key: &str,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Error {
        Error::Metadata {
            file: self.name.clone(),
            key: key.to_owned(),
            expected: expected.into(),
            found: presentable(&found.into(), LONGEST_FOUND),
        }
    }

    pub fn tensor_error(
        &self,
        tensor: &str,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Error {
        Error::Tensor {
            file: self.name.clone(),
            tensor: presentable(tensor, LONGEST_FOUND),
            expected: expected.into(),
            found: presentable(&found.into(), LONGEST_FOUND),
        }
    }
}

/// Longest header that the safetensors crate reads.
const LONGEST_HEADER: u64 = 100_000_000;

/// What a file is that people mistake for a safetensors file, by its first bytes.
fn mistaken_for(bytes: &[u8]) -> Option<&'static str> {
    // A length that may be one is believed, whatever letters its bytes are.
    let length = bytes
        .first_chunk::<8>()
        .map(|first| u64::from_le_bytes(*first));
    if length.is_some_and(|length| length <= LONGEST_HEADER) {
        return None;
    }
    let begins = |magic: &[u8]| {
        bytes
            .get(..magic.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(magic))
    };
    if begins(b"<!doctype") || begins(b"<html") {
        Some("it is a web page: the address that it came from leads to a page, not to the file")
    } else if begins(b"version https://git-lfs") {
        Some("it is a Git LFS pointer: `git lfs pull` fetches the file that it stands for")
    } else if begins(b"PK\x03\x04") {
        Some("it is a zip archive, as `torch.save` writes: a pickle, which is never loaded")
    } else if matches!(bytes, [0x80, 2..=5, ..]) {
        Some("it is a pickle, which can run programs and is never loaded")
    } else {
        None
    }
}

/// What is wrong with a file of `len` bytes that begins with these, its header among them, where that can
/// be said.
fn explain(bytes: &[u8], len: usize) -> Option<String> {
    if let Some(other) = mistaken_for(bytes) {
        return Some(other.to_owned());
    }
    let (size, rest) = bytes.split_first_chunk::<8>()?;
    let size = u64::from_le_bytes(*size);
    let Some(json) = usize::try_from(size).ok().and_then(|size| rest.get(..size)) else {
        return Some(format!(
            "the first 8 bytes ask for a header of {size}, the file has {len}"
        ));
    };
    let header: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(json).ok()?;
    let mut expected = 0;
    for (name, tensor) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        let offsets = tensor.get("data_offsets")?;
        let (start, end) = (offsets.get(0)?.as_u64()?, offsets.get(1)?.as_u64()?);
        let shape = tensor.get("shape")?.as_array()?;
        let count = shape
            .iter()
            .try_fold(1u64, |n, size| n.checked_mul(size.as_u64()?));
        let dtype = safetensors::Dtype::deserialize(tensor.get("dtype")?).ok()?;
        let wanted = count.and_then(|n| n.checked_mul(dtype.bitsize() as u64));
        if wanted
            != end
                .checked_sub(start)
                .and_then(|bytes| bytes.checked_mul(8))
        {
            return Some(format!(
                "tensor `{name}`, whose offsets do not fit its shape and dtype"
            ));
        }
        expected = expected.max(end);
    }
    let expected = expected.checked_add(size)?.checked_add(8)?;
    let differs = expected != len as u64;
    differs.then(|| format!("{expected} bytes expected, {len} found"))
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            #[cfg(feature = "clip")]
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }
}

impl View<'_> {
    pub fn to_tensor(self) -> Tensor {
        Tensor::from_bytes(self.shape, self.dtype, self.bytes)
    }
}

impl safetensors::View for &Tensor {
    fn dtype(&self) -> safetensors::Dtype {
        Tensor::dtype(self).into()
    }

    fn shape(&self) -> &[usize] {
        Tensor::shape(self)
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        self.bytes().into()
    }

    fn data_len(&self) -> usize {
        self.bytes().len()
    }
}

/// The bytes of a safetensors file; equal content gives equal bytes.
pub(crate) fn serialize<'a>(
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>> {
    let refused = |source| Error::Safetensors {
        file: "bytes".to_owned(),
        detail: String::new(),
        source,
    };
    // The safetensors crate takes metadata as a HashMap, which it writes in a different order every
    // time. It gets none, and the header is written again with the metadata in alphabetical order.
    let file = safetensors::serialize(tensors, None).map_err(refused)?;
    let (len, _) = SafeTensors::read_metadata(&file).map_err(refused)?;
    let (header, data) = file[size_of::<u64>()..].split_at(len);
    let json = |e| refused(SafeTensorError::JsonError(e));
    let mut header: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(header).map_err(json)?;
    let metadata = serde_json::to_value(metadata).map_err(json)?;
    header.insert("__metadata__".to_owned(), metadata);
    let mut header = serde_json::to_vec(&header).map_err(json)?;
    header.resize(header.len().next_multiple_of(size_of::<u64>()), b' ');
    let mut bytes = Vec::with_capacity(size_of::<u64>() + header.len() + data.len());
    bytes.extend((header.len() as u64).to_le_bytes());
    bytes.extend(header);
    bytes.extend(data);
    Ok(bytes)
}

/// Directories, devices and pipes are none.
fn refuse_what_is_no_file(path: &Path) -> io::Result<()> {
    let kind = fs::metadata(path)?;
    if kind.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if !kind.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    Ok(())
}

/// Temporary files, for a program that is stopped while it writes.
pub(crate) mod unfinished {
    use std::{
        collections::BTreeSet,
        io,
        path::PathBuf,
        sync::{Mutex, MutexGuard, PoisonError},
    };

    use tempfile::NamedTempFile;

    static FILES: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

    fn files() -> MutexGuard<'static, BTreeSet<PathBuf>> {
        FILES.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a file in the list.
    pub(super) struct Entry(PathBuf);

    impl Drop for Entry {
        fn drop(&mut self) {
            files().remove(&self.0);
        }
    }

    pub(super) fn create(
        create: impl FnOnce() -> io::Result<NamedTempFile>,
    ) -> io::Result<(NamedTempFile, Entry)> {
        let mut files = files();
        let file = create()?;
        files.insert(file.path().to_owned());
        let entry = Entry(file.path().to_owned());
        Ok((file, entry))
    }

    /// Removes them. The process must end now: who begins to write after this waits for ever.
    #[cfg(feature = "cli")]
    pub(crate) fn remove() {
        let files = files();
        for file in &*files {
            let _ = std::fs::remove_file(file);
        }
        std::mem::forget(files);
    }
}

/// Writes a file whole or not at all: a reader, or a crash, never sees half of it. A link stays one:
/// what it leads to is replaced.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || -> io::Result<()> {
        let target = match fs::canonicalize(path) {
            Ok(target) => {
                refuse_what_is_no_file(&target)?;
                target
            }
            Err(error) if path.is_symlink() => return Err(error), // which leads nowhere
            Err(_) => path.to_owned(),
        };
        let folder = match target.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let mut builder = tempfile::Builder::new();
        builder.prefix(".vmix-");
        // Temporary files are private to their owner; a model file is as the umask says.
        #[cfg(unix)]
        let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o666);
        #[cfg(unix)]
        builder.permissions(permissions);
        // By its kind: the message would name the temporary file.
        let (file, _unfinished) =
            unfinished::create(|| builder.tempfile_in(folder)).map_err(|e| e.kind())?;
        file.as_file().write_all(bytes)?;
        file.persist(target).map_err(|e| e.error)?;
        Ok(())
    };
    write().map_err(|source| Error::Io {
        path: path.to_owned(),
        source,
    })
}
