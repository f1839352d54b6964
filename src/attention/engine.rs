//! Kernels, and which of them computes.

use std::{env, fmt, sync::LazyLock};

use super::{blocks::Block, portable, vectors::Plan};
use crate::{
    Error, Result,
    buffer::{Scaled, pack},
    lanes::prefetch,
};

/// What computes attention, V_a and text encoders. All kernels give the same result but for rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kernel {
    /// candle's tensor operations, one after the other: what the others are compared to.
    Plain,
    /// Products by the crate `gemm`, on any processor.
    Portable,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// x86-64 with AVX-512 F.
    Avx512,
    /// AArch64, which always has NEON.
    Neon,
}

/// The variable that forces a kernel.
const VARIABLE: &str = "VMIX_KERNEL";

impl Kernel {
    /// From the plainest to the fastest.
    pub const ALL: [Self; 5] = [
        Self::Plain,
        Self::Portable,
        Self::Avx2,
        Self::Avx512,
        Self::Neon,
    ];

    /// Its name, as the environment variable `VMIX_KERNEL` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Neon => "neon",
        }
    }

    /// Whether this processor has what the kernel needs.
    pub fn is_available(self) -> bool {
        match self {
            Self::Plain | Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => is_x86_feature_detected!("avx512f"),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 => false,
            Self::Neon => cfg!(target_arch = "aarch64"),
        }
    }

    /// The fastest that this processor has, or the one that the environment variable `VMIX_KERNEL`
    /// named when it was first asked for.
    ///
    /// # Errors
    /// When the variable names no kernel, or one that this processor has not.
    pub fn chosen() -> Result<Self> {
        static FORCED: LazyLock<Option<String>> =
            LazyLock::new(|| Some(env::var_os(VARIABLE)?.to_string_lossy().into_owned()));
        let available = || Self::ALL.into_iter().filter(|kernel| kernel.is_available());
        let Some(name) = FORCED.as_deref().filter(|name| !name.is_empty()) else {
            return Ok(available().next_back().expect("two need nothing"));
        };
        available()
            .find(|kernel| kernel.name() == name)
            .ok_or_else(|| {
                let names: Vec<_> = available().map(Self::name).collect();
                let expected = format!("one of {}, which this processor has", names.join(", "));
                Error::argument(VARIABLE, expected, format!("`{name}`"))
            })
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A kernel for one number of keys and one width of heads.
pub(super) enum Engine {
    Portable { keys: usize, dim: usize },
    Vectors(Plan),
}

impl Engine {
    /// # Panics
    /// When the processor has not what the kernel needs, or the kernel is the plain one.
    pub fn new(kernel: Kernel, keys: usize, dim: usize) -> Self {
        assert!(kernel.is_available());
        match kernel {
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => Self::Vectors(Plan::avx2(keys, dim)),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512 => Self::Vectors(Plan::avx512(keys, dim)),
            #[cfg(target_arch = "aarch64")]
            Kernel::Neon => Self::Vectors(Plan::neon(keys, dim)),
            Kernel::Portable => Self::Portable { keys, dim },
            _ => unreachable!("{kernel} works on whole tensors"),
        }
    }

    /// Queries of a block are best a multiple of this.
    pub fn block_step(&self) -> usize {
        match self {
            Self::Portable { .. } => portable::ROWS,
            Self::Vectors(plan) => plan.block_step(),
        }
    }

    /// Length of a row of scores.
    pub fn padded_keys(&self) -> usize {
        match self {
            Self::Portable { keys, .. } => *keys,
            Self::Vectors(plan) => plan.keys.padded(),
        }
    }

    fn dim(&self) -> usize {
        match self {
            Self::Portable { dim, .. } => *dim,
            Self::Vectors(plan) => plan.values.columns,
        }
    }

    /// Numbers that the packed keys and values have.
    pub fn packed_len(&self) -> (usize, usize) {
        let (keys, values) = match self {
            Self::Portable { keys, dim } => ((*keys, *dim), (*keys, *dim)),
            Self::Vectors(plan) => (
                (plan.keys.padded(), plan.values.columns),
                (plan.keys.columns, plan.values.padded()),
            ),
        };
        (
            keys.0.saturating_mul(keys.1),
            values.0.saturating_mul(values.1),
        )
    }

    /// Asks for a row's lines of the cache.
    pub fn prefetch(&self, row: Option<*const f32>) {
        if let (Self::Vectors(plan), Some(row)) = (self, row) {
            prefetch(row, plan.values.columns);
        }
    }

    /// A key.
    pub fn pack_key(&self, packed: &mut [f32], key: usize, row: Scaled<'_>) {
        match self {
            Self::Portable { .. } => pack(&mut packed[key * row.0.len()..], row, None),
            Self::Vectors(plan) => plan.keys.pack_column(packed, key, row),
        }
    }

    /// The sum of one or two values, those of a key.
    pub fn pack_value(
        &self,
        packed: &mut [f32],
        key: usize,
        row: Scaled<'_>,
        added: Option<Scaled<'_>>,
    ) {
        match self {
            Self::Portable { .. } => pack(&mut packed[key * row.0.len()..], row, added),
            // SAFETY: `new` has looked for the instructions.
            Self::Vectors(plan) => unsafe { plan.pack_value(packed, key, row, added) },
        }
    }

    /// Scores, powers and result of a block.
    ///
    /// # Safety
    /// The block's `count` queries must be readable and its results writable where it says, and what
    /// is packed have been packed by this engine.
    pub unsafe fn block(&self, block: &mut Block<'_>) {
        let (padded, (keys, values)) = (self.padded_keys(), self.packed_len());
        assert!(block.scores.len() >= block.count * padded && block.factors.len() >= block.count);
        assert!(block.keys.len() == keys && block.values.len() == values);
        assert!(
            block
                .mask
                .is_none_or(|mask| mask.len() >= block.count * padded)
        );
        assert!(block.regional.is_none_or(|(aes_values, strengths)| {
            aes_values.len() == values
                && strengths.len() >= block.count
                && block.extra.len() >= block.count * self.dim()
        }));
        // SAFETY: asserted here, or the caller's promise; `new` has looked for the instructions.
        unsafe {
            match self {
                Self::Portable { keys, dim } => portable::block(*keys, *dim, block),
                Self::Vectors(plan) => plan.block(block),
            }
        }
    }
}
