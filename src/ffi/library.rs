//! Functions about the library as such.

use std::ffi::CStr;

use safer_ffi::{c_char, ffi_export};

use super::{
    boundary::{last_error, status_name},
    types::*,
};
use crate::threads;

/// Version of the binary interface that this library has: VMIX_ABI_VERSION of its own header. Ask
/// VMIX_ABI_COMPATIBLE() whether it will do.
#[ffi_export]
fn vmix_abi_version() -> u32 {
    VMIX_ABI_MAJOR << 16 | VMIX_ABI_MINOR
}

/// Version of the library, such as "0.1.0". Static.
#[ffi_export]
fn vmix_version() -> *const c_char {
    c_text(concat!(env!("CARGO_PKG_VERSION"), "\0"))
}

/// How the library was built: version, target and options, for bug reports. Static.
#[ffi_export]
fn vmix_build_info() -> *const c_char {
    c_text(concat!(
        "vmix ",
        env!("CARGO_PKG_VERSION"),
        ", abi 1.0, ",
        env!("VMIX_TARGET"),
        ", ",
        env!("VMIX_PROFILE"),
        "\0"
    ))
}

/// What went wrong in the last call of this thread that failed: one sentence of UTF-8 that names the
/// thing, what was expected and what was found. Empty before the first failure; calls that succeed
/// leave it as it is. The string belongs to the thread, and lives until its next failure or end.
#[ffi_export]
fn vmix_last_error() -> *const c_char {
    last_error().cast()
}

/// Name of a status, such as "invalid file"; "unknown status" for numbers that are none. Static.
#[ffi_export]
fn vmix_status_name(status: u32) -> *const c_char {
    status_name(status).as_ptr().cast()
}

/// From now on, at most so many threads for each call, of those in a pool that all calls share; 0 for
/// as many as there are cores, or as RAYON_NUM_THREADS says. With 1 a call computes in the thread that
/// makes it, as a host wants that has threads of its own.
#[ffi_export]
fn vmix_set_num_threads(count: usize) {
    threads::set(count);
}

/// How many threads a call may use.
#[ffi_export]
fn vmix_num_threads() -> usize {
    threads::count()
}

/// A literal that ends in NUL.
const fn c_text(text: &'static str) -> *const c_char {
    match CStr::from_bytes_with_nul(text.as_bytes()) {
        Ok(text) => text.as_ptr().cast(),
        Err(_) => panic!("the literal ends in its only NUL"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn build_info_and_build_script_know_the_abi_version() {
        // SAFETY: a static string.
        let info = unsafe { CStr::from_ptr(vmix_build_info().cast()) };
        let abi = format!(", abi {VMIX_ABI_MAJOR}.{VMIX_ABI_MINOR}, ");
        assert!(info.to_str().unwrap().contains(&abi), "{info:?}");
        let script = include_str!("../../build.rs");
        assert!(script.contains(&format!("const ABI_MAJOR: u32 = {VMIX_ABI_MAJOR};")));
    }
}
