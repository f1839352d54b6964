//! Tests of the public API. One binary, so that it links once.

mod attention;
mod files;
mod hostile;
mod parts;
mod values;
