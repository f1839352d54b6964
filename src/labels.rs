//! Aesthetic labels and the choice among them (paper, section 3.2).

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use crate::error::{Error, nearest};

/// One aesthetic label: y_a and its counterpart ŷ_a.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Label {
    /// What users choose by, unique in a file.
    pub name: String,
    /// The aesthetic dimension it belongs to, such as "color" or "lighting".
    #[serde(default)]
    pub dimension: String,
    /// Texts that mean having the label, at least one.
    pub positive: Vec<String>,
    /// Texts that mean the opposite, at least one.
    pub negative: Vec<String>,
    /// The weight that hosts start from, within `range`.
    #[serde(default = "one")]
    pub default: f32,
    /// The weight at which the label changes nothing, if there is one.
    #[serde(default)]
    pub neutral: Option<f32>,
    /// Lowest and highest weight of a slider.
    #[serde(default = "zero_to_one")]
    pub range: [f32; 2],
    /// Step of a slider.
    #[serde(default = "twentieth")]
    pub step: f32,
    /// What was measured when the file was made, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub effect: BTreeMap<String, f64>,
    /// Names to show, by language tag.
    #[serde(default)]
    pub display_names: BTreeMap<String, String>,
    /// Keys of a later version, which are kept.
    #[serde(flatten)]
    pub(crate) other: BTreeMap<String, serde_json::Value>,
}

fn one() -> f32 {
    1.0
}

fn zero_to_one() -> [f32; 2] {
    [0.0, 1.0]
}

fn twentieth() -> f32 {
    0.05
}

impl Label {
    /// A label with one positive and one negative text, and everything else as in a file that does
    /// not say it.
    pub fn new(
        name: impl Into<String>,
        positive: impl Into<String>,
        negative: impl Into<String>,
    ) -> Self {
        Self {
            name: name.into(),
            dimension: String::new(),
            positive: vec![positive.into()],
            negative: vec![negative.into()],
            default: one(),
            neutral: None,
            range: zero_to_one(),
            step: twentieth(),
            effect: BTreeMap::new(),
            display_names: BTreeMap::new(),
            other: BTreeMap::new(),
        }
    }

    /// Its weight where a selection leaves it out: neutral, or 0 where it has no neutral weight.
    pub fn left_out(&self) -> f32 {
        self.neutral.unwrap_or(0.0)
    }

    /// The weight opposite to `weight`: 2·neutral − w, or 0 where it has no neutral weight.
    pub fn opposite(&self, weight: f32) -> f32 {
        let mirrored = |neutral: f32| 2.0 * f64::from(neutral) - f64::from(weight);
        self.neutral.map_or(0.0, |neutral| mirrored(neutral) as f32)
    }

    /// What is wrong with it, if anything.
    fn check(&self) -> Result<(), String> {
        let Self { name, .. } = self;
        if name.trim().is_empty() {
            return Err("a label without a name".into());
        }
        if Labels::RESERVED.contains(&name.as_str()) {
            return Err(format!("a label named `{name}`, which is reserved"));
        }
        for (side, texts) in [("positive", &self.positive), ("negative", &self.negative)] {
            if texts.is_empty() {
                return Err(format!("label `{name}` without a {side} text"));
            }
        }
        // C hosts get these as strings that end at their first NUL.
        let texts = self.positive.iter().chain(&self.negative);
        let mut texts = texts.chain([name, &self.dimension]);
        if texts.any(|text| text.contains('\0')) {
            return Err(format!("label {name:?} with a NUL character"));
        }
        // serde_json turns numbers beyond f32 into infinities.
        let [low, high] = self.range;
        let neutral = self.neutral.unwrap_or(0.0);
        let numbers = [self.default, neutral, low, high, self.step];
        if numbers.iter().any(|number| !number.is_finite()) {
            return Err(format!("label `{name}` with a number that is not finite"));
        }
        if self.effect.values().any(|number| !number.is_finite()) {
            return Err(format!("label `{name}` with an effect that is not finite"));
        }
        if low >= high {
            return Err(format!("label `{name}` with the range {low} to {high}"));
        }
        if self.step <= 0.0 {
            return Err(format!("label `{name}` with the step {}", self.step));
        }
        if !(low..=high).contains(&self.default) {
            let default = self.default;
            return Err(format!(
                "label `{name}` with the default {default} outside of its range {low} to {high}"
            ));
        }
        Ok(())
    }
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

/// How much of each label is wanted, its weight w.
///
/// In a file with coefficients "layernorm" 0 is a label's negative text and 1 its positive text:
/// f_t\[i\] = t̂_i + w_i·(t_i − t̂_i). In a "linear" file −1 is the negative text, 0 changes nothing and
/// 1 is the positive text. Any finite weight is allowed.
///
/// A label that is left out is at its neutral weight, or at 0 where it has none.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Selection {
    /// Each label at the file's own default, which is 1 for a trained adapter, as in the paper.
    #[default]
    Default,
    /// Every label at 1; trained adapters only.
    All,
    /// Every label left out.
    None,
    /// These labels at these weights, every other one left out.
    Weights(Vec<(LabelKey, f32)>),
}

impl Selection {
    /// The labels at these weights, every other one left out.
    pub fn weights<K: Into<LabelKey>>(weights: impl IntoIterator<Item = (K, f32)>) -> Self {
        Self::Weights(weights.into_iter().map(|(k, w)| (k.into(), w)).collect())
    }

    /// The labels at 1, every other one left out.
    pub fn only<K: Into<LabelKey>>(labels: impl IntoIterator<Item = K>) -> Self {
        Self::weights(labels.into_iter().map(|label| (label, 1.0)))
    }
}

/// The labels of a file, in its order.
#[derive(Debug, Clone)]
pub struct Labels {
    list: Vec<Label>,
    by_name: HashMap<String, usize>,
}

impl PartialEq for Labels {
    fn eq(&self, other: &Self) -> bool {
        self.list == other.list
    }
}

impl Labels {
    /// Names that mean a whole selection and therefore cannot be labels.
    pub(crate) const RESERVED: [&str; 2] = ["all", "none"];

    /// Reads and checks the JSON list of `vmix.labels`; the error says what was found instead.
    pub(crate) fn from_json(json: &str) -> Result<Self, String> {
        Self::checked(crate::json::parse(json)?)
    }

    /// Labels with all that a list of them must be; the error says what was found instead.
    pub(crate) fn checked(labels: Vec<Label>) -> Result<Self, String> {
        if labels.is_empty() {
            return Err("an empty list".into());
        }
        let mut by_name = HashMap::new();
        for (i, label) in labels.iter().enumerate() {
            label.check()?;
            if by_name.insert(label.name.clone(), i).is_some() {
                return Err(format!("two labels named `{}`", label.name));
            }
        }
        Ok(Self {
            list: labels,
            by_name,
        })
    }

    /// A list of labels with different names.
    pub fn new(labels: Vec<Label>) -> Result<Self, Error> {
        Self::checked(labels).map_err(|found| {
            Error::argument("labels", "labels as docs/format.md describes them", found)
        })
    }

    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string(&self.list).expect("labels have only string keys and finite numbers")
    }

    /// Position of a label.
    pub fn index(&self, key: &LabelKey) -> Result<usize, Error> {
        match key {
            LabelKey::Name(name) => self.by_name.get(name).copied(),
            LabelKey::Index(index) => (*index < self.list.len()).then_some(*index),
        }
        .ok_or_else(|| {
            let names = || self.list.iter().map(|label| label.name.as_str());
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
            Selection::Default => return Ok(self.list.iter().map(|label| label.default).collect()),
            Selection::All => return Ok(vec![1.0; self.list.len()]),
            Selection::None => &Vec::new(),
            Selection::Weights(chosen) => chosen,
        };
        let mut weights: Vec<f32> = self.list.iter().map(Label::left_out).collect();
        for (key, weight) in chosen {
            let index = self.index(key)?;
            weights[index] = finite(&self.list[index], *weight)?;
        }
        Ok(weights)
    }

    /// The opposite of these weights, which the policy `contrast` mixes into the unconditional pass.
    pub(crate) fn opposite(&self, weights: &[f32]) -> Result<Vec<f32>, Error> {
        let pairs = self.list.iter().zip(weights);
        pairs
            .map(|(label, &weight)| finite(label, label.opposite(weight)))
            .collect()
    }

    /// The label furthest from where it changes least, and its weight: what an overflow is about.
    pub(crate) fn furthest(&self, weights: &[f32]) -> String {
        let distance = |i: &usize| (weights[*i] - self.list[*i].left_out()).abs();
        (0..self.list.len())
            .max_by(|a, b| distance(a).total_cmp(&distance(b)))
            .map(|i| format!("label `{}` at weight {}", self.list[i].name, weights[i]))
            .unwrap_or_default()
    }
}

fn finite(label: &Label, weight: f32) -> Result<f32, Error> {
    match weight.is_finite() {
        true => Ok(weight),
        false => Err(Error::argument(
            format!("weight of label `{}`", label.name),
            "a finite number",
            weight.to_string(),
        )),
    }
}

impl std::ops::Deref for Labels {
    type Target = [Label];

    fn deref(&self) -> &[Label] {
        &self.list
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels() -> Labels {
        Labels::from_json(
            r#"[{"name": "vibrant color", "positive": ["vibrant color"], "negative": ["sks"]},
                {"name": "sharp focus", "positive": ["sharp focus"], "negative": ["ohwx", ""],
                 "default": 0.5, "neutral": 0.25, "later": [1]}]"#,
        )
        .unwrap()
    }

    #[test]
    fn selections_become_weights() {
        for (selection, expected) in [
            (Selection::Default, [1.0, 0.5]),
            (Selection::All, [1.0, 1.0]),
            (Selection::None, [0.0, 0.25]),
            (Selection::only(["sharp focus"]), [0.0, 1.0]),
            (Selection::only([0]), [1.0, 0.25]),
            (Selection::weights([("vibrant color", 1.5)]), [1.5, 0.25]),
        ] {
            assert_eq!(
                labels().weights(&selection).unwrap(),
                expected,
                "{selection:?}"
            );
        }
    }

    #[test]
    fn the_opposite_of_a_selection_is_mirrored_at_neutral() {
        let opposite = |selection| {
            let weights = labels().weights(&selection).unwrap();
            labels().opposite(&weights).unwrap()
        };
        assert_eq!(opposite(Selection::All), [0.0, -0.5]);
        assert_eq!(opposite(Selection::None), [0.0, 0.25]);
    }

    #[test]
    fn keys_of_a_later_version_are_kept() {
        let labels = labels();
        assert_eq!(Labels::from_json(&labels.to_json()).unwrap(), labels);
        assert!(
            labels.to_json().contains(r#""later":[1]"#),
            "{}",
            labels.to_json()
        );
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
        let label = |name| format!(r#"{{"name": "{name}", "positive": ["a"], "negative": ["b"]}}"#);
        for (json, complaint) in [
            ("[]".to_owned(), "an empty list"),
            (format!("[{}]", label("all")), "reserved"),
            (format!("[{},{}]", label("a"), label("a")), "two labels"),
            (format!("[{}]", label(" ")), "without a name"),
            (
                r#"[{"name": "a", "positive": ["a"], "negative": ["b"], "default": 1e39}]"#
                    .to_owned(),
                "not finite",
            ),
            (
                format!("[{}]", label(r"a\u0000b")),
                r#"label "a\0b" with a NUL character"#,
            ),
            ("{}".to_owned(), "expected a sequence"),
            (
                r#"[{"name": "a", "positive": [], "negative": ["b"]}]"#.to_owned(),
                "label `a` without a positive text",
            ),
            (
                r#"[{"name": "a", "positive": ["a"], "negative": ["b"], "range": [1, 1]}]"#
                    .to_owned(),
                "range 1 to 1",
            ),
            (
                r#"[{"name": "a", "positive": ["a"], "negative": ["b"], "default": 2}]"#.to_owned(),
                "default 2 outside of its range 0 to 1",
            ),
            (
                r#"[{"name": "a", "positive": ["a"], "negative": ["b"], "step": 0}]"#.to_owned(),
                "step 0",
            ),
        ] {
            let found = Labels::from_json(&json).unwrap_err();
            assert!(found.contains(complaint), "{json}: {found}");
        }
    }
}
