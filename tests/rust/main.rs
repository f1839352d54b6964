//! Tests of the public API. One binary, so that it links once.

mod attention;
#[cfg(feature = "clip")]
mod clip;
mod files;
mod hostile;
mod parts;
mod values;
