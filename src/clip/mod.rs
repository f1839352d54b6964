//! The text encoders of Stable Diffusion: what AesEmb is filled by (paper, eq. 4).

mod config;
mod model;
mod names;
mod product;
mod tokenizer;

use std::path::Path;

use crate::{
    Checkpoint, DType, Error, Label, Labels, Result, Tensor, checkpoint::Source,
    component::Component, error::presentable,
};

pub use config::{Activation, ClipConfig};
pub use model::{ClipOutput, ClipTextModel};
pub use tokenizer::{CLIP_MERGES, Tokenizer};

use model::{Hidden, first_end};
pub(crate) use names::Names;

/// The text encoders of one base: CLIP-L in SD1.5; CLIP-L and OpenCLIP bigG, side by side, in SDXL.
#[derive(Debug, Clone)]
pub struct TextEncoder {
    parts: Vec<Part>,
    hidden: Hidden,
}

#[derive(Debug, Clone)]
struct Part {
    tokenizer: Tokenizer,
    model: ClipTextModel,
}

impl TextEncoder {
    /// Opens the text encoders of a single-file checkpoint or a diffusers folder; nothing is read but
    /// headers, configurations and vocabularies.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Checkpoint::open(path)?.text_encoder()
    }

    fn new(parts: Vec<Part>, checkpoint: &Checkpoint) -> Result<Self> {
        // What the U-Net receives: docs/format.md, `context_eot`.
        let hidden = match parts.len() {
            1 => Hidden::Last,
            _ => Hidden::Penultimate,
        };
        let encoder = Self { parts, hidden };
        let (ours, theirs) = (encoder.context_dim(), checkpoint.context_dim());
        if ours != theirs {
            return Err(Error::argument(
                checkpoint.path().display().to_string(),
                format!("text encoders for a context of width {theirs}, as its U-Net receives"),
                format!("{} of together {ours}", encoder.parts.len()),
            ));
        }
        Ok(encoder)
    }

    /// Width d of the context that the U-Net receives.
    pub fn context_dim(&self) -> usize {
        let widths = self
            .parts
            .iter()
            .map(|part| part.model.config().hidden_size);
        widths.sum()
    }

    /// C, the tokens of one chunk of context.
    pub fn context_tokens(&self) -> usize {
        let part = &self.parts[0];
        let longest = part.model.config().max_positions;
        longest.min(part.tokenizer.max_tokens())
    }

    /// Its text models: one, or SDXL's two.
    pub fn models(&self) -> impl ExactSizeIterator<Item = &ClipTextModel> {
        self.parts.iter().map(|part| &part.model)
    }

    /// The tokenizer of each.
    pub fn tokenizers(&self) -> impl ExactSizeIterator<Item = &Tokenizer> {
        self.parts.iter().map(|part| &part.tokenizer)
    }

    /// What speaks against the texts of labels, a sentence each: every text needs a feature of its own,
    /// and a negative must say nothing (paper, section 3.2).
    pub fn warnings(&self, labels: &Labels) -> Result<Vec<String>> {
        let tokenizer = &self.parts[0].tokenizer;
        // What a feature is taken from: texts of the same tokens up to their first end are one.
        let meaning = |text: &String| -> Result<Vec<u32>> {
            let mut ids = tokenizer.encode(text)?;
            ids.truncate(first_end(&ids));
            Ok(ids)
        };
        let meanings = |texts: &[String]| texts.iter().map(meaning).collect::<Result<Vec<_>>>();
        let mut warnings = Vec::new();
        type Tokens = Vec<Vec<u32>>;
        let mut seen: Vec<(&Label, Tokens, Tokens)> = Vec::new();
        for label in labels.iter() {
            let name = &label.name;
            for negative in &label.negative {
                if let Some(why) = tokenizer.why_not_rare(negative)? {
                    let negative = match negative.as_str() {
                        "" => "(no text)".to_owned(),
                        text => format!("`{text}`"),
                    };
                    warnings.push(format!(
                        "label `{name}`: the negative {negative} is not a rare identifier: {why}"
                    ));
                }
            }
            let (with, without) = (meanings(&label.positive)?, meanings(&label.negative)?);
            for (positive, ids) in label.positive.iter().zip(&with) {
                if let Some(same) = without.iter().position(|other| other == ids) {
                    let negative = &label.negative[same];
                    warnings.push(format!(
                        "label `{name}`: `{positive}` and the negative `{negative}` are the same to \
                         the text encoder, so the label can do nothing"
                    ));
                }
                if let Some((other, ..)) = seen.iter().find(|(_, seen, _)| seen.contains(ids)) {
                    warnings.push(format!(
                        "label `{name}`: its text `{positive}` is that of `{}`",
                        other.name
                    ));
                }
            }
            for (negative, ids) in label.negative.iter().zip(&without) {
                if let Some((other, ..)) = seen.iter().find(|(.., seen)| seen.contains(ids)) {
                    warnings.push(format!(
                        "label `{name}`: its negative `{negative}` is that of `{}`",
                        other.name
                    ));
                }
            }
            seen.push((label, with, without));
        }
        Ok(warnings)
    }

    /// \[B, d\]: for every text the feature at its first end-of-text position, of the context that the
    /// U-Net receives. This is what AesEmb holds (`context_eot`). `progress` is told how many of how
    /// many steps are done.
    pub fn features(
        &self,
        texts: &[&str],
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Tensor> {
        let counts = self
            .parts
            .iter()
            .map(|part| part.model.block_count(self.hidden));
        let total = counts.sum();
        let mut done = 0;
        let mut step = || {
            done += 1;
            progress(done, total);
        };
        let width = self.context_dim();
        let mut values = vec![0.0; texts.len() * width];
        let mut start = 0;
        for Part { tokenizer, model } in &self.parts {
            let most = model.config().max_positions.min(tokenizer.max_tokens());
            let encode = |text: &&str| {
                let ids = tokenizer.encode(text)?;
                if ids.len() > most {
                    return Err(Error::argument(
                        format!("the text {:?}", presentable(text, 60)),
                        format!("at most {} tokens", most.saturating_sub(2)),
                        format!("{}", ids.len() - 2),
                    ));
                }
                Ok(ids)
            };
            let ids = texts.iter().map(encode).collect::<Result<Vec<_>>>()?;
            let features = model.features(&ids, self.hidden, &mut step)?;
            let d = model.config().hidden_size;
            for (row, feature) in values.chunks_exact_mut(width).zip(features.chunks_exact(d)) {
                row[start..][..d].copy_from_slice(feature);
            }
            start += d;
        }
        let shape = [texts.len(), width];
        Ok(Tensor::rounded(shape, values, DType::F32))
    }
}

impl Checkpoint {
    /// Its text encoders; nothing is read but headers, configurations and vocabularies.
    pub fn text_encoder(&self) -> Result<TextEncoder> {
        let parts = match &self.source {
            Source::File(file) => {
                let part = |prefix: &str, names: Names| -> Result<Part> {
                    Ok(Part {
                        tokenizer: Tokenizer::clip(),
                        model: ClipTextModel::new(
                            Component::new(file.clone(), prefix),
                            names,
                            None,
                        )?,
                    })
                };
                // Some merged checkpoints of SD1.5 leave `text_model.` out.
                let clip_l = |prefix: &str| {
                    let component = Component::new(file.clone(), prefix);
                    let names = transformers_names(&component);
                    component
                        .has_tensor(&names.token_embedding())
                        .then_some(names)
                };
                const SD15: &str = "cond_stage_model.transformer.";
                const SDXL: &str = "conditioner.embedders.0.transformer.";
                if let Some(names) = clip_l(SDXL) {
                    vec![
                        part(SDXL, names)?,
                        part("conditioner.embedders.1.model.", Names::OpenClip)?,
                    ]
                } else {
                    let names = clip_l(SD15).ok_or_else(|| {
                        file.tensor_error(
                            "cond_stage_model.transformer.text_model.embeddings.\
                             token_embedding.weight",
                            "the CLIP text model of an SD1.5 or SDXL checkpoint",
                            "none",
                        )
                    })?;
                    vec![part(SD15, names)?]
                }
            }
            Source::Folder(folder) => {
                let second = folder.join("text_encoder_2").exists();
                let numbers: &[&str] = if second { &["", "_2"] } else { &[""] };
                numbers
                    .iter()
                    .map(|number| {
                        let encoder = folder.join(format!("text_encoder{number}"));
                        let tokenizer = folder.join(format!("tokenizer{number}"));
                        let weights = Component::open(&encoder, "model")?;
                        let names = transformers_names(&weights);
                        let config = ClipConfig::open(&encoder.join("config.json"))?;
                        // ComfyUI users copy models without them.
                        let tokenizer = match tokenizer.is_dir() {
                            true => Tokenizer::open(tokenizer)?,
                            false if config.vocab_size == ClipConfig::CLIP_L.vocab_size => {
                                Tokenizer::clip()
                            }
                            false => {
                                return Err(Error::argument(
                                    tokenizer.display().to_string(),
                                    format!("a tokenizer of {} tokens", config.vocab_size),
                                    "no such folder",
                                ));
                            }
                        };
                        Ok(Part {
                            tokenizer,
                            model: ClipTextModel::new(weights, names, Some(config))?,
                        })
                    })
                    .collect::<Result<_>>()?
            }
        };
        TextEncoder::new(parts, self)
    }
}

fn transformers_names(weights: &Component) -> Names {
    let old = Names::Transformers {
        prefix: "text_model.",
    };
    if weights.has_tensor(&old.token_embedding()) {
        return old;
    }
    Names::Transformers { prefix: "" }
}
