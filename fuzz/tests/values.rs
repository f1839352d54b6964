//! The library's own tests of V_a, with AddressSanitizer.

#[allow(dead_code)]
#[path = "../../tests/rust/parts.rs"]
mod parts;
#[path = "../../tests/rust/values.rs"]
mod values;
