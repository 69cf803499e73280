//! Dynamic loss scaling for fp16: the loss is multiplied so that small gradients survive half precision.

use serde::{Deserialize, Serialize};

const START: f64 = 65536.0;
const GROWTH: f64 = 2.0;
const BACKOFF: f64 = 0.5;
const GROWTH_INTERVAL: u32 = 2000;
/// Below this a smaller scale helps nobody: a gradient that overflows even unscaled is a diverged run.
const FLOOR: f64 = 1.0;

/// The scale and how long it has held; torch's `GradScaler` with its defaults, and a floor of 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scaler {
    /// What the loss is multiplied by.
    pub scale: f64,
    /// Steps since the scale last changed.
    pub good_steps: u32,
}

impl Default for Scaler {
    fn default() -> Self {
        Self { scale: START, good_steps: 0 }
    }
}

impl Scaler {
    /// Takes note of a step: halves the scale when its gradients overflowed, doubles it after 2000 good steps.
    pub fn update(&mut self, overflowed: bool) {
        if overflowed {
            *self = Self { scale: (self.scale * BACKOFF).max(FLOOR), good_steps: 0 };
            return;
        }
        self.good_steps += 1;
        if self.good_steps == GROWTH_INTERVAL {
            let grown = self.scale * GROWTH;
            *self = Self { scale: if grown <= f64::from(f32::MAX) { grown } else { self.scale }, good_steps: 0 };
        }
    }

    /// Whether halving the scale further would be pointless.
    pub fn at_floor(&self) -> bool {
        self.scale <= FLOOR
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overflow_halves_and_two_thousand_good_steps_double() {
        let mut scaler = Scaler::default();
        scaler.update(true);
        assert_eq!(scaler, Scaler { scale: 32768.0, good_steps: 0 });
        for _ in 0..1999 {
            scaler.update(false);
        }
        assert_eq!(scaler, Scaler { scale: 32768.0, good_steps: 1999 });
        scaler.update(false);
        assert_eq!(scaler, Scaler { scale: 65536.0, good_steps: 0 });
    }

    #[test]
    fn an_overflow_starts_the_count_again() {
        let mut scaler = Scaler { scale: 1024.0, good_steps: 1999 };
        scaler.update(true);
        scaler.update(false);
        assert_eq!(scaler, Scaler { scale: 512.0, good_steps: 1 });
    }

    #[test]
    fn the_scale_stays_within_one_and_what_fp32_holds() {
        let mut scaler = Scaler::default();
        (0..40).for_each(|_| scaler.update(true));
        assert!(scaler.at_floor() && scaler.scale == 1.0);
        let mut scaler = Scaler { scale: 2f64.powi(127), good_steps: 1999 };
        scaler.update(false);
        assert_eq!(scaler.scale, 2f64.powi(127));
    }
}
