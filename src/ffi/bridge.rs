//! How safer-ffi names, in `vmix.h`, what cbindgen defines in `vmix_types.h`.

use safer_ffi::layout::{LegacyCType, OpaqueKind, ReprC};

use super::types::*;

/// Tells safer-ffi that a type's C name is its Rust name, and that another header defines it.
macro_rules! defined_elsewhere {
    ($($type:ident),* $(,)?) => {$(
        // SAFETY: the types are `repr(C)`, `repr(transparent)` or `repr(u32)` with the layout that
        // cbindgen gives them in C. Of the one enum, VmixStatus, values only ever leave; zero is Ok.
        unsafe impl LegacyCType for $type {
            type OPAQUE_KIND = OpaqueKind::Concrete;
            printed_as!(stringify!($type), |_| Ok(()));
        }

        // SAFETY: as above; what the fields say is checked wherever one is read.
        unsafe impl ReprC for $type {
            type CLayout = Self;

            fn is_valid(_: &Self) -> bool {
                true
            }
        }
    )*};
}

/// Declares the C side of a handle: an incomplete struct of the same name.
macro_rules! opaque_handle {
    ($type:ident, $doc:literal) => {
        const _: () = {
            #[derive(Clone, Copy)]
            pub struct Incomplete;

            // SAFETY: only ever used behind a pointer.
            unsafe impl safer_ffi::layout::LegacyCType for Incomplete {
                type OPAQUE_KIND = safer_ffi::layout::OpaqueKind::Opaque;
                printed_as!(stringify!($type), |definer: &mut dyn Definer| {
                    definer.define_once(stringify!($type), &mut |definer| {
                        let name = stringify!($type);
                        writeln!(definer.out(), "/** {} */", $doc)?;
                        writeln!(definer.out(), "typedef struct {name} {name};\n")
                    })
                });
            }

            // SAFETY: only ever used behind a pointer.
            unsafe impl safer_ffi::layout::ReprC for $type {
                type CLayout = Incomplete;

                fn is_valid(_: &Incomplete) -> bool {
                    false
                }
            }
        };
    };
}
pub(super) use opaque_handle;

/// The methods of `LegacyCType`, which exist only where headers are generated.
macro_rules! printed_as {
    ($name:expr, $define:expr) => {
        #[cfg(feature = "headers")]
        fn c_short_name_fmt(f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str($name)
        }

        #[cfg(feature = "headers")]
        fn c_define_self(definer: &mut dyn safer_ffi::headers::Definer) -> std::io::Result<()> {
            #[allow(unused_imports)]
            use safer_ffi::headers::Definer;
            ($define)(definer)
        }

        #[cfg(feature = "headers")]
        fn csharp_define_self(_: &mut dyn safer_ffi::headers::Definer) -> std::io::Result<()> {
            unimplemented!("only C headers are generated")
        }

        #[cfg(feature = "headers")]
        fn c_var_fmt(f: &mut std::fmt::Formatter<'_>, variable: &str) -> std::fmt::Result {
            let space = if variable.is_empty() { "" } else { " " };
            write!(f, "{}{space}{variable}", $name)
        }
    };
}
pub(super) use printed_as;

defined_elsewhere!(
    VmixStatus,
    VmixPass,
    VmixView,
    VmixViewMut,
    VmixAdapterInfo,
    VmixValuesInfo,
    VmixLabel,
    VmixLayer,
    VmixValuesParams,
    VmixMixParams,
    VmixAttentionParams,
);
