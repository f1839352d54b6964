//! What can go wrong, said so that a user can act on it.

use std::{fmt::Display, path::PathBuf};

/// Why something was refused: the thing, what was expected and what was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {source}", shown(path.display()))]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The bytes are no safetensors file: a header or an offset lies.
    #[error(
        "{}: not a safetensors file: {}{}",
        shown(file),
        shown(source),
        shown(detail)
    )]
    Safetensors {
        /// The file, or "bytes".
        file: String,
        /// The same in numbers and names, in brackets, or nothing.
        detail: String,
        /// What is wrong with the header.
        source: safetensors::SafeTensorError,
    },
    /// A metadata key is missing or has a value this version does not know.
    #[error(
        "{}: metadata `{key}`: expected {expected}, found {found}",
        shown(file)
    )]
    Metadata {
        /// The file, or "bytes".
        file: String,
        /// The metadata key.
        key: String,
        /// What the format asks for.
        expected: String,
        /// What the file says.
        found: String,
    },
    /// A tensor is missing, superfluous, of a wrong shape or dtype, or not finite.
    #[error(
        "{}: tensor `{tensor}`: expected {expected}, found {found}",
        shown(file)
    )]
    Tensor {
        /// The file, or "bytes".
        file: String,
        /// The tensor's name.
        tensor: String,
        /// What the format asks for.
        expected: String,
        /// What the file holds.
        found: String,
    },
    /// A selection names a label that the adapter does not have.
    #[error(
        "unknown label `{}`{}; known labels: {}",
        shown(name),
        did_you_mean(nearest),
        shown(known)
    )]
    UnknownLabel {
        /// The name as it was given.
        name: String,
        /// The known label that is spelt most alike, if any is close.
        nearest: Option<String>,
        /// All known labels, separated by commas.
        known: String,
    },
    /// A layer name that the adapter or preset does not have.
    #[error(
        "unknown layer `{}`{}; there are {count} layers",
        shown(name),
        did_you_mean(nearest)
    )]
    UnknownLayer {
        /// The name as it was given.
        name: String,
        /// The known layer that is spelt most alike, if any is close.
        nearest: Option<String>,
        /// How many layers there are.
        count: usize,
    },
    /// An argument does not fit.
    #[error(
        "{}: expected {}, found {}",
        shown(argument),
        shown(expected),
        shown(found)
    )]
    Argument {
        /// The argument.
        argument: String,
        /// What it must be.
        expected: String,
        /// What came.
        found: String,
    },
    /// The request is valid, but this library does not do it.
    #[error(
        "{}: expected {}, found {}",
        shown(argument),
        shown(expected),
        shown(found)
    )]
    Unsupported {
        /// The argument.
        argument: String,
        /// What is supported.
        expected: String,
        /// What came.
        found: String,
    },
    /// The result, or the work on it, does not fit into memory.
    #[error("not enough memory for {bytes} bytes")]
    OutOfMemory {
        /// What was asked for.
        bytes: usize,
    },
    /// An operation of the tensor library failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    pub(crate) fn argument(
        argument: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Self::Argument {
            argument: argument.into(),
            expected: expected.into(),
            found: found.into(),
        }
    }
}

fn did_you_mean(nearest: &Option<String>) -> String {
    nearest
        .as_ref()
        .map(|name| format!(" (did you mean `{}`?)", shown(name)))
        .unwrap_or_default()
}

/// Words of a file or of its user as messages show them: in lines, which errors in lists of labels have.
fn shown(words: impl Display) -> String {
    const LONGEST: usize = 4096;
    let words = words.to_string();
    let lines = words.split('\n').map(|line| presentable(line, LONGEST));
    lines.collect::<Vec<_>>().join("\n")
}

/// What a file says, in a message: a bomb is cut to so many characters, and nothing speaks to the
/// terminal.
pub(crate) fn presentable(text: &str, longest: usize) -> String {
    let mut shown = String::new();
    for (i, c) in text.chars().enumerate() {
        if i == longest {
            shown.push('…');
            break;
        }
        match c {
            // Control characters, and those that turn the direction of writing.
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => shown.extend(c.escape_unicode()),
            c if c.is_control() => shown.extend(c.escape_default()),
            c => shown.push(c),
        }
    }
    shown
}

/// The candidate spelt most like `name`, if it is close enough to be what was meant.
pub(crate) fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<String> {
    const CLOSE_ENOUGH: f64 = 0.5;
    // Comparing takes time in the product of the lengths, and a file may hold any name.
    const LONGEST: usize = 200;
    if name.len() > LONGEST {
        return None;
    }
    let name = name.to_lowercase();
    candidates
        .filter(|candidate| candidate.len() <= LONGEST)
        .map(|candidate| {
            let likeness = strsim::normalized_damerau_levenshtein(&name, &candidate.to_lowercase());
            (likeness, candidate)
        })
        .filter(|(likeness, _)| *likeness >= CLOSE_ENOUGH)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate.to_owned())
}
