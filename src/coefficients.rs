//! A(w): from label weights to a coefficient for every token and row (`docs/format.md`).

use crate::{CoefficientKind, Error, Labels, Result};

/// What a row belongs to: a side of a label, by its position in the file, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Row {
    /// The positive texts of a label.
    Positive(usize),
    /// The negative texts of a label.
    Negative(usize),
    /// No label: a row that is always added.
    Constant,
}

impl Row {
    /// Position of its label.
    pub fn label(self) -> Option<usize> {
        match self {
            Self::Positive(label) | Self::Negative(label) => Some(label),
            Self::Constant => None,
        }
    }

    /// Its side, as files name it.
    pub fn side(self) -> &'static str {
        match self {
            Self::Positive(_) => "positive",
            Self::Negative(_) => "negative",
            Self::Constant => "constant",
        }
    }
}

/// What turns weights into coefficients.
#[derive(Debug, Clone)]
pub(crate) struct Coefficients {
    pub rows: Vec<Row>,
    /// P \[C, R\]
    pub profile: Vec<f32>,
    pub scaling: Scaling,
}

#[derive(Debug, Clone)]
pub(crate) enum Scaling {
    /// As the paper's LayerNorm (eq. 6).
    LayerNorm {
        eps: f64,
        /// L \[K, m\] of the rows that are not constant; L·Lᵀ is their Gram matrix.
        factor: Vec<f32>,
    },
    Linear,
}

impl Coefficients {
    pub fn kind(&self) -> CoefficientKind {
        match self.scaling {
            Scaling::LayerNorm { .. } => CoefficientKind::LayerNorm,
            Scaling::Linear => CoefficientKind::Linear,
        }
    }

    /// A \[C, R\] of a weight per label, in f64.
    pub fn exact(&self, weights: &[f32]) -> Vec<f64> {
        let scales: Vec<f64> = self
            .rows
            .iter()
            .map(|row| self.scale(*row, weights))
            .collect();
        let normed: Vec<usize> = (0..self.rows.len())
            .filter(|&r| self.rows[r] != Row::Constant)
            .collect();
        let tokens = self.profile.chunks_exact(self.rows.len());
        tokens
            .flat_map(|profile| {
                let profile = profile.iter().map(|&p| f64::from(p));
                let mut a: Vec<f64> = profile.zip(&scales).map(|(p, s)| p * s).collect();
                if let Scaling::LayerNorm { eps, factor } = &self.scaling {
                    let rho = (variance(&a, &normed, factor) + eps).sqrt().recip();
                    normed.iter().for_each(|&r| a[r] *= rho);
                }
                a
            })
            .collect()
    }

    /// A \[C, R\] of a weight per label.
    pub fn of(&self, weights: &[f32], labels: &Labels) -> Result<Vec<f32>> {
        let a: Vec<f32> = self.exact(weights).iter().map(|&a| a as f32).collect();
        if a.iter().all(|a| a.is_finite()) {
            return Ok(a);
        }
        Err(Error::argument(
            "weights",
            "coefficients that float32 can hold",
            format!("more: {}", labels.furthest(weights)),
        ))
    }

    /// s_r
    fn scale(&self, row: Row, weights: &[f32]) -> f64 {
        let weight = |label: usize| f64::from(weights[label]);
        match (&self.scaling, row) {
            (_, Row::Constant) => 1.0,
            (Scaling::LayerNorm { .. }, Row::Positive(label)) => weight(label),
            (Scaling::LayerNorm { .. }, Row::Negative(label)) => 1.0 - weight(label),
            (Scaling::Linear, Row::Positive(label)) => weight(label).max(0.0),
            (Scaling::Linear, Row::Negative(label)) => (-weight(label)).max(0.0),
        }
    }
}

/// |uᵀ·L|², the variance that the LayerNorm divides by.
fn variance(u: &[f64], normed: &[usize], factor: &[f32]) -> f64 {
    let m = factor.len() / normed.len();
    let mut sums = vec![0.0; m];
    for (&r, row) in normed.iter().zip(factor.chunks_exact(m)) {
        for (sum, &l) in sums.iter_mut().zip(row) {
            *sum += u[r] * f64::from(l);
        }
    }
    sums.iter().map(|sum| sum * sum).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of docs/format.md. Its numbers are exact in binary but for the thirds.
    #[test]
    fn the_example_of_the_format() {
        let layernorm = Coefficients {
            rows: vec![Row::Positive(0), Row::Negative(0), Row::Constant],
            profile: vec![1.0, 1.0, 1.0, -1.0, -1.0, 1.0],
            scaling: Scaling::LayerNorm {
                eps: 0.5625,
                factor: vec![1.0, -1.0],
            },
        };
        assert_eq!(layernorm.exact(&[1.0]), [0.8, 0.0, 1.0, -0.8, 0.0, 1.0]);
        let third = 0.5 / 0.75;
        let expected = [third, third, 1.0, -third, -third, 1.0];
        for (a, expected) in layernorm.exact(&[0.5]).iter().zip(expected) {
            assert!((a - expected).abs() < 1e-15, "{a} {expected}");
        }

        let linear = Coefficients {
            rows: vec![Row::Positive(0), Row::Negative(0)],
            profile: vec![1.0, 0.5, 2.0, 1.0],
            scaling: Scaling::Linear,
        };
        assert_eq!(linear.exact(&[0.5]), [0.5, 0.0, 1.0, 0.0]);
        assert_eq!(linear.exact(&[-0.5]), [0.0, 0.25, 0.0, 0.5]);
        assert_eq!(linear.exact(&[0.0]), [0.0; 4]);

        let two = Coefficients {
            rows: vec![Row::Negative(1), Row::Positive(0), Row::Positive(1)],
            profile: vec![1.0, 2.0, 3.0],
            scaling: Scaling::Linear,
        };
        assert_eq!(two.exact(&[0.0, -0.5]), [0.5, 0.0, 0.0]);
        assert_eq!(two.exact(&[0.0, 0.5]), [0.0, 0.0, 1.5]);
    }
}
