//! The metadata that all files share, and its named values (`docs/format.md`).

use std::collections::BTreeMap;

use crate::{Base, Labels, Layer, Layers, Result, adapter::AES_EMB, file::File, json};

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
        /// Value rows: any selection of its labels.
        Adapter = "adapter",
        /// V_a of every layer for one selection.
        Preset = "preset",
        /// Labels and their features, the start of a training.
        Init = "init",
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
    /// How label weights become coefficients (docs/format.md).
    pub enum CoefficientKind {
        /// As the paper's LayerNorm scales them: adapters that were trained.
        LayerNorm = "layernorm",
        /// In proportion to the weights: labels that were fitted.
        Linear = "linear",
    }
}

/// The metadata that every file has.
#[derive(Debug, Clone)]
pub(crate) struct Common {
    pub base: Base,
    pub labels: Labels,
    pub context_tokens: usize,
}

pub(crate) const FORMAT: &str = "2";

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
        if let Some(expected) = base.context_tokens().filter(|n| *n != context_tokens) {
            let expected = format!("`{expected}`, as in every {base} U-Net");
            let found = format!("`{context_tokens}`");
            return Err(file.meta_error("vmix.context_tokens", expected, found));
        }
        Ok(Self {
            base,
            labels,
            context_tokens,
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
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into()
    }
}

/// What `vmix.format` must be, for messages.
pub(crate) fn expected_format(looks_like_lora: bool) -> String {
    let lora = match looks_like_lora {
        true => " (this looks like a LoRA, which hosts load as such)",
        false => "",
    };
    format!("`{FORMAT}`, as in every VMix file{lora}")
}

/// What the file is, if it is of the format version that this library reads.
pub(crate) fn kind_of(file: &File) -> Result<Kind> {
    let looks_like_lora = file.meta("vmix.format", "").is_err()
        && file.tensor_names().any(|name| name.contains("lora_"));
    let expected = expected_format(looks_like_lora);
    file.parse_meta("vmix.format", &expected, |v| (v == FORMAT).then_some(()))?;
    one_of(file, "vmix.kind", Kind::NAMES, Kind::from_name)
}

/// `vmix.made`: how a file was made. Only `method` is asked for; the rest is for people.
pub(crate) struct Made;

impl Made {
    pub const KEY: &str = "vmix.made";
    pub const MERGED: &str = "merged";
    const METHODS: [&str; 3] = ["trained", "fitted", Self::MERGED];

    pub fn check(file: &File) -> Result<()> {
        let expected = "a JSON object with the key `method`";
        let made: BTreeMap<String, serde_json::Value> = read_json(file, Self::KEY, expected)?;
        let method = made.get("method").and_then(serde_json::Value::as_str);
        if method.is_some_and(|method| Self::METHODS.contains(&method)) {
            return Ok(());
        }
        let names = Self::METHODS.join(", ");
        let found = method.map_or("none".to_owned(), |method| format!("`{method}`"));
        Err(file.meta_error(Self::KEY, format!("a `method` among {names}"), found))
    }
}

/// The passes that a file is for.
pub(crate) fn read_apply_to(file: &File) -> Result<ApplyTo> {
    one_of(file, "vmix.apply_to", ApplyTo::NAMES, ApplyTo::from_name)
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

/// d, as AesEmb \[N, 2, d\] has it, which a known base must have too.
pub(crate) fn read_feature_width(file: &File, base: Base, labels: usize) -> Result<usize> {
    match *file.tensor(AES_EMB)?.shape {
        [_, _, d] if d > 0 => match base.context_dim() {
            Some(expected) if expected != d => {
                let expected = format!("width {expected}, as in every {base} U-Net");
                Err(file.tensor_error(AES_EMB, expected, d.to_string()))
            }
            _ => Ok(d),
        },
        ref shape => {
            let found = format!("shape {shape:?}");
            Err(file.tensor_error(AES_EMB, format!("shape [{labels}, 2, d]"), found))
        }
    }
}

/// A metadata value that is JSON of some type.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(
    file: &File,
    key: &str,
    expected: &str,
) -> Result<T> {
    let json = file.meta(key, expected)?;
    json::parse(json).map_err(|found| file.meta_error(key, expected, found))
}

/// The layers of a known base from its table; those of another from `vmix.ldm_names`, with the width
/// that `inner_dim` finds.
pub(crate) fn read_layers(
    file: &File,
    base: Base,
    inner_dim: impl Fn(&str) -> Result<usize>,
) -> Result<Layers> {
    const KEY: &str = "vmix.ldm_names";
    if let Some(layers) = base.layers() {
        return Ok(layers);
    }
    let expected = "a JSON object of the LDM name of every layer, by diffusers name";
    let names: BTreeMap<String, String> = read_json(file, KEY, expected)?;
    if names.is_empty() {
        return Err(file.meta_error(KEY, "at least one layer", "none"));
    }
    let layers = names.into_iter().map(|(name, ldm_name)| {
        if name == "context" {
            return Err(file.meta_error(KEY, "the path of a layer", "`context`"));
        }
        Ok(Layer {
            inner_dim: inner_dim(&name)?,
            name,
            ldm_name: Some(ldm_name),
        })
    });
    Layers::sorted(layers.collect::<Result<_>>()?)
        .map_err(|found| file.meta_error(KEY, "a name of its own per layer", found))
}

/// `vmix.ldm_names` of a U-Net whose layers no table has.
pub(crate) fn write_ldm_names(
    base: Base,
    layers: &Layers,
    metadata: &mut BTreeMap<String, String>,
) {
    if base == Base::Other {
        let names: BTreeMap<&str, &str> = layers
            .iter()
            .filter_map(|layer| Some((layer.name.as_str(), layer.ldm_name.as_deref()?)))
            .collect();
        let names = serde_json::to_string(&names).expect("string keys and values");
        metadata.insert("vmix.ldm_names".to_owned(), names);
    }
}
