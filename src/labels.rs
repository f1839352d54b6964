//! Aesthetic labels and the choice among them (paper, section 3.2).

use std::collections::{BTreeMap, HashSet};

use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, nearest},
    json::unique_keys,
};

/// One aesthetic label: y_a and its counterpart ŷ_a.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Label {
    /// What users choose by, unique in a file.
    pub name: String,
    /// The aesthetic dimension it belongs to, such as "color" or "lighting".
    #[serde(default)]
    pub dimension: String,
    /// The text whose feature stands for having the label.
    pub positive: String,
    /// The rare identifier whose feature stands for not having it.
    pub negative: String,
    /// The weight that hosts start from.
    #[serde(default = "one")]
    pub default: f32,
    /// The weight at which the label changes nothing, if there is one.
    #[serde(default)]
    pub neutral: Option<f32>,
    /// Names to show, by language tag.
    #[serde(default, deserialize_with = "unique_keys")]
    pub display_names: BTreeMap<String, String>,
}

fn one() -> f32 {
    1.0
}

/// Names a label in a [`Selection`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LabelKey {
    /// By its name.
    Name(String),
    /// By its position in the file.
    Index(usize),
}

impl From<&str> for LabelKey {
    fn from(name: &str) -> Self {
        Self::Name(name.to_owned())
    }
}

impl From<String> for LabelKey {
    fn from(name: String) -> Self {
        Self::Name(name)
    }
}

impl From<usize> for LabelKey {
    fn from(index: usize) -> Self {
        Self::Index(index)
    }
}

/// How much of each label is wanted: 0 is its negative, 1 its positive, and anything between or
/// beyond a point on the line through both: f_t\[i\] = t̂_i + w_i·(t_i − t̂_i).
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Selection {
    /// Each label at the file's own default, which is 1 for a trained adapter, as in the paper.
    #[default]
    Default,
    /// Every label at 1.
    All,
    /// Every label at 0.
    None,
    /// These labels at these weights, every other one at 0.
    Weights(Vec<(LabelKey, f32)>),
}

impl Selection {
    /// The labels at these weights, every other one at 0.
    pub fn weights<K: Into<LabelKey>>(weights: impl IntoIterator<Item = (K, f32)>) -> Self {
        Self::Weights(weights.into_iter().map(|(k, w)| (k.into(), w)).collect())
    }

    /// The labels at 1, every other one at 0.
    pub fn only<K: Into<LabelKey>>(labels: impl IntoIterator<Item = K>) -> Self {
        Self::weights(labels.into_iter().map(|label| (label, 1.0)))
    }
}

/// The labels of a file, in the order of AesEmb's rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Labels(Vec<Label>);

impl Labels {
    /// Names that mean a whole selection and therefore cannot be labels.
    pub(crate) const RESERVED: [&str; 2] = ["all", "none"];

    /// Reads and checks the JSON list of `vmix.labels`; the error says what was found instead.
    pub(crate) fn from_json(json: &str) -> Result<Self, String> {
        Self::checked(serde_json::from_str(json).map_err(|e| e.to_string())?)
    }

    /// Labels with all that a list of them must be; the error says what was found instead.
    pub(crate) fn checked(labels: Vec<Label>) -> Result<Self, String> {
        if labels.is_empty() {
            return Err("an empty list".into());
        }
        let mut seen = HashSet::new();
        for label in &labels {
            if label.name.trim().is_empty() {
                return Err("a label without a name".into());
            }
            if Self::RESERVED.contains(&label.name.as_str()) {
                return Err(format!("a label named `{}`, which is reserved", label.name));
            }
            if !seen.insert(&label.name) {
                return Err(format!("two labels named `{}`", label.name));
            }
            // C hosts get these as strings that end at their first NUL.
            let texts = [
                &label.name,
                &label.dimension,
                &label.positive,
                &label.negative,
            ];
            if texts.iter().any(|text| text.contains('\0')) {
                return Err(format!("label {:?} with a NUL character", label.name));
            }
            // serde_json turns numbers beyond f32 into infinities.
            if !label.default.is_finite() || !label.neutral.unwrap_or(0.0).is_finite() {
                return Err(format!("label `{}` with an infinite weight", label.name));
            }
        }
        Ok(Self(labels))
    }

    /// A list of labels with different names.
    pub fn new(labels: Vec<Label>) -> Result<Self, Error> {
        Self::checked(labels).map_err(|found| {
            Error::argument("labels", "labels as docs/format.md describes them", found)
        })
    }

    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string(&self.0).expect("labels have only string keys and finite numbers")
    }

    /// Position of a label.
    pub fn index(&self, key: &LabelKey) -> Result<usize, Error> {
        match key {
            LabelKey::Name(name) => self.0.iter().position(|label| label.name == *name),
            LabelKey::Index(index) => (*index < self.0.len()).then_some(*index),
        }
        .ok_or_else(|| {
            let names = || self.0.iter().map(|label| label.name.as_str());
            let (name, nearest) = match key {
                LabelKey::Name(name) => (name.clone(), nearest(name, names())),
                LabelKey::Index(index) => (index.to_string(), None),
            };
            Error::UnknownLabel {
                name,
                nearest,
                known: names().collect::<Vec<_>>().join(", "),
            }
        })
    }

    /// The weight w_i of every label under a selection.
    pub fn weights(&self, selection: &Selection) -> Result<Vec<f32>, Error> {
        let chosen = match selection {
            Selection::Default => return Ok(self.0.iter().map(|label| label.default).collect()),
            Selection::All => return Ok(vec![1.0; self.0.len()]),
            Selection::None => return Ok(vec![0.0; self.0.len()]),
            Selection::Weights(chosen) => chosen,
        };
        let mut weights = vec![0.0; self.0.len()];
        for (key, weight) in chosen {
            let index = self.index(key)?;
            if !weight.is_finite() {
                return Err(Error::argument(
                    format!("weight of label `{}`", self.0[index].name),
                    "a finite number",
                    weight.to_string(),
                ));
            }
            weights[index] = *weight;
        }
        Ok(weights)
    }
}

impl std::ops::Deref for Labels {
    type Target = [Label];

    fn deref(&self) -> &[Label] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels() -> Labels {
        Labels::from_json(
            r#"[{"name": "vibrant color", "positive": "vibrant color", "negative": "sks"},
                {"name": "sharp focus", "positive": "sharp focus", "negative": "ohwx",
                 "default": 0.5}]"#,
        )
        .unwrap()
    }

    #[test]
    fn selections_become_weights() {
        for (selection, expected) in [
            (Selection::Default, [1.0, 0.5]),
            (Selection::All, [1.0, 1.0]),
            (Selection::None, [0.0, 0.0]),
            (Selection::only(["sharp focus"]), [0.0, 1.0]),
            (Selection::only([0]), [1.0, 0.0]),
            (Selection::weights([("vibrant color", 1.5)]), [1.5, 0.0]),
        ] {
            assert_eq!(
                labels().weights(&selection).unwrap(),
                expected,
                "{selection:?}"
            );
        }
    }

    #[test]
    fn unknown_labels_list_the_known_ones() {
        let error = |selection| labels().weights(&selection).unwrap_err().to_string();
        assert_eq!(
            error(Selection::only(["Vibrant colour"])),
            "unknown label `Vibrant colour` (did you mean `vibrant color`?); \
             known labels: vibrant color, sharp focus"
        );
        assert_eq!(
            error(Selection::only([2])),
            "unknown label `2`; known labels: vibrant color, sharp focus"
        );
        assert_eq!(
            error(Selection::weights([(1, f32::NAN)])),
            "weight of label `sharp focus`: expected a finite number, found NaN"
        );
    }

    #[test]
    fn bad_lists_are_refused() {
        let label = |name| format!(r#"{{"name": "{name}", "positive": "a", "negative": "b"}}"#);
        for (json, complaint) in [
            ("[]".to_owned(), "an empty list"),
            (format!("[{}]", label("all")), "reserved"),
            (format!("[{},{}]", label("a"), label("a")), "two labels"),
            (format!("[{}]", label(" ")), "without a name"),
            (
                r#"[{"name": "a", "positive": "a", "negative": "b", "default": 1e39}]"#.to_owned(),
                "infinite",
            ),
            (
                format!("[{}]", label(r"a\u0000b")),
                r#"label "a\0b" with a NUL character"#,
            ),
            ("{}".to_owned(), "expected a sequence"),
        ] {
            let found = Labels::from_json(&json).unwrap_err();
            assert!(found.contains(complaint), "{json}: {found}");
        }
    }
}
