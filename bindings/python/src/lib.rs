//! `vmix._native`: the Rust library as Python sees it. Wrappers only; the logic is in the crate.
#![allow(missing_docs)] // Python users read python/vmix/_native.pyi

mod adapter;
mod attention;
mod init;
mod selection;
mod tensor;
mod values;

use pyo3::{create_exception, exceptions::PyValueError, prelude::*};

create_exception!(
    vmix,
    VMixError,
    PyValueError,
    "What the library refuses; the message names the thing, what was expected and what came."
);

/// Converts the library's errors; the message is the library's own.
fn to_py(error: vmix::Error) -> PyErr {
    VMixError::new_err(error.to_string())
}

#[pymodule]
mod _native {
    use pyo3::prelude::*;

    #[pymodule_export]
    use super::VMixError;
    #[pymodule_export]
    use super::adapter::{
        Adapter, Label, Layer, Rows, ldm_name, merge_adapters, open, unet_layers,
    };
    #[pymodule_export]
    use super::attention::{attention, get_num_threads, set_num_threads};
    #[pymodule_export]
    use super::init::{
        ClipOutput, TextEncoder, Tokenizer, Untrained, clip_merges, init_adapter, read_label_list,
        run_command,
    };
    #[pymodule_export]
    use super::tensor::Tensor;
    #[pymodule_export]
    use super::values::Values;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
