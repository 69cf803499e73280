//! Dropout whose mask is made again instead of kept.

use tch::Tensor;

use crate::torch_ext::keep_mask;

/// X with elements dropped and the rest scaled up, by probability and seed: the same mask for the same seed, so it is never kept.
pub(super) fn dropped(x: &Tensor, dropout: Option<(f64, u64)>) -> Tensor {
    match dropout {
        Some((probability, seed)) => x * keep_mask(x, 1.0 - probability, seed) * (1.0 / (1.0 - probability)),
        None => x.shallow_clone(),
    }
}
