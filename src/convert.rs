//! Files in another element type.

use std::{collections::BTreeMap, sync::Arc};

use crate::{Adapter, DType, Error, Result, Tensor, Values, adapter::ROWS, values::LayerValues};

/// Keys that hold for one file's bytes only.
const OF_THE_BYTES: [&str; 1] = ["modelspec.hash_sha256"];

impl Adapter {
    /// The same adapter with its rows rounded to `dtype`. What the coefficients come from stays as it is:
    /// it is small, and every layer depends on it.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let mut tensors = self.tensors()?;
        for layer in self.layers().iter() {
            let rows = rounded(self.rows(&layer.name)?, dtype, &layer.name)?;
            tensors.insert(format!("{}{ROWS}", layer.name), rows);
        }
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
            let convert = |tensor: &Arc<Tensor>| rounded(tensor, dtype, &layer.name).map(Arc::new);
            Ok(LayerValues {
                cond: convert(&values.cond)?,
                uncond: values.uncond.as_ref().map(convert).transpose()?,
            })
        });
        let mut inherited: BTreeMap<_, _> = self.inherited().clone();
        inherited.retain(|key, _| !OF_THE_BYTES.contains(&key.as_str()));
        Ok(Self::new(
            self.common().clone(),
            self.apply_to(),
            self.layers().clone(),
            self.weights().to_vec(),
            self.shared_origin(),
            inherited,
            tensors.collect::<Result<_>>()?,
        ))
    }
}

fn rounded(tensor: &Tensor, dtype: DType, layer: &str) -> Result<Tensor> {
    let tensor = match tensor.dtype() == dtype {
        true => tensor.clone(),
        false => Tensor::rounded(tensor.shape(), tensor.to_f32(), dtype),
    };
    if tensor.is_finite() {
        return Ok(tensor);
    }
    Err(Error::argument(
        format!("layer `{layer}`"),
        format!("values that {dtype} can hold"),
        "more",
    ))
}
