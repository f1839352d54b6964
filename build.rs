//! What the C library says of itself: its target and profile, and the name that programs link to.

use std::env;

/// `VMIX_ABI_VERSION`'s major number; a test compares the two.
const ABI_MAJOR: u32 = 1;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for (variable, source) in [("VMIX_TARGET", "TARGET"), ("VMIX_PROFILE", "PROFILE")] {
        let value = env::var(source).expect("cargo sets it");
        println!("cargo::rustc-env={variable}={value}");
    }
    match env::var("CARGO_CFG_TARGET_OS").as_deref() {
        Ok("linux" | "android" | "freebsd") => {
            println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libvmix.so.{ABI_MAJOR}");
        }
        Ok("macos") => {
            println!(
                "cargo::rustc-cdylib-link-arg=-Wl,-install_name,@rpath/libvmix.{ABI_MAJOR}.dylib"
            );
        }
        _ => {}
    }
}
