//! Init files from a base's own text encoders (paper, section 3.2, "only once").

use crate::{
    Base, Checkpoint, DType, Kind, Labels, Result, Tensor, Untrained,
    metadata::{Common, write_ldm_names},
};

/// Makes the start of a training for a base model: the labels, and AesEmb with the features of their
/// texts. Where a label has several texts, its feature is the mean of theirs. `progress` is told how
/// many of how many steps are done.
pub fn init_adapter(
    base: &Checkpoint,
    labels: &Labels,
    progress: impl FnMut(usize, usize),
) -> Result<Untrained> {
    let encoder = base.text_encoder()?;
    let sides: Vec<&Vec<String>> = labels
        .iter()
        .flat_map(|label| [&label.positive, &label.negative])
        .collect();
    let texts = sides
        .iter()
        .flat_map(|texts| texts.iter().map(String::as_str));
    let texts: Vec<&str> = texts.collect();
    let features = encoder.features(&texts, progress)?.to_f32();
    let d = encoder.context_dim();
    let mut features = features.chunks_exact(d);
    let mut aes_emb = Vec::new();
    for texts in sides {
        let mut mean = vec![0.0; d];
        for feature in features.by_ref().take(texts.len()) {
            mean.iter_mut()
                .zip(feature)
                .for_each(|(mean, x)| *mean += x);
        }
        // Of one text it is the feature itself, to the last bit.
        mean.iter_mut().for_each(|x| *x /= texts.len() as f32);
        aes_emb.extend(mean);
    }
    let aes_emb = Tensor::rounded([labels.len(), 2, d], aes_emb, DType::F32);

    let common = Common {
        base: base.base(),
        labels: labels.clone(),
        context_tokens: encoder.context_tokens(),
    };
    let mut metadata = common.write(Kind::Init);
    write_ldm_names(base.base(), base.layers(), &mut metadata);
    let architecture = match base.base() {
        Base::Sd15 => "stable-diffusion-v1/vmix",
        Base::Sdxl => "stable-diffusion-xl-v1-base/vmix",
        Base::Other => "unet/vmix",
    };
    for (key, value) in [
        ("modelspec.sai_model_spec", "1.0.0"),
        ("modelspec.architecture", architecture),
        ("modelspec.implementation", "diffusers"),
        ("modelspec.title", "An untrained VMix adapter"),
    ] {
        metadata.insert(key.to_owned(), value.to_owned());
    }
    Untrained::from_parts(&aes_emb, &metadata)
}
