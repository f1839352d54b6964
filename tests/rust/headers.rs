//! The C headers: written by `make headers`, compared with the committed ones by the test.

use std::{fs, io, path::Path};

// Linked for the functions that it registers with safer-ffi.
use vmix as _;

const CHAPTERS: &str = include_str!("../../src/ffi/chapters.h");
const HELPERS: &str = include_str!("../../src/ffi/helpers.h");

/// Structs that only functions use, which cbindgen does not see.
const TYPES: [&str; 10] = [
    "VmixStatus",
    "VmixView",
    "VmixViewMut",
    "VmixAdapterInfo",
    "VmixValuesInfo",
    "VmixLabel",
    "VmixLayer",
    "VmixValuesParams",
    "VmixMixParams",
    "VmixAttentionParams",
];

/// Writes `vmix_types.h` and `vmix.h`.
fn write(folder: &Path) -> io::Result<()> {
    let config = cbindgen::Config {
        language: cbindgen::Language::C,
        no_includes: true,
        sys_includes: ["math.h", "stddef.h", "stdint.h"].map(str::to_owned).into(),
        cpp_compat: true,
        documentation_style: cbindgen::DocumentationStyle::Doxy,
        usize_is_size_t: true,
        style: cbindgen::Style::Both,
        line_length: 100,
        tab_width: 4,
        trailer: Some(HELPERS.trim_end().to_owned()),
        header: Some(
            "/* Data, constants and status codes of vmix. Include vmix.h, which explains them.\n   \
             Written by `make headers`; do not edit. */\n\n\
             #ifndef VMIX_TYPES_H\n#define VMIX_TYPES_H"
                .to_owned(),
        ),
        export: cbindgen::ExportConfig {
            include: TYPES.map(str::to_owned).into(),
            ..Default::default()
        },
        enumeration: cbindgen::EnumConfig {
            rename_variants: cbindgen::RenameRule::QualifiedScreamingSnakeCase,
            ..Default::default()
        },
        ..Default::default()
    };
    cbindgen::Builder::new()
        .with_config(config)
        .with_src(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/ffi/types.rs"))
        .generate()
        .map_err(io::Error::other)?
        .write_to_file(folder.join("vmix_types.h"));
    let mut functions = Vec::new();
    safer_ffi::headers::builder()
        .with_guard("VMIX_H")
        .with_banner(CHAPTERS.trim_end())
        .with_text_after_guard("\n\n#include \"vmix_types.h\"\n")
        .to_writer(&mut functions)
        .generate()?;
    let functions = String::from_utf8(functions).map_err(io::Error::other)?;
    // safer-ffi includes what it needs inside `extern "C"`; vmix_types.h has it already.
    let functions = functions
        .replace("#include <stddef.h>\n", "")
        .replace("#include <stdint.h>\n", "");
    let lines = functions.split('\n').map(str::trim_end);
    let mut text = String::new();
    for line in lines {
        // One empty line is enough.
        if !line.is_empty() || !text.ends_with("\n\n") {
            text.push_str(line);
            text.push('\n');
        }
    }
    fs::write(folder.join("vmix.h"), text.trim_end().to_owned() + "\n")
}

#[test]
fn headers_are_those_of_the_source() -> io::Result<()> {
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("include");
    if std::env::var_os("VMIX_WRITE_HEADERS").is_some() {
        return write(&committed);
    }
    let folder = tempfile::tempdir()?;
    write(folder.path())?;
    for name in ["vmix.h", "vmix_types.h"] {
        let fresh = fs::read_to_string(folder.path().join(name))?;
        let old = fs::read_to_string(committed.join(name))?;
        assert!(
            fresh == old,
            "include/{name} is not what `make headers` writes"
        );
    }
    Ok(())
}
