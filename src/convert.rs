//! Files in another element type.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    Adapter, DType, Error, Result, Tensor, ValueWeights, Values,
    adapter::VALUE_WEIGHT,
    values::{LayerValues, Origin},
};

/// Keys that hold for one file's bytes only.
const OF_THE_BYTES: [&str; 1] = ["modelspec.hash_sha256"];

impl Adapter {
    /// The same adapter with its value weights rounded to `dtype`. AesEmb and the projection stay as
    /// they are: they are small, and every layer goes through them.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let file = self.file();
        if self.value_weights() == ValueWeights::Base {
            return Err(file.meta_error(
                "vmix.value_weights",
                "`own`, weights that can be converted",
                "`base`",
            ));
        }
        let tensors = file
            .tensor_names()
            .map(|name| {
                let tensor = file.tensor(name)?.to_tensor();
                let tensor = if name.ends_with(VALUE_WEIGHT) {
                    rounded(tensor, dtype)
                        .map_err(|(expected, found)| file.tensor_error(name, expected, found))?
                } else {
                    tensor
                };
                Ok((name.to_owned(), tensor))
            })
            .collect::<Result<_>>()?;
        let mut metadata = self.metadata().clone();
        metadata.retain(|key, _| !OF_THE_BYTES.contains(&key.as_str()));
        Self::from_tensors(&tensors, &metadata)
    }
}

impl Values {
    /// The same values rounded to `dtype`.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let tensors = self.layers().iter().zip(self.tensors());
        let tensors = tensors.map(|(layer, values)| {
            let convert = |tensor: &Arc<Tensor>| -> Result<Arc<Tensor>> {
                let rounded = rounded((**tensor).clone(), dtype);
                Ok(Arc::new(rounded.map_err(|(expected, found)| {
                    Error::argument(&layer.name, expected, found)
                })?))
            };
            Ok(LayerValues {
                cond: convert(&values.cond)?,
                uncond: values.uncond.as_ref().map(convert).transpose()?,
            })
        });
        let mut inherited: BTreeMap<_, _> = self.inherited().clone();
        inherited.retain(|key, _| !OF_THE_BYTES.contains(&key.as_str()));
        Ok(Self::new(
            self.common().clone(),
            self.layers().clone(),
            self.weights().to_vec(),
            Origin::Hash(self.origin().to_owned()),
            inherited,
            tensors.collect::<Result<_>>()?,
        ))
    }
}

/// The tensor in that dtype; else what was expected and found.
fn rounded(tensor: Tensor, dtype: DType) -> std::result::Result<Tensor, (String, &'static str)> {
    let tensor = match tensor.dtype() == dtype {
        true => tensor,
        false => Tensor::rounded(tensor.shape(), tensor.to_f32(), dtype),
    };
    if tensor.is_finite() {
        return Ok(tensor);
    }
    let expected = format!("finite values that {dtype} can hold");
    Err((expected, "NaN, infinity or more"))
}
