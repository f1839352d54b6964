//! Dense row-major tensors in the three dtypes that files may hold.

use half::{bf16, f16};

use crate::{halves, metadata::named};

named! {
    /// Element type of a tensor; the names are those of torch and numpy.
    pub enum DType {
        /// 32-bit IEEE float.
        F32 = "float32",
        /// 16-bit IEEE float.
        F16 = "float16",
        /// bfloat16.
        BF16 = "bfloat16",
    }
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }
}

impl TryFrom<safetensors::Dtype> for DType {
    type Error = safetensors::Dtype;

    fn try_from(dtype: safetensors::Dtype) -> Result<Self, Self::Error> {
        match dtype {
            safetensors::Dtype::F32 => Ok(Self::F32),
            safetensors::Dtype::F16 => Ok(Self::F16),
            safetensors::Dtype::BF16 => Ok(Self::BF16),
            other => Err(other),
        }
    }
}

impl From<DType> for safetensors::Dtype {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32,
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
        }
    }
}

/// The elements of a [`Tensor`].
#[derive(Debug, Clone, PartialEq)]
pub enum Data {
    /// 32-bit IEEE floats.
    F32(Vec<f32>),
    /// 16-bit IEEE floats.
    F16(Vec<f16>),
    /// bfloat16.
    BF16(Vec<bf16>),
}

/// A dense row-major tensor that owns its elements.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    shape: Vec<usize>,
    data: Data,
}

impl Tensor {
    /// A tensor of `shape` over `data`.
    ///
    /// # Panics
    /// When the number of elements is not what the shape says.
    pub fn new(shape: impl Into<Vec<usize>>, data: Data) -> Self {
        let shape = shape.into();
        let len = match &data {
            Data::F32(v) => v.len(),
            Data::F16(v) => v.len(),
            Data::BF16(v) => v.len(),
        };
        assert_eq!(shape.iter().product::<usize>(), len, "shape {shape:?}");
        Self { shape, data }
    }

    /// `values`, rounded to nearest even where `dtype` is narrower than f32.
    pub(crate) fn rounded(shape: impl Into<Vec<usize>>, values: Vec<f32>, dtype: DType) -> Self {
        let data = match dtype {
            DType::F32 => Data::F32(values),
            DType::F16 => Data::F16(converted(&values, halves::round)),
            DType::BF16 => Data::BF16(converted(&values, halves::round)),
        };
        Self::new(shape, data)
    }

    /// The size of every dimension, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements, row-major.
    pub fn data(&self) -> &Data {
        &self.data
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        match self.data {
            Data::F32(_) => DType::F32,
            Data::F16(_) => DType::F16,
            Data::BF16(_) => DType::BF16,
        }
    }

    /// The elements as bytes, in the little-endian order of safetensors files.
    pub fn bytes(&self) -> &[u8] {
        const { assert!(cfg!(target_endian = "little"), "files are little-endian") };
        match &self.data {
            Data::F32(v) => bytemuck::cast_slice(v),
            Data::F16(v) => bytemuck::cast_slice(v),
            Data::BF16(v) => bytemuck::cast_slice(v),
        }
    }

    /// The elements as f32; exact for all three dtypes.
    pub fn to_f32(&self) -> Vec<f32> {
        let bytes = self.bytes();
        let mut out = vec![0.0; bytes.len() / self.dtype().size()];
        widen(self.dtype(), bytes, &mut out);
        out
    }

    pub(crate) fn is_finite(&self) -> bool {
        match &self.data {
            Data::F32(v) => v.iter().all(|x| x.is_finite()),
            Data::F16(v) => v.iter().all(|x| x.is_finite()),
            Data::BF16(v) => v.iter().all(|x| x.is_finite()),
        }
    }

    /// Reads a tensor from the bytes of a file, whatever their alignment.
    pub(crate) fn from_bytes(shape: &[usize], dtype: DType, bytes: &[u8]) -> Self {
        let data = match dtype {
            DType::F32 => Data::F32(bytemuck::pod_collect_to_vec(bytes)),
            DType::F16 => Data::F16(bytemuck::pod_collect_to_vec(bytes)),
            DType::BF16 => Data::BF16(bytemuck::pod_collect_to_vec(bytes)),
        };
        Self::new(shape, data)
    }
}

/// As many numbers of another type.
fn converted<T: Clone + Default>(values: &[f32], convert: impl Fn(&[f32], &mut [T])) -> Vec<T> {
    let mut out = vec![T::default(); values.len()];
    convert(values, &mut out);
    out
}

/// Widens bytes of a tensor to f32, whatever their alignment; exact for all three dtypes.
pub(crate) fn widen(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    debug_assert_eq!(bytes.len(), out.len() * dtype.size());
    match dtype {
        DType::F32 => bytemuck::cast_slice_mut(out).copy_from_slice(bytes),
        DType::F16 => halves::widen::<f16>(bytemuck::cast_slice(bytes), out),
        DType::BF16 => halves::widen::<bf16>(bytemuck::cast_slice(bytes), out),
    }
}
