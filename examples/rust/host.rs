//! A Rust host that loads the C library at run time, by nothing but the header's promises: it
//! does not link to this crate.
//!
//! ```sh
//! cargo run --example host -- libvmix.so comfy_nodes/demo/adapter.safetensors
//! ```
//!
//! It mixes the values of one layer, and compares them with V_c + λ·V_a in plain Rust.

use std::{
    error::Error,
    ffi::{CStr, CString, c_char, c_void},
    ptr::{null, null_mut},
};

use libloading::{Library, Symbol};

// As in vmix_types.h.
const ABI_MAJOR: u32 = 1;
const ABI_MINOR: u32 = 0;
const DTYPE_F32: u32 = 1;
const PASS_COND: u32 = 1;

#[repr(C)]
struct VmixView {
    struct_size: usize,
    data: *const c_void,
    dtype: u32,
    shape: [i64; 4],
    strides: [i64; 4],
}

#[repr(C)]
struct VmixViewMut {
    struct_size: usize,
    data: *mut c_void,
    dtype: u32,
    shape: [i64; 4],
    strides: [i64; 4],
}

#[repr(C)]
struct VmixMixParams {
    struct_size: usize,
    value: *const VmixViewMut,
    aes_value: *const VmixView,
    strength: *const f32,
    strength_count: usize,
}

/// The functions that this host calls.
struct Vmix<'lib> {
    last_error: Symbol<'lib, unsafe extern "C" fn() -> *const c_char>,
    open: Symbol<
        'lib,
        unsafe extern "C" fn(*const c_char, *mut *mut c_void, *mut *mut c_void) -> u32,
    >,
    adapter_values:
        Symbol<'lib, unsafe extern "C" fn(*const c_void, *const c_void, *mut *mut c_void) -> u32>,
    adapter_free: Symbol<'lib, unsafe extern "C" fn(*mut c_void)>,
    values_free: Symbol<'lib, unsafe extern "C" fn(*mut c_void)>,
    values_get: Symbol<'lib, unsafe extern "C" fn(*const c_void, usize, u32, *mut VmixView) -> u32>,
    mix_values: Symbol<'lib, unsafe extern "C" fn(*const VmixMixParams) -> u32>,
}

impl<'lib> Vmix<'lib> {
    fn load(library: &'lib Library) -> Result<Self, Box<dyn Error>> {
        // SAFETY: the types are those of vmix.h. The ABI rule: same major version, no older minor.
        unsafe {
            let version: Symbol<unsafe extern "C" fn() -> u32> =
                library.get(b"vmix_abi_version")?;
            let (wanted, found) = (ABI_MAJOR << 16 | ABI_MINOR, version());
            if found >> 16 != ABI_MAJOR || found < wanted {
                return Err(format!("ABI {wanted:#x} or a later minor, not {found:#x}").into());
            }
            Ok(Self {
                last_error: library.get(b"vmix_last_error")?,
                open: library.get(b"vmix_open")?,
                adapter_values: library.get(b"vmix_adapter_values")?,
                adapter_free: library.get(b"vmix_adapter_free")?,
                values_free: library.get(b"vmix_values_free")?,
                values_get: library.get(b"vmix_values_get")?,
                mix_values: library.get(b"vmix_mix_values")?,
            })
        }
    }

    fn check(&self, status: u32) -> Result<(), Box<dyn Error>> {
        if status == 0 {
            return Ok(());
        }
        // SAFETY: the string lives until this thread's next failure.
        let message = unsafe { CStr::from_ptr((self.last_error)()) };
        Err(message.to_string_lossy().into())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(library), Some(file)) = (arguments.next(), arguments.next()) else {
        return Err("usage: host LIBRARY FILE".into());
    };
    let file = CString::new(file)?;
    // SAFETY: loading the library runs no code of ours.
    let library = unsafe { Library::new(library)? };
    let vmix = Vmix::load(&library)?;

    // SAFETY: calls as vmix.h describes them; handles are freed once, and the view of V_a is used
    // before its values are freed.
    unsafe {
        let (mut adapter, mut values) = (null_mut(), null_mut());
        vmix.check((vmix.open)(file.as_ptr(), &mut adapter, &mut values))?;
        if !adapter.is_null() {
            let status = (vmix.adapter_values)(adapter, null(), &mut values);
            (vmix.adapter_free)(adapter);
            vmix.check(status)?;
        }
        let mut v_a = VmixView {
            struct_size: size_of::<VmixView>(),
            data: null(),
            dtype: 0,
            shape: [0; 4],
            strides: [0; 4],
        };
        vmix.check((vmix.values_get)(values, 0, PASS_COND, &mut v_a))?;
        assert_eq!(
            v_a.dtype, DTYPE_F32,
            "what vmix_adapter_values gives by default"
        );
        let [_, tokens, _, width] = v_a.shape.map(|size| size as usize);
        let added = std::slice::from_raw_parts(v_a.data.cast::<f32>(), tokens * width);

        // A prompt of two chunks; V_c is any numbers.
        let content: Vec<f32> = (0..2 * tokens * width)
            .map(|i| (i % 31) as f32 - 15.0)
            .collect();
        let mut mixed = content.clone();
        let value = VmixViewMut {
            struct_size: size_of::<VmixViewMut>(),
            data: mixed.as_mut_ptr().cast(),
            dtype: DTYPE_F32,
            shape: [1, 2 * tokens as i64, 1, width as i64],
            strides: [2 * (tokens * width) as i64, width as i64, width as i64, 1],
        };
        let strength = 0.7f32;
        let params = VmixMixParams {
            struct_size: size_of::<VmixMixParams>(),
            value: &value,
            aes_value: &v_a,
            strength: &strength,
            strength_count: 1,
        };
        vmix.check((vmix.mix_values)(&params))?;

        // The same sum in the same precision: equal to the last bit.
        let expected = content
            .iter()
            .zip(added.iter().cycle())
            .map(|(v, a)| v + strength * a);
        let wrong = mixed
            .iter()
            .zip(expected)
            .filter(|(found, expected)| **found != *expected);
        let wrong = wrong.count();
        (vmix.values_free)(values);
        if wrong > 0 {
            return Err(format!("{wrong} of {} values differ", mixed.len()).into());
        }
        println!(
            "{} values mixed, equal to V_c + λ·V_a to the last bit",
            mixed.len()
        );
    }
    Ok(())
}
