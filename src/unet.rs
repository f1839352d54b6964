//! The cross-attention layers of the U-Nets, by their diffusers and LDM names.
//!
//! A layer's identity is its diffusers path, never an ordinal: hosts walk the blocks in different
//! orders, and an index that is off by one loads silently wrong.

use std::collections::HashMap;

use crate::{
    error::{Error, nearest},
    metadata::named,
};

named! {
    /// The kind of U-Net an adapter was made for.
    pub enum Base {
        /// Stable Diffusion 1.x: 16 cross-attention layers, context width 768.
        Sd15 = "sd15",
        /// Stable Diffusion XL: 70 cross-attention layers, context width 2048.
        Sdxl = "sdxl",
        /// Any other U-Net; its layers are those the file names.
        Other = "other",
    }
}

/// One cross-attention layer (`attn2`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// diffusers path, such as `down_blocks.0.attentions.0.transformer_blocks.0.attn2`.
    pub name: String,
    /// LDM path, such as `input_blocks.1.1.transformer_blocks.0.attn2`; `None` where unknown.
    pub ldm_name: Option<String>,
    /// Width of the layer's values, heads × head dimension.
    pub inner_dim: usize,
}

/// Spatial transformers of one U-Net block: `attentions` of them, each of `depth` layers.
struct Block {
    place: Place,
    attentions: usize,
    depth: usize,
    inner_dim: usize,
}

#[derive(Clone, Copy)]
enum Place {
    Down(usize),
    Mid,
    Up(usize),
}
use Place::{Down, Mid, Up};

const fn block(place: Place, attentions: usize, depth: usize, inner_dim: usize) -> Block {
    Block {
        place,
        attentions,
        depth,
        inner_dim,
    }
}

/// diffusers' `layers_per_block` of both known bases; up blocks have one more.
const LAYERS_PER_BLOCK: usize = 2;

const SD15: &[Block] = &[
    block(Down(0), 2, 1, 320),
    block(Down(1), 2, 1, 640),
    block(Down(2), 2, 1, 1280),
    block(Mid, 1, 1, 1280),
    block(Up(1), 3, 1, 1280),
    block(Up(2), 3, 1, 640),
    block(Up(3), 3, 1, 320),
];

const SDXL: &[Block] = &[
    block(Down(1), 2, 2, 640),
    block(Down(2), 2, 10, 1280),
    block(Mid, 1, 10, 1280),
    block(Up(0), 3, 10, 1280),
    block(Up(1), 3, 2, 640),
];

impl Base {
    /// Width d of the context that this U-Net receives; `None` for [`Base::Other`].
    pub const fn context_dim(self) -> Option<usize> {
        match self {
            Self::Sd15 => Some(768),
            Self::Sdxl => Some(2048),
            Self::Other => None,
        }
    }

    /// Tokens C of one chunk of context; `None` for [`Base::Other`].
    pub const fn context_tokens(self) -> Option<usize> {
        match self {
            Self::Sd15 | Self::Sdxl => Some(77),
            Self::Other => None,
        }
    }

    /// The cross-attention layers, down to up; `None` for [`Base::Other`].
    pub fn layers(self) -> Option<Layers> {
        let blocks = match self {
            Self::Sd15 => SD15,
            Self::Sdxl => SDXL,
            Self::Other => return None,
        };
        Some(Layers::new(blocks.iter().flat_map(Block::layers).collect()))
    }
}

impl Block {
    fn layers(&self) -> impl Iterator<Item = Layer> + '_ {
        let block = match self.place {
            Down(level) => format!("down_blocks.{level}"),
            Mid => "mid_block".to_owned(),
            Up(level) => format!("up_blocks.{level}"),
        };
        (0..self.attentions).flat_map(move |attention| {
            let block = block.clone();
            (0..self.depth).map(move |depth| {
                let name =
                    format!("{block}.attentions.{attention}.transformer_blocks.{depth}.attn2");
                Layer {
                    ldm_name: ldm_name(&name, LAYERS_PER_BLOCK),
                    inner_dim: self.inner_dim,
                    name,
                }
            })
        })
    }
}

/// The LDM path of a diffusers path, in a U-Net whose levels are laid out as Stable Diffusion's,
/// with `layers_per_block` residual layers each (2 in SD1.5 and SDXL); `None` if the name is not
/// one of a spatial transformer's parts.
pub fn ldm_name(diffusers_name: &str, layers_per_block: usize) -> Option<String> {
    let (place, rest) = diffusers_name.split_once(".attentions.")?;
    let (attention, rest) = rest.split_once(".transformer_blocks.")?;
    let attention: usize = attention.parse().ok()?;
    let level = |prefix| place.strip_prefix(prefix)?.parse::<usize>().ok();
    let number = |level| {
        (layers_per_block + 1)
            .checked_mul(level)?
            .checked_add(attention)
    };
    let block = if place == "mid_block" {
        // Between two residual layers, and alone.
        (attention == 0).then(|| "middle_block.1".to_owned())?
    } else if let Some(level) = level("down_blocks.") {
        // Block 0 is the first convolution; every level ends in a downsampler.
        format!("input_blocks.{}.1", number(level)?.checked_add(1)?)
    } else {
        // Up blocks have one layer more, and their upsampler shares a block with the last.
        format!("output_blocks.{}.1", number(level("up_blocks.")?)?)
    };
    Some(format!("{block}.transformer_blocks.{rest}"))
}

/// The cross-attention layers of one U-Net, found by either name.
#[derive(Debug, Clone)]
pub struct Layers {
    layers: Vec<Layer>,
    by_name: HashMap<String, usize>,
}

impl Layers {
    pub(crate) fn new(layers: Vec<Layer>) -> Self {
        let by_name = layers
            .iter()
            .enumerate()
            .flat_map(|(index, layer)| {
                [Some(&layer.name), layer.ldm_name.as_ref()]
                    .into_iter()
                    .flatten()
                    .map(move |name| (name.clone(), index))
            })
            .collect();
        Self { layers, by_name }
    }

    /// Layers of a U-Net without a table, in the order in which the U-Net runs them.
    /// A file may give two layers one name, or none, or a NUL character; the error says which.
    pub(crate) fn sorted(mut layers: Vec<Layer>) -> Result<Self, String> {
        layers.sort_by_cached_key(|layer| execution_order(&layer.name));
        let layers = Self::new(layers);
        for (index, layer) in layers.layers.iter().enumerate() {
            for name in [Some(&layer.name), layer.ldm_name.as_ref()]
                .into_iter()
                .flatten()
            {
                if name.is_empty() {
                    return Err("a layer without a name".to_owned());
                }
                // C hosts get names as strings that end at their first NUL.
                if name.contains('\0') {
                    return Err(format!("{name:?}, with a NUL character"));
                }
                if layers.by_name[name] != index {
                    return Err(format!("`{name}` for two layers"));
                }
            }
        }
        Ok(layers)
    }

    /// Position of the layer with this diffusers or LDM name.
    pub fn index(&self, name: &str) -> Result<usize, Error> {
        self.by_name
            .get(name)
            .copied()
            .ok_or_else(|| Error::UnknownLayer {
                name: name.to_owned(),
                nearest: nearest(name, self.by_name.keys().map(String::as_str)),
                count: self.layers.len(),
            })
    }

    /// The layer with this diffusers or LDM name.
    pub fn get(&self, name: &str) -> Result<&Layer, Error> {
        Ok(&self.layers[self.index(name)?])
    }

    /// Whether there is a layer with this diffusers or LDM name.
    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }
}

impl std::ops::Deref for Layers {
    type Target = [Layer];

    fn deref(&self) -> &[Layer] {
        &self.layers
    }
}

/// down < mid < up, and block 10 after block 9.
fn execution_order(name: &str) -> (u8, Vec<(u64, String)>) {
    let place = match name.split('.').next() {
        Some("down_blocks") => 0,
        Some("mid_block") => 1,
        Some("up_blocks") => 2,
        _ => 3,
    };
    let parts = name
        .split('.')
        .map(|part| (part.parse().unwrap_or(0), part.to_owned()))
        .collect();
    (place, parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_widths_are_those_of_the_papers_bases() {
        let widths = |base: Base, width| {
            let layers = base.layers().unwrap();
            layers.iter().filter(|l| l.inner_dim == width).count()
        };
        assert_eq!([320, 640, 1280].map(|w| widths(Base::Sd15, w)), [5, 5, 6]);
        assert_eq!([640, 1280].map(|w| widths(Base::Sdxl, w)), [10, 60]);
    }

    /// Pairs read off diffusers' own LDM conversion script and real checkpoints' keys.
    #[test]
    fn names_translate_both_ways() {
        for (base, diffusers, ldm) in [
            (Base::Sd15, "down_blocks.0.attentions.0", "input_blocks.1.1"),
            (Base::Sd15, "down_blocks.2.attentions.1", "input_blocks.8.1"),
            (Base::Sd15, "mid_block.attentions.0", "middle_block.1"),
            (Base::Sd15, "up_blocks.1.attentions.0", "output_blocks.3.1"),
            (Base::Sd15, "up_blocks.3.attentions.2", "output_blocks.11.1"),
            (Base::Sdxl, "down_blocks.1.attentions.0", "input_blocks.4.1"),
            (Base::Sdxl, "down_blocks.2.attentions.1", "input_blocks.8.1"),
            (Base::Sdxl, "up_blocks.0.attentions.2", "output_blocks.2.1"),
            (Base::Sdxl, "up_blocks.1.attentions.2", "output_blocks.5.1"),
        ] {
            let layers = base.layers().unwrap();
            let diffusers = format!("{diffusers}.transformer_blocks.0.attn2");
            let ldm = format!("{ldm}.transformer_blocks.0.attn2");
            assert_eq!(
                layers.get(&diffusers).unwrap().ldm_name.as_deref(),
                Some(&*ldm)
            );
            assert_eq!(layers.get(&ldm).unwrap().name, diffusers);
        }
    }

    #[test]
    fn names_of_other_depths_translate_too() {
        let ldm =
            |name: &str, layers| ldm_name(&format!("{name}.transformer_blocks.1.attn2"), layers);
        for (name, layers, expected) in [
            ("down_blocks.1.attentions.0", 1, Some("input_blocks.3.1")),
            ("up_blocks.1.attentions.1", 1, Some("output_blocks.3.1")),
            ("mid_block.attentions.1", 1, None),
            ("down_blocks.x.attentions.0", 1, None),
            ("motion_modules.0.attentions.0", 1, None),
            ("up_blocks.18446744073709551615.attentions.0", 1, None),
        ] {
            let expected = expected.map(|block| format!("{block}.transformer_blocks.1.attn2"));
            assert_eq!(ldm(name, layers), expected, "{name}");
        }
    }

    #[test]
    fn the_sorted_order_of_names_is_the_table_order() {
        for base in [Base::Sd15, Base::Sdxl] {
            let table = base.layers().unwrap();
            let mut shuffled = table.to_vec();
            shuffled.reverse();
            assert_eq!(&*Layers::sorted(shuffled).unwrap(), &*table);
        }
    }
}
