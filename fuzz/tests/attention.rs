//! The library's own tests of attention, with AddressSanitizer.

#[path = "../../tests/rust/attention.rs"]
mod attention;
#[allow(dead_code)]
#[path = "../../tests/rust/parts.rs"]
mod parts;
