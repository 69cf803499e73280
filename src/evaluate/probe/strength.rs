//! How far what answers is on the way from the base to the trained model.

use tch::Tensor;

use super::{Finding, Said};

/// The least squares over all tokens at all places that both models speak of and that were asked: at which `k` is
/// `base + k (trained - base)` nearest to what was found, in spreads. An adapter at half its scale is at a half.
///
/// Rounding moves a number in any direction, while the two models differ in one: their difference can show in all numbers together
/// where every single one is within what rounding explains.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Strength {
    /// Sum of (found - base) (trained - base).
    along: f64,
    /// Sum of (trained - base)^2.
    whole: f64,
    /// Sum of (found - base)^2.
    found: f64,
    /// Places that told something.
    places: u32,
}

/// Least sum of squares that is a difference.
const LEAST: f64 = 1e-12;
/// Largest standard error that still tells a half from the whole and from nothing: four of them are between.
const MOST: f64 = 0.125;

impl Strength {
    /// Adds a place: of each token what was found, what the trained model said and what the base said, in spreads.
    pub fn add(&mut self, tokens: impl IntoIterator<Item = (f64, f64, f64)>) {
        let mut told = false;
        for (found, trained, base) in tokens {
            told = true;
            self.along += (found - base) * (trained - base);
            self.whole += (trained - base) * (trained - base);
            self.found += (found - base) * (found - base);
        }
        self.places += u32::from(told);
    }

    /// Adds the places that come behind the same tokens of both answers, given the logits (P, V) of what is asked at the trained
    /// model's places.
    pub fn add_all(&mut self, found: &Tensor, trained: &Said, base: &Said) {
        let places = trained.places.iter().zip(&base.places).take(trained.alike(base) + 1);
        for (index, (of_trained, of_base)) in places.enumerate() {
            let tokens = of_trained.top.iter().filter_map(|trained| {
                let base = of_base.top.iter().find(|base| base.id == trained.id)?;
                let logit = found.double_value(&[index as i64, i64::from(trained.id)]);
                Some([logit, f64::from(trained.logit), f64::from(base.logit)].map(|logit| logit / of_trained.spread))
            });
            self.add(tokens.map(|[found, trained, base]| (found, trained, base)));
        }
    }

    /// 0 is the base, 1 the trained model; `None` where nothing was told, or the two say the same.
    pub fn value(&self) -> Option<f64> {
        (self.whole > LEAST && self.along.is_finite()).then(|| self.along / self.whole)
    }

    /// The standard error of [`Strength::value`]. Of what it leaves unexplained, the tokens of a place count once: rounding moves them
    /// together.
    fn error(&self) -> Option<f64> {
        let value = self.value().filter(|_| self.places > 1)?;
        let unexplained = (self.found - value * self.along).max(0.0);
        Some((unexplained / self.whole / f64::from(self.places - 1)).sqrt())
    }

    /// Which model it is by this alone; `None` where too much is left unexplained to say.
    pub fn finding(&self) -> Option<Finding> {
        let (value, _) = (self.value()?, self.error().filter(|error| *error <= MOST)?);
        Some(match value {
            0.75..=1.5 => Finding::Trained,
            -0.5..=0.25 => Finding::Base,
            _ => Finding::Other,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What both say of a token at a place: as if by chance, the same at each call.
    fn chance(seed: u32) -> impl FnMut() -> f64 {
        let mut state = u64::from(seed) + 1;
        move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            // Four uniform numbers, near enough to normal, of variance 1.
            let part = |shift: u32| ((state >> shift) & 0xfff) as f64 / 4096.0 - 0.5;
            [8, 20, 32, 44].map(part).iter().sum::<f64>() * 3f64.sqrt()
        }
    }

    /// Places of twenty tokens, where training moved logits by `by` and what is asked was rounded by `noise`, at `strength`.
    fn asked(places: u32, strength: f64, by: f64, noise: f64) -> Strength {
        let mut next = chance(7);
        let mut sum = Strength::default();
        for _ in 0..places {
            sum.add((0..20).map(|_| {
                let base = next();
                let moved = by * next();
                (base + strength * moved + noise * next(), base + moved, base)
            }));
        }
        sum
    }

    #[test]
    fn a_difference_shows_in_all_numbers_together() {
        // Rounding to a third of what training did: no single number tells.
        for (strength, finding) in
            [(1.0, Finding::Trained), (0.0, Finding::Base), (0.5, Finding::Other), (2.0, Finding::Other)]
        {
            let found = asked(12, strength, 0.25, 0.08);
            assert!((found.value().unwrap() - strength).abs() < 0.1, "{strength}: {found:?}");
            assert_eq!(found.finding(), Some(finding), "{strength}");
        }
    }

    #[test]
    fn what_rounding_drowns_is_not_told() {
        for strength in [0.0, 1.0] {
            assert_eq!(asked(12, strength, 0.01, 0.3).finding(), None);
        }
        // One place fits whatever was found there.
        assert_eq!(asked(1, 1.0, 0.25, 0.0).finding(), None);
        assert_eq!(Strength::default().value(), None);
        // Two models that say the same, and numbers that are none.
        assert_eq!(asked(12, 1.0, 0.0, 0.1).finding(), None);
        assert_eq!(asked(12, f64::NAN, 0.25, 0.1).finding(), None);
    }
}
