//! Tensors in and out through DLPack.

use std::{ffi::c_void, sync::Arc};

use dlpark::{
    DlpackFlags, Managed, ManagedTensorBase,
    ffi::{DLDataType, DLDevice, DLManagedTensor, DLManagedTensorVersioned},
    metadata::Dynamic,
    python::{DlpackExporter, ExportRequest, ImportedDlpack, export_dlpack, from_dlpack},
    tensor::TensorRef,
};
use half::{bf16, f16};
use pyo3::{
    exceptions::{PyBufferError, PyTypeError},
    prelude::*,
    types::PyTuple,
};
use vmix::{DType, Data, TensorView};

use crate::{VMixError, selection::type_name, to_py};

/// A read-only tensor that torch and numpy take without a copy.
#[pyclass(module = "vmix", frozen)]
pub struct Tensor(pub Arc<vmix::Tensor>);

#[pymethods]
impl Tensor {
    #[getter]
    fn shape<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.0.shape())
    }

    #[getter]
    fn dtype(&self) -> &'static str {
        self.0.dtype().name()
    }

    #[pyo3(signature = (*, stream=None, max_version=None, dl_device=None, copy=None))]
    fn __dlpack__<'py>(
        &self,
        py: Python<'py>,
        stream: Option<&Bound<'py, PyAny>>,
        max_version: Option<(u32, u32)>,
        dl_device: Option<(u32, i32)>,
        copy: Option<bool>,
    ) -> PyResult<Py<PyAny>> {
        let request = ExportRequest::parse(stream, max_version, dl_device, copy)?;
        export_dlpack(self, py, request)
    }

    fn __dlpack_device__(&self) -> (u32, i32) {
        (DLDevice::CPU.device_type.0, DLDevice::CPU.device_id)
    }

    fn __repr__(&self) -> String {
        format!(
            "Tensor(shape={:?}, dtype={})",
            self.0.shape(),
            self.0.dtype()
        )
    }
}

impl Tensor {
    fn export<M: ManagedTensorBase>(&self) -> PyResult<Managed<M>> {
        let shape: Vec<i64> = self.0.shape().iter().map(|&n| n as i64).collect();
        let mut strides = vec![1i64; shape.len()];
        for axis in (1..shape.len()).rev() {
            strides[axis - 1] = strides[axis] * shape[axis];
        }
        let (data, dtype): (*const c_void, DLDataType) = match self.0.data() {
            Data::F32(v) => (v.as_ptr().cast(), DLDataType::of::<f32>()),
            Data::F16(v) => (v.as_ptr().cast(), DLDataType::of::<f16>()),
            Data::BF16(v) => (v.as_ptr().cast(), DLDataType::of::<bf16>()),
        };
        let failed = |e: &dyn std::fmt::Display| PyBufferError::new_err(e.to_string());
        let prepared = Dynamic::new(shape.as_slice(), strides.as_slice())
            .prepare_as::<M>()
            .map_err(|e| failed(&e))?;
        let mut tensor = prepared.initialize(Arc::clone(&self.0));
        tensor.set_data(data.cast_mut());
        tensor.set_dtype(dtype);
        tensor.set_device(DLDevice::CPU);
        // SAFETY: shape, strides and dtype describe the elements that `data` points to, and the
        // Arc in the managed context keeps them alive and in place until the deleter runs.
        Ok(unsafe { tensor.finish() })
    }
}

impl DlpackExporter for Tensor {
    fn device(&self) -> DLDevice {
        DLDevice::CPU
    }

    /// Read-only is a promise of the documentation: consumers without versioned DLPack, numpy
    /// among them, could not take the tensor at all if it were flagged.
    fn flags(&self) -> DlpackFlags {
        DlpackFlags::empty()
    }

    fn prepare_export(&self, _: Python<'_>, _: &ExportRequest<'_>) -> PyResult<()> {
        Ok(())
    }

    fn export_legacy(&self, _: Python<'_>) -> PyResult<Managed<DLManagedTensor>> {
        self.export()
    }

    fn export_versioned(&self, _: Python<'_>) -> PyResult<Managed<DLManagedTensorVersioned>> {
        self.export()
    }
}

/// Copies a tensor of any library in; `name` is what messages call it.
pub fn import(name: &str, object: &Bound<'_, PyAny>) -> PyResult<vmix::Tensor> {
    let borrowed = Borrowed::new(name, object)?;
    let tensor = borrowed.validated()?;
    let elements = match borrowed.dtype {
        DType::F32 => gather(&tensor).map(Data::F32),
        DType::F16 => gather(&tensor).map(Data::F16),
        DType::BF16 => gather(&tensor).map(Data::BF16),
    };
    let data = elements.map_err(|e| refuse(name, "a valid DLPack tensor", &e))?;
    let shape: Vec<usize> = tensor.shape().iter().map(|&n| n as usize).collect();
    Ok(vmix::Tensor::new(shape, data))
}

/// A tensor of any library, where it lies.
pub struct Borrowed {
    name: String,
    imported: ImportedDlpack,
    pub dtype: DType,
}

fn refuse(name: &str, expected: &str, found: &str) -> PyErr {
    VMixError::new_err(format!("{name}: expected {expected}, found {found}"))
}

/// Takes the tensor without a copy.
fn share(object: &Bound<'_, PyAny>) -> PyResult<ImportedDlpack> {
    from_dlpack(object.as_borrowed(), None, None).or_else(|error| {
        // Before torch 2.9 and numpy 2.1, `__dlpack__` takes no `max_version`.
        if !error.is_instance_of::<PyTypeError>(object.py()) {
            return Err(error);
        }
        let capsule = object.call_method0("__dlpack__")?;
        from_dlpack(capsule.as_borrowed(), None, None)
    })
}

impl Borrowed {
    /// `name` is what messages call it.
    pub fn new(name: &str, object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let refuse = |expected: &str, found: &str| refuse(name, expected, found);
        if !object.hasattr("__dlpack__")? {
            return Err(PyTypeError::new_err(format!(
                "{name}: expected a tensor (torch, numpy or anything with __dlpack__), found {}",
                type_name(object)
            )));
        }
        // DLPack would take it, and gradients would end here without a word.
        if let Ok(flag) = object.getattr("requires_grad")
            && flag.is_truthy()?
        {
            let expected = "a tensor outside of autograd (call .detach())";
            return Err(refuse(expected, "one that requires grad"));
        }
        // torch refuses to name devices that DLPack has no number for.
        let device = object.call_method0("__dlpack_device__");
        let device = device.and_then(|device| device.extract::<(u32, i32)>());
        if !device.is_ok_and(|(kind, _)| kind == DLDevice::CPU.device_type.0) {
            let found = match object.getattr("device") {
                Ok(device) => format!("one on {device}"),
                Err(_) => "one elsewhere".to_owned(),
            };
            return Err(refuse("a tensor on the CPU (call .cpu())", &found));
        }
        let imported = share(object).map_err(|e| {
            refuse(
                "a tensor that DLPack can share",
                &e.value(object.py()).to_string(),
            )
        })?;
        let dtype = imported
            .validate()
            .map_err(|e| refuse("a valid DLPack tensor", &e.to_string()))?
            .dtype();
        let dtype = if dtype == DLDataType::of::<f32>() {
            DType::F32
        } else if dtype == DLDataType::of::<f16>() {
            DType::F16
        } else if dtype == DLDataType::of::<bf16>() {
            DType::BF16
        } else {
            let found = object.getattr("dtype").map(|d| d.to_string());
            let found = found.unwrap_or_else(|_| format!("{dtype:?}"));
            return Err(refuse(&DType::NAMES.join(", "), &found));
        };
        let name = name.to_owned();
        Ok(Self {
            name,
            imported,
            dtype,
        })
    }

    /// The elements, with as many dimensions as asked for: `view` says which of the tensor's
    /// (counted from the last; none: of size 1) is the batch, the tokens, the heads and the head
    /// dim. Where heads and head dim are one dimension, `heads` splits it.
    pub fn view(
        &self,
        order: [Option<usize>; 4],
        heads: Option<usize>,
    ) -> PyResult<TensorView<'_>> {
        let tensor = self.validated()?;
        let invalid =
            |e: &dyn std::fmt::Display| refuse(&self.name, "a valid DLPack tensor", &e.to_string());
        let sizes = tensor.shape();
        let strides = tensor.strides_or_compact().map_err(|e| invalid(&e))?;
        let place = |i: Option<usize>| i.and_then(|i| sizes.len().checked_sub(i + 1));
        let size = |i| place(i).map_or(1, |i| sizes[i] as usize);
        let stride = |i| place(i).map_or(0, |i| strides[i] as isize);
        let mut shape = order.map(size);
        let mut strides = order.map(stride);
        if let Some(heads) = heads {
            if heads == 0 || shape[3] == 0 || shape[3] % heads != 0 {
                let expected = format!("a divisor of the width {} of {}", shape[3], self.name);
                return Err(refuse("heads", &expected, &heads.to_string()));
            }
            let dim = shape[3] / heads;
            (shape[2], shape[3]) = (heads, dim);
            strides[2] = strides[3].wrapping_mul(dim as isize);
        }
        let data: *const u8 = match (tensor.num_elements(), self.dtype) {
            (0, _) => std::ptr::null(),
            // SAFETY: here and below, the offset is inside the tensor, which was validated.
            (_, DType::F32) => unsafe { tensor.offset_data_ptr::<f32>() }
                .map_err(|e| invalid(&e))?
                .cast(),
            // SAFETY: as above.
            (_, DType::F16) => unsafe { tensor.offset_data_ptr::<f16>() }
                .map_err(|e| invalid(&e))?
                .cast(),
            // SAFETY: as above.
            (_, DType::BF16) => unsafe { tensor.offset_data_ptr::<bf16>() }
                .map_err(|e| invalid(&e))?
                .cast(),
        };
        // SAFETY: a validated DLPack tensor on the CPU is readable while its owner is held, which
        // the view borrows.
        unsafe { TensorView::from_raw(&self.name, data, self.dtype, shape, strides) }.map_err(to_py)
    }

    /// Sizes of its dimensions.
    pub fn shape(&self) -> PyResult<Vec<usize>> {
        Ok(self
            .validated()?
            .shape()
            .iter()
            .map(|&n| n as usize)
            .collect())
    }

    pub fn wrong_shape(&self, expected: &str) -> PyErr {
        let found = self
            .shape()
            .map_or("another".into(), |shape| format!("shape {shape:?}"));
        refuse(&self.name, expected, &found)
    }

    fn validated(&self) -> PyResult<TensorRef<'_>> {
        let invalid =
            |e: &dyn std::fmt::Display| refuse(&self.name, "a valid DLPack tensor", &e.to_string());
        self.imported.validate().map_err(|e| invalid(&e))
    }
}

/// The elements in row-major order, whatever the strides.
fn gather<T: Copy + dlpark::DlpackElement>(tensor: &TensorRef<'_>) -> Result<Vec<T>, String> {
    let say = |e: dlpark::tensor::Error| e.to_string();
    if tensor.num_elements() == 0 {
        return Ok(Vec::new());
    }
    if tensor.is_compact().map_err(say)? {
        // SAFETY: a validated DLPack tensor on the CPU is readable while its owner is held, and
        // the caller holds it.
        return Ok(unsafe { tensor.cpu_slice::<T>() }.map_err(say)?.to_vec());
    }
    let strides = tensor.strides_or_compact().map_err(say)?;
    // SAFETY: as above.
    let start = unsafe { tensor.offset_data_ptr::<T>() }.map_err(say)?;
    let shape = tensor.shape();
    let mut out = Vec::with_capacity(tensor.num_elements());
    let mut index = vec![0i64; shape.len()];
    let mut offset = 0i64;
    loop {
        // SAFETY: `offset` is Σ index·stride with every index inside the shape: an element of the
        // tensor by DLPack's own definition of strides.
        out.push(unsafe { start.offset(offset as isize).read_unaligned() });
        let mut axis = shape.len();
        loop {
            if axis == 0 {
                return Ok(out);
            }
            axis -= 1;
            index[axis] += 1;
            offset += strides[axis];
            if index[axis] < shape[axis] {
                break;
            }
            offset -= strides[axis] * shape[axis];
            index[axis] = 0;
        }
    }
}
