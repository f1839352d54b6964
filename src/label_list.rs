//! Lists of labels that people write: `labels.toml`, and lines of text.

use std::{collections::BTreeMap, path::Path};

use serde::Deserialize;

use crate::{Error, Label, Labels, Result, component::read};

/// Distinct rare tokens of CLIP's vocabulary: one token each, of the last fifth by frequency, and no
/// word. They stand for "not having the label" (paper, section 3.2) where a list says nothing else.
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
    positive: Option<Texts>,
    negative: Option<Texts>,
    default: Option<f32>,
    neutral: Option<f32>,
    range: Option<Vec<f32>>,
    step: Option<f32>,
    #[serde(default)]
    display_names: BTreeMap<String, String>,
}

/// One text, or several phrasings of it.
#[derive(Deserialize, Clone)]
#[serde(untagged)]
enum Texts {
    One(String),
    Several(Vec<String>),
}

impl Texts {
    fn list(&self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text.clone()],
            Self::Several(texts) => texts.clone(),
        }
    }
}

impl Labels {
    /// The default labels: seven, along the paper's dimensions.
    pub fn standard() -> Self {
        Self::from_toml(STANDARD).expect("the list that this library brings along")
    }

    /// Reads a `labels.toml`.
    pub fn open_toml(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = String::from_utf8(read(path)?)
            .map_err(|e| refused(&path.display().to_string(), format!("no UTF-8: {e}")))?;
        Self::parse_toml(&text).map_err(|found| refused(&path.display().to_string(), found))
    }

    /// Reads the text of a `labels.toml`: a `[[label]]` each, with `name` and, where wanted,
    /// `dimension`, `positive` (else the name) and `negative` (else a rare token), each a text or a list
    /// of phrasings, `default`, `neutral`, `range`, `step` and `display_names`.
    pub fn from_toml(text: &str) -> Result<Self> {
        Self::parse_toml(text).map_err(|found| refused("labels", found))
    }

    fn parse_toml(text: &str) -> std::result::Result<Self, String> {
        let List { label } = toml::from_str(text).map_err(|e| e.to_string().trim().to_owned())?;
        Self::of(label)
    }

    /// Reads labels that were typed: `name`, `name: positive text` or
    /// `name: positive text | negative text` each.
    pub fn from_entries<'a>(entries: impl IntoIterator<Item = &'a str>) -> Result<Self> {
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
                positive: texts.map(|(positive, _)| Texts::One(positive.trim().to_owned())),
                negative: texts
                    .and_then(|(_, negative)| Some(Texts::One(negative?.trim().to_owned()))),
                default: None,
                neutral: None,
                range: None,
                step: None,
                display_names: BTreeMap::new(),
            })
        };
        let entries = entries.into_iter().map(entry);
        entries
            .collect::<std::result::Result<_, _>>()
            .and_then(Self::of)
            .map_err(|found| refused("labels", found))
    }

    fn of(entries: Vec<Entry>) -> std::result::Result<Self, String> {
        // In order, and not one that another label was given.
        let given: Vec<String> = entries
            .iter()
            .filter_map(|entry| Some(entry.negative.as_ref()?.list()))
            .flatten()
            .collect();
        let mut rare = RARE
            .iter()
            .filter(|token| !given.iter().any(|text| text == *token));
        let mut negative_for = |name: &str| {
            rare.next().map(|token| (*token).to_owned()).ok_or_else(|| {
                let most = RARE.len();
                format!("more than {most} labels without a negative: give `{name}` one")
            })
        };
        let labels = entries
            .into_iter()
            .map(|entry| {
                entry.check()?;
                let negative = match &entry.negative {
                    Some(negative) => negative.list(),
                    None => vec![negative_for(&entry.name)?],
                };
                let positive = entry.positive.as_ref().map(Texts::list);
                let plain = Label::new(&entry.name, &entry.name, "");
                let default = entry.default.unwrap_or(plain.default);
                // A slider reaches its default and its neutral weight.
                let range = match entry.range.as_deref() {
                    Some(&[low, high]) => [low, high],
                    Some(found) => {
                        let name = &entry.name;
                        return Err(format!(
                            "label `{name}` with a range of {} numbers: [low, high]",
                            found.len()
                        ));
                    }
                    None => {
                        let ends = [default, entry.neutral.unwrap_or(default)];
                        let [low, high] = plain.range;
                        [
                            ends.into_iter().fold(low, f32::min),
                            ends.into_iter().fold(high, f32::max),
                        ]
                    }
                };
                Ok(Label {
                    positive: positive.unwrap_or_else(|| plain.positive.clone()),
                    negative,
                    dimension: entry.dimension,
                    default,
                    neutral: entry.neutral,
                    range,
                    step: entry.step.unwrap_or(plain.step),
                    display_names: entry.display_names,
                    ..plain
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
    fn check(&self) -> std::result::Result<(), String> {
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
        let blank = |text: &String| text.trim().is_empty();
        if self
            .positive
            .as_ref()
            .is_some_and(|texts| texts.list().iter().any(blank))
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
        let labels = Labels::standard();
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
            assert!(
                label.positive.iter().all(|text| text.is_ascii()),
                "what is encoded is English"
            );
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
        let labels = Labels::from_entries(entries).unwrap();
        let parts: Vec<_> = labels
            .iter()
            .map(|l| (&*l.name, &*l.positive[0], &*l.negative[0]))
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
    fn labels_may_have_several_texts_and_sliders_reach_their_weights() {
        let toml = "[[label]]\nname = 'light'\npositive = ['bright light', 'sunlit']\n\
                    negative = ['dark', '']\ndefault = 1.5\nneutral = -0.5";
        let labels = Labels::from_toml(toml).unwrap();
        assert_eq!(labels[0].positive, ["bright light", "sunlit"]);
        assert_eq!(labels[0].negative, ["dark", ""]);
        assert_eq!(labels[0].range, [-0.5, 1.5]);
        assert_eq!(labels[0].step, 0.05);
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
            (
                "[[label]]\nname = 'a'\nrange = [0, 1, 2]",
                "a range of 3 numbers",
            ),
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
            let found = Labels::from_toml(toml).unwrap_err().to_string();
            assert!(found.contains(complaint), "{toml}: {found}");
        }
        let many: Vec<String> = (0..31).map(|i| format!("l{i}")).collect();
        let many = || many.iter().map(String::as_str);
        let found = Labels::from_entries(many());
        let found = found.unwrap_err().to_string();
        assert!(found.contains("give `l30` one"), "{found}");
    }
}
