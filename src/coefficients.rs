//! A(w): from label weights to a coefficient for every token and row (`docs/format.md`).

use crate::{CoefficientKind, Error, Labels, Result, Side};

/// The label and side that a row belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Position of its label; `None` for [`Side::Constant`].
    pub label: Option<usize>,
    /// The side of that label.
    pub side: Side,
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
        /// G \[K, K\] of the rows that are not constant.
        gram: Vec<f32>,
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
            .filter(|&r| self.rows[r].side != Side::Constant)
            .collect();
        let tokens = self.profile.chunks_exact(self.rows.len());
        tokens
            .flat_map(|profile| {
                let profile = profile.iter().map(|&p| f64::from(p));
                let mut a: Vec<f64> = profile.zip(&scales).map(|(p, s)| p * s).collect();
                if let Scaling::LayerNorm { eps, gram } = &self.scaling {
                    let rho = (square(&a, &normed, gram) + eps).sqrt().recip();
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
        let weight = row.label.map_or(0.0, |label| f64::from(weights[label]));
        match (&self.scaling, row.side) {
            (_, Side::Constant) => 1.0,
            (Scaling::LayerNorm { .. }, Side::Positive) => weight,
            (Scaling::LayerNorm { .. }, Side::Negative) => 1.0 - weight,
            (Scaling::Linear, Side::Positive) => weight.max(0.0),
            (Scaling::Linear, Side::Negative) => (-weight).max(0.0),
        }
    }
}

/// uᵀ·G·u, the variance of what the LayerNorm divides. Rounding may take it below 0.
fn square(u: &[f64], normed: &[usize], gram: &[f32]) -> f64 {
    let rows = normed.iter().zip(gram.chunks_exact(normed.len().max(1)));
    let sum = rows.map(|(&j, gram)| {
        let products = normed.iter().zip(gram).map(|(&k, &g)| f64::from(g) * u[k]);
        u[j] * products.sum::<f64>()
    });
    sum.sum::<f64>().max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const POSITIVE: Row = Row {
        label: Some(0),
        side: Side::Positive,
    };
    const NEGATIVE: Row = Row {
        label: Some(0),
        side: Side::Negative,
    };
    const CONSTANT: Row = Row {
        label: None,
        side: Side::Constant,
    };

    /// The example of docs/format.md. Its numbers are exact in binary but for the thirds.
    #[test]
    fn the_example_of_the_format() {
        let layernorm = Coefficients {
            rows: vec![POSITIVE, NEGATIVE, CONSTANT],
            profile: vec![1.0, 1.0, 1.0, -1.0, -1.0, 1.0],
            scaling: Scaling::LayerNorm {
                eps: 0.5625,
                gram: vec![1.0, -1.0, -1.0, 1.0],
            },
        };
        assert_eq!(layernorm.exact(&[1.0]), [0.8, 0.0, 1.0, -0.8, 0.0, 1.0]);
        let third = 0.5 / 0.75;
        let expected = [third, third, 1.0, -third, -third, 1.0];
        for (a, expected) in layernorm.exact(&[0.5]).iter().zip(expected) {
            assert!((a - expected).abs() < 1e-15, "{a} {expected}");
        }

        let linear = Coefficients {
            rows: vec![POSITIVE, NEGATIVE],
            profile: vec![1.0, 0.5, 2.0, 1.0],
            scaling: Scaling::Linear,
        };
        assert_eq!(linear.exact(&[0.5]), [0.5, 0.0, 1.0, 0.0]);
        assert_eq!(linear.exact(&[-0.5]), [0.0, 0.25, 0.0, 0.5]);
        assert_eq!(linear.exact(&[0.0]), [0.0; 4]);

        let [negative, positive] = [Side::Negative, Side::Positive].map(|side| Row {
            label: Some(1),
            side,
        });
        let two = Coefficients {
            rows: vec![negative, POSITIVE, positive],
            profile: vec![1.0, 2.0, 3.0],
            scaling: Scaling::Linear,
        };
        assert_eq!(two.exact(&[0.0, -0.5]), [0.5, 0.0, 0.0]);
        assert_eq!(two.exact(&[0.0, 0.5]), [0.0, 0.0, 1.5]);
    }
}
