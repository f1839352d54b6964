//! The metadata that adapters and presets share, and its named values (`docs/format.md`).

use std::collections::BTreeMap;

use crate::{Base, Error, Labels, Result, file::File, json::UniqueKeys};

/// Defines an enum whose variants have a name in files.
macro_rules! named {
    ($(#[$meta:meta])* pub enum $type:ident {
        $($(#[$doc:meta])* $variant:ident = $name:literal,)*
    }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $type {
            $($(#[$doc])* $variant,)*
        }

        impl $type {
            /// Every name, in the order of the variants.
            pub const NAMES: &[&str] = &[$($name),*];

            /// The name that files use.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// The variant of that name.
            pub fn from_name(name: &str) -> Option<Self> {
                match name {
                    $($name => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }
    };
}
pub(crate) use named;

named! {
    /// What a file holds.
    pub enum Kind {
        /// AesEmb, the projection and the value weights: any selection of its labels.
        Adapter = "adapter",
        /// V_a of every layer for one selection.
        Preset = "preset",
    }
}

named! {
    /// What the unconditional pass of classifier-free guidance sees; the paper does not say.
    pub enum ApplyTo {
        /// Values are mixed in the conditional pass only.
        Cond = "cond",
        /// The same V_a is mixed in both passes.
        Both = "both",
        /// The selection in the conditional pass, its opposite in the unconditional one.
        Contrast = "contrast",
    }
}

named! {
    /// How f_t becomes f_a (paper, eq. 6).
    pub enum ProjectionKind {
        /// The paper's F and Z.
        Learned = "learned",
        /// f_a\[c\] = Σ gain_i·w_i·(t_i − t̂_i) for every token c, without training.
        Difference = "difference",
    }
}

named! {
    /// Where W_Va comes from (paper, eq. 7).
    pub enum ValueWeights {
        /// The file has a `to_v_aes` tensor for every layer.
        Own = "own",
        /// The base's own W_V serves.
        Base = "base",
    }
}

/// The metadata that adapters and presets have in common.
#[derive(Debug, Clone)]
pub(crate) struct Common {
    pub base: Base,
    pub labels: Labels,
    pub context_tokens: usize,
    pub apply_to: ApplyTo,
}

pub(crate) const FORMAT: &str = "1";

/// No text encoder of a U-Net has longer chunks; what a file says is not allocated beyond this.
const MAX_CONTEXT_TOKENS: usize = 4096;

impl Common {
    /// Reads and checks the shared keys; `expected` is what the caller can use.
    pub fn read(file: &File, expected: Kind) -> Result<Self> {
        let kind = kind_of(file)?;
        if kind != expected {
            return Err(file.meta_error("vmix.kind", format!("`{expected}`"), format!("`{kind}`")));
        }
        let base: Base = one_of(file, "vmix.base", Base::NAMES, Base::from_name)?;
        let labels = file.meta("vmix.labels", "a JSON list of labels")?;
        let labels = Labels::from_json(labels).map_err(|found| {
            file.meta_error(
                "vmix.labels",
                "a JSON list of labels (docs/format.md)",
                found,
            )
        })?;
        let context_tokens = read_size(file, "vmix.context_tokens", MAX_CONTEXT_TOKENS)?;
        expect_of_base(
            file,
            base,
            "vmix.context_tokens",
            base.context_tokens(),
            context_tokens,
        )?;
        let apply_to = one_of(file, "vmix.apply_to", ApplyTo::NAMES, ApplyTo::from_name)?;
        Ok(Self {
            base,
            labels,
            context_tokens,
            apply_to,
        })
    }

    /// The shared keys as they are written.
    pub fn write(&self, kind: Kind) -> BTreeMap<String, String> {
        [
            ("vmix.format", FORMAT.to_owned()),
            ("vmix.kind", kind.to_string()),
            ("vmix.base", self.base.to_string()),
            ("vmix.labels", self.labels.to_json()),
            ("vmix.context_tokens", self.context_tokens.to_string()),
            ("vmix.apply_to", self.apply_to.to_string()),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into()
    }
}

/// Whether the file is an adapter or a preset, of a format version that this library knows.
pub(crate) fn kind_of(file: &File) -> Result<Kind> {
    let mut expected = "`1`, as in every VMix file".to_owned();
    if file.meta("vmix.format", "").is_err()
        && file.tensor_names().any(|name| name.contains("lora_"))
    {
        expected += " (this looks like a LoRA, which hosts load as such)";
    }
    let expected = &expected;
    file.parse_meta("vmix.format", expected, |v| (v == FORMAT).then_some(()))?;
    one_of(file, "vmix.kind", Kind::NAMES, Kind::from_name)
}

/// A metadata value that is one of a few names.
pub(crate) fn one_of<T>(
    file: &File,
    key: &str,
    names: &[&str],
    parse: impl FnOnce(&str) -> Option<T>,
) -> Result<T> {
    file.parse_meta(key, &format!("one of {}", names.join(", ")), parse)
}

/// A metadata value that is a size between 1 and `max`.
pub(crate) fn read_size(file: &File, key: &str, max: usize) -> Result<usize> {
    let expected = format!("a whole number from 1 to {max}");
    file.parse_meta(key, &expected, |value| {
        value.parse().ok().filter(|n| (1..=max).contains(n))
    })
}

/// Refuses a size that is not the one of a known base.
pub(crate) fn expect_of_base(
    file: &File,
    base: Base,
    key: &str,
    expected: Option<usize>,
    found: usize,
) -> Result<()> {
    match expected {
        Some(expected) if expected != found => Err(file.meta_error(
            key,
            format!("`{expected}`, as in every {base} U-Net"),
            format!("`{found}`"),
        )),
        _ => Ok(()),
    }
}

/// A metadata value that is a JSON object with a value for each layer.
pub(crate) fn layer_map<T: serde::de::DeserializeOwned>(
    file: &File,
    key: &str,
    expected: &str,
) -> Result<BTreeMap<String, T>> {
    let json = file.meta(key, expected)?;
    serde_json::from_str(json)
        .map(|UniqueKeys(map)| map)
        .map_err(|e: serde_json::Error| -> Error { file.meta_error(key, expected, e.to_string()) })
}
