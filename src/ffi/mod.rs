//! The C API, `include/vmix.h`: thin, with every argument checked before it is used.
//!
//! cbindgen writes the data of `types.rs` into `vmix_types.h`, safer-ffi the functions and handles
//! of the other files into `vmix.h`; `make headers` runs both (tests/rust/headers.rs).

mod adapter;
mod argument;
mod boundary;
mod bridge;
mod library;
mod mixing;
mod texts;
mod types;
mod values;
