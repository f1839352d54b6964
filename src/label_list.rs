//! Lists of labels that people write: `labels.toml`, and lines of text.

use std::{collections::BTreeMap, path::Path};

use serde::Deserialize;

use crate::{Error, Label, Labels, Result, Start, component::read};

/// Distinct rare tokens of CLIP's vocabulary: one token each, of the last fifth by frequency, and no
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

    /// Reads labels that were typed: `name`, `name: positive text` or
    /// `name: positive text | negative text` each.
    pub fn from_entries<'a>(
        entries: impl IntoIterator<Item = &'a str>,
        start: Start,
    ) -> Result<Self> {
        let entry = |entry: &'a str| {
            let (name, texts) = match entry.split_once(':') {
                Some((name, texts)) => (name, Some(texts)),
                None if entry.contains('|') => {
                    return Err(format!(
                        "label `{entry}` with a negative but no text: `NAME: TEXT | NEGATIVE`"
                    ));
                }
                None => (entry, None),
            };
            let texts = texts.map(|texts| match texts.split_once('|') {
                Some((positive, negative)) => (positive, Some(negative)),
                None => (texts, None),
            });
            Ok(Entry {
                name: name.trim().to_owned(),
                dimension: String::new(),
                positive: texts.map(|(positive, _)| positive.trim().to_owned()),
                negative: texts.and_then(|(_, negative)| Some(negative?.trim().to_owned())),
                default: None,
                neutral: None,
                display_names: BTreeMap::new(),
            })
        };
        let entries = entries.into_iter().map(entry);
        entries
            .collect::<std::result::Result<_, _>>()
            .and_then(|entries| Self::of(entries, start))
            .map_err(|found| refused("labels", found))
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
            // Differences add up. By default all together are as strong as one of them.
            Start::TrainingFree => two_digits(1.0 / entries.len() as f64),
        };
        let labels = entries
            .into_iter()
            .map(|entry| {
                entry.check(start)?;
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
        let mut seen: Vec<String> = Vec::new();
        for name in labels.iter().map(|label| label.name.to_lowercase()) {
            if seen.contains(&name) {
                return Err(format!("two labels named `{name}`, in whatever case"));
            }
            seen.push(name);
        }
        Self::checked(labels)
    }
}

impl Entry {
    /// What a file may hold, but whoever writes a list did not mean.
    fn check(&self, start: Start) -> std::result::Result<(), String> {
        let name = &self.name;
        if name.trim() != name {
            return Err(format!("label `{name}`, which begins or ends with a space"));
        }
        if name.chars().any(char::is_control) {
            return Err(format!("label {name:?}, which has a control character"));
        }
        if Labels::RESERVED.contains(&name.to_lowercase().as_str()) {
            return Err(format!("a label named `{name}`, which is reserved"));
        }
        if self
            .positive
            .as_deref()
            .is_some_and(|text| text.trim().is_empty())
        {
            return Err(format!("label `{name}` without a positive text"));
        }
        for (key, weight) in [("default", self.default), ("neutral", self.neutral)] {
            if let Some(weight) = weight.filter(|weight| !weight.is_finite()) {
                return Err(format!(
                    "label `{name}` with {key} {weight}, no finite number in f32"
                ));
            }
        }
        if start == Start::TrainingFree && self.neutral.is_some_and(|weight| weight != 0.0) {
            return Err(format!(
                "label `{name}` with a neutral weight of its own: without training it is 0"
            ));
        }
        let is_tag = |tag: &str| {
            let mut parts = tag.split('-');
            parts.all(|part| {
                (1..=8).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_alphanumeric())
            })
        };
        for (tag, shown) in &self.display_names {
            if !is_tag(tag) {
                return Err(format!(
                    "label `{name}` with a name in `{tag}`, which is no language tag"
                ));
            }
            if shown.trim().is_empty() {
                return Err(format!("label `{name}` without a name in `{tag}`"));
            }
        }
        Ok(())
    }
}

/// Rounded to two digits, which weights have that people read.
fn two_digits(x: f64) -> f32 {
    format!("{x:.1e}").parse().expect("a number")
}

fn refused(list: &str, found: String) -> Error {
    Error::argument(
        list,
        "a list of labels, as `vmix init --help` has it",
        found,
    )
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
    fn entries_become_labels() {
        let entries = [
            "warm light",
            "red: bright red; #1",
            "calm: a calm mood | sks",
        ];
        let labels = Labels::from_entries(entries, Start::Training).unwrap();
        let parts: Vec<_> = labels
            .iter()
            .map(|l| (l.name.as_str(), l.positive.as_str(), l.negative.as_str()))
            .collect();
        assert_eq!(
            parts,
            [
                ("warm light", "warm light", "nmwx"), // sks is taken
                ("red", "bright red; #1", "nlwx"),
                ("calm", "a calm mood", "sks"),
            ]
        );
    }

    #[test]
    fn without_training_labels_are_told_from_no_text_and_share_the_strength() {
        let entries = ["red", "blue: deep blue | grey", "warm"];
        let labels = Labels::from_entries(entries, Start::TrainingFree);
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
            ("[[label]]\nname = ' a'", "begins or ends with a space"),
            ("[[label]]\nname = 'None'", "reserved"),
            (
                "[[label]]\nname = 'a'\n[[label]]\nname = 'A'",
                "two labels named `a`",
            ),
            ("[[label]]\nname = 'a'\ndefault = nan", "default NaN"),
            ("[[label]]\nname = 'a'\nneutral = 1e300", "neutral inf"),
            (
                "[[label]]\nname = 'a'\npositive = ' '",
                "without a positive text",
            ),
            (
                "[[label]]\nname = 'a'\ndisplay_names = { de = '' }",
                "without a name in `de`",
            ),
            (
                "[[label]]\nname = 'a'\ndisplay_names = { 'deutsch!' = 'b' }",
                "no language tag",
            ),
        ] {
            let found = Labels::from_toml(toml, Start::Training)
                .unwrap_err()
                .to_string();
            assert!(found.contains(complaint), "{toml}: {found}");
        }
        let many: Vec<String> = (0..31).map(|i| format!("l{i}")).collect();
        let many = || many.iter().map(String::as_str);
        let found = Labels::from_entries(many(), Start::Training);
        let found = found.unwrap_err().to_string();
        assert!(found.contains("give `l30` one"), "{found}");
        let labels = Labels::from_entries(many(), Start::TrainingFree).unwrap();
        assert_eq!(labels[0].default, 0.032);
    }
}
