//! Tests of the public API. One binary, so that it links once.

mod files;
mod parts;
mod values;
