//! VMix aesthetics adapters for Stable Diffusion U-Nets.
//!
//! An adapter turns aesthetic labels into one tensor per cross-attention layer, V_a, that is mixed
//! into the layer's values (paper, eq. 9):
//!
//! ```text
//! x̂ = softmax(Q·Kᵀ/√d)·V_c + λ·softmax(Q·Kᵀ/√d)·V_a = softmax(Q·Kᵀ/√d)·(V_c + λ·V_a)
//! ```
//!
//! For any label weights w, V_a is a product A(w)·B: a coefficient for every token and row, times the
//! value rows of the layer, which are all that an adapter holds:
//!
//! ```no_run
//! use vmix::{Adapter, DType, Selection};
//!
//! let adapter = Adapter::open("adapter.safetensors")?;
//! let values = adapter.values(&Selection::All, adapter.apply_to(), DType::F16)?;
//! values.save("preset.safetensors")?;
//! # Ok::<(), vmix::Error>(())
//! ```
//!
//! Files are specified in `docs/format.md`.

mod adapter;
#[cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    allow(dead_code, unused_macros)
)]
mod attention;
mod buffer;
#[cfg(feature = "clip")]
mod checkpoint;
#[cfg(feature = "cli")]
pub mod cli;
#[cfg(feature = "clip")]
mod clip;
mod coefficients;
#[cfg(feature = "clip")]
mod component;
mod convert;
mod error;
mod exp2;
#[cfg(feature = "capi")]
mod ffi;
mod file;
mod halves;
#[cfg(feature = "clip")]
mod init;
mod json;
#[cfg(feature = "clip")]
mod label_list;
mod labels;
#[cfg_attr(
    not(any(target_arch = "x86_64", target_arch = "aarch64")),
    allow(dead_code)
)]
mod lanes;
mod matrices;
mod merge;
mod metadata;
mod preset;
mod product;
mod rows;
mod tensor;
pub mod threads;
mod unet;
mod untrained;
mod values;
mod view;

pub use adapter::Adapter;
pub use attention::{Attention, Kernel, attention, mix_values};
#[cfg(feature = "clip")]
pub use checkpoint::Checkpoint;
#[cfg(feature = "clip")]
pub use clip::{
    Activation, CLIP_MERGES, ClipConfig, ClipOutput, ClipTextModel, TextEncoder, Tokenizer,
};
pub use coefficients::Row;
pub use error::Error;
#[cfg(feature = "clip")]
pub use init::init_adapter;
pub use labels::{Label, LabelKey, Labels, Selection};
pub use merge::merge;
use metadata::Kind;
pub use metadata::{ApplyTo, CoefficientKind};
pub use preset::{Opened, open};
pub use tensor::{DType, Data, Tensor};
pub use unet::{Base, Layer, Layers, ldm_name};
pub use untrained::Untrained;
pub use values::Values;
pub use view::{TensorView, TensorViewMut};

/// What every fallible function of this crate returns.
pub type Result<T> = std::result::Result<T, Error>;

/// The README's Rust, compiled with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
