//! Lists of labels that people write: `labels.toml`, and lines of text.

use std::{collections::BTreeMap, path::Path};

use serde::Deserialize;

use crate::{Error, Label, Labels, Result, Start, component::read};

/// Distinct rare tokens of CLIP's vocabulary: one token each, of the last tenth by frequency, and no
/// word. They stand for "not having the label" (paper, section 3.2) where a list says nothing else.
/// Without training the empty text does, which was measured to be better (docs/training-free).
const RARE: [&str; 30] = [
    "sks", "nmwx", "nlwx", "kprs", "bdg", "scd", "hns", "kts", "pgs", "bsf", "bgs", "tls", "pkk",
    "spp", "brs", "cbp", "hcs", "ttm", "smx", "csn", "slv", "tmw", "cws", "lhp", "ntv", "bsp",
    "bln", "fbs", "mgt", "rcn",
];

const STANDARD: &str = include_str!("labels.toml");

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    label: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    #[serde(default)]
    dimension: String,
    positive: Option<String>,
    negative: Option<String>,
    default: Option<f32>,
    neutral: Option<f32>,
    #[serde(default)]
    display_names: BTreeMap<String, String>,
}

impl Labels {
    /// The default labels: seven, along the paper's dimensions.
    pub fn standard(start: Start) -> Self {
        Self::from_toml(STANDARD, start).expect("the list that this library brings along")
    }

    /// Reads a `labels.toml`.
    pub fn open_toml(path: impl AsRef<Path>, start: Start) -> Result<Self> {
        let path = path.as_ref();
        let text = String::from_utf8(read(path)?)
            .map_err(|e| refused(&path.display().to_string(), format!("no UTF-8: {e}")))?;
        Self::parse_toml(&text, start).map_err(|found| refused(&path.display().to_string(), found))
    }

    /// Reads the text of a `labels.toml`: a `[[label]]` each, with `name` and, where wanted,
    /// `dimension`, `positive` (else the name), `negative` and `default` (else what suits the start),
    /// `neutral` and `display_names`.
    pub fn from_toml(text: &str, start: Start) -> Result<Self> {
        Self::parse_toml(text, start).map_err(|found| refused("labels", found))
    }

    fn parse_toml(text: &str, start: Start) -> std::result::Result<Self, String> {
        let List { label } = toml::from_str(text).map_err(|e| e.to_string().trim().to_owned())?;
        Self::of(label, start)
    }

    /// Reads a list with a label on every line or between semicolons: `name`, `name: positive text` or
    /// `name: positive text | negative text`. Lines that start with `#` are comments.
    pub fn from_lines(text: &str, start: Start) -> Result<Self> {
        let lines = text.split(['\n', ';']).map(str::trim);
        let entries = lines
            .filter(|line| !(line.is_empty() || line.starts_with('#')))
            .map(|line| {
                let (name, texts) = match line.split_once(':') {
                    Some((name, texts)) => (name.trim(), Some(texts)),
                    None => (line, None),
                };
                let texts = texts.map(|texts| match texts.split_once('|') {
                    Some((positive, negative)) => (positive.trim(), Some(negative.trim())),
                    None => (texts.trim(), None),
                });
                Entry {
                    name: name.to_owned(),
                    dimension: String::new(),
                    positive: texts.map(|(positive, _)| positive.to_owned()),
                    negative: texts.and_then(|(_, negative)| Some(negative?.to_owned())),
                    default: None,
                    neutral: None,
                    display_names: BTreeMap::new(),
                }
            });
        Self::of(entries.collect(), start).map_err(|found| refused("labels", found))
    }

    fn of(entries: Vec<Entry>, start: Start) -> std::result::Result<Self, String> {
        // In order, and not one that another label was given.
        let given: Vec<String> = entries.iter().filter_map(|e| e.negative.clone()).collect();
        let mut rare = RARE
            .iter()
            .filter(|token| !given.iter().any(|text| text == *token));
        let mut negative_for = |name: &str| match start {
            Start::Training => rare.next().map(|token| (*token).to_owned()).ok_or_else(|| {
                let most = RARE.len();
                format!("more than {most} labels without a negative: give `{name}` one")
            }),
            Start::TrainingFree => Ok(String::new()),
        };
        let default = match start {
            Start::Training => 1.0,
            // Differences add up. By default all together are as strong as one of them, in hundredths.
            Start::TrainingFree => (100.0 / entries.len() as f32).round() / 100.0,
        };
        let labels = entries
            .into_iter()
            .map(|entry| {
                if entry.positive.as_deref() == Some("") {
                    return Err(format!("label `{}` without a positive text", entry.name));
                }
                let negative = match entry.negative {
                    Some(negative) => negative,
                    None => negative_for(&entry.name)?,
                };
                Ok(Label {
                    positive: entry.positive.unwrap_or_else(|| entry.name.clone()),
                    name: entry.name,
                    dimension: entry.dimension,
                    negative,
                    default: entry.default.unwrap_or(default),
                    neutral: entry.neutral,
                    display_names: entry.display_names,
                })
            })
            .collect::<std::result::Result<Vec<_>, String>>()?;
        Self::checked(labels)
    }
}

fn refused(list: &str, found: String) -> Error {
    Error::argument(list, "a list of labels (docs/labels.md)", found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Tokenizer;

    #[test]
    fn rare_tokens_are_rare_and_distinct() {
        let clip = Tokenizer::clip();
        for (i, token) in RARE.iter().enumerate() {
            assert_eq!(clip.why_not_rare(token).unwrap(), None, "{token}");
            assert!(!RARE[..i].contains(token), "{token} twice");
        }
    }

    #[test]
    fn the_standard_list_covers_the_papers_dimensions() {
        let labels = Labels::standard(Start::Training);
        for dimension in [
            "color",
            "lighting",
            "composition",
            "focus",
            "emotion",
            "texture",
        ] {
            assert!(
                labels.iter().any(|label| label.dimension == dimension),
                "{dimension}"
            );
        }
        for label in labels.iter() {
            assert!(label.positive.is_ascii(), "what is encoded is English");
            let languages: Vec<_> = label.display_names.keys().map(String::as_str).collect();
            assert_eq!(languages, ["de", "es", "fr", "ja", "zh"], "{}", label.name);
        }
    }

    #[test]
    fn lines_become_labels() {
        let text = "warm light\n# a comment\nred: bright red; calm: a calm mood | sks";
        let labels = Labels::from_lines(text, Start::Training).unwrap();
        let parts: Vec<_> = labels
            .iter()
            .map(|l| (l.name.as_str(), l.positive.as_str(), l.negative.as_str()))
            .collect();
        assert_eq!(
            parts,
            [
                ("warm light", "warm light", "nmwx"), // sks is taken
                ("red", "bright red", "nlwx"),
                ("calm", "a calm mood", "sks"),
            ]
        );
    }

    #[test]
    fn without_training_labels_are_told_from_no_text_and_share_the_strength() {
        let labels = Labels::from_lines("red; blue: deep blue | grey; warm", Start::TrainingFree);
        let parts: Vec<_> = labels
            .unwrap()
            .iter()
            .map(|l| (l.negative.clone(), l.default))
            .collect();
        let expected = [("", 0.33), ("grey", 0.33), ("", 0.33)];
        assert_eq!(
            parts,
            expected.map(|(text, weight)| (text.to_owned(), weight))
        );
    }

    #[test]
    fn bad_lists_say_what_is_wrong() {
        for (toml, complaint) in [
            ("", "missing field `label`"),
            ("[[label]]\nnam = 'a'", "unknown field `nam`"),
            ("[[label]]\nname = 'a'\ndefault = 'b'", "line 3"),
            ("[[label]]\nname = 'all'", "reserved"),
            ("label = []", "an empty list"),
        ] {
            let found = Labels::from_toml(toml, Start::Training)
                .unwrap_err()
                .to_string();
            assert!(found.contains(complaint), "{toml}: {found}");
        }
        let many: String = (0..31).map(|i| format!("l{i}\n")).collect();
        let found = Labels::from_lines(&many, Start::Training)
            .unwrap_err()
            .to_string();
        assert!(found.contains("give `l30` one"), "{found}");
    }
}
