//! Files in another element type.

use std::{collections::BTreeMap, sync::Arc};

use crate::{
    Adapter, DType, Error, Result, Tensor, Values,
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
        let tensors = file
            .tensor_names()
            .map(|name| {
                let tensor = file.tensor(name)?.to_tensor();
                let tensor = if name.ends_with(VALUE_WEIGHT) {
                    rounded(name, tensor, dtype)?
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
                Ok(Arc::new(rounded(&layer.name, (**tensor).clone(), dtype)?))
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

fn rounded(name: &str, tensor: Tensor, dtype: DType) -> Result<Tensor> {
    if tensor.dtype() == dtype {
        return Ok(tensor);
    }
    let rounded = Tensor::rounded(tensor.shape(), tensor.to_f32(), dtype);
    if rounded.is_finite() {
        return Ok(rounded);
    }
    let expected = format!("values that {dtype} can hold");
    Err(Error::argument(name, expected, "NaN, infinity or more"))
}
