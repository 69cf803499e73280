//! The learning rate of every step: the formulas of transformers' `get_scheduler`, number for number.

use std::f64::consts::PI;

use crate::recipe::{Scheduler, TrainingRecipe};

/// Learning rate by step.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    shape: Scheduler,
    peak: f64,
    warmup: u64,
    total: u64,
}

impl Schedule {
    /// The schedule of a run of `total` optimizer steps. A `warmup_ratio` is rounded up to whole steps, as transformers does.
    pub fn new(training: &TrainingRecipe, total: u64) -> Self {
        let by_ratio = |ratio: f64| (ratio * total as f64).ceil() as u64;
        let warmup = training.warmup_steps.or(training.warmup_ratio.map(by_ratio)).unwrap_or(0);
        Self { shape: training.lr_scheduler, peak: training.learning_rate, warmup, total }
    }

    /// What a person should know: a warmup that the run does not outlast.
    pub fn notice(&self) -> Option<String> {
        let Self { warmup, total, peak, .. } = *self;
        (warmup > 0 && warmup >= total).then(|| {
            format!(
                "the warmup of {warmup} steps is not over when the run of {total} steps ends: the learning rate never reaches \
                 {peak:e}; lower training.warmup_steps or training.warmup_ratio"
            )
        })
    }

    /// The rate used by the update after `step` updates: `rate(0)` is the first one's.
    ///
    /// As in transformers, warmup starts at 0, so the first update of a run with warmup changes nothing.
    pub fn rate(&self, step: u64) -> f64 {
        self.peak * self.factor(step)
    }

    fn factor(&self, step: u64) -> f64 {
        if step < self.warmup {
            return step as f64 / self.warmup.max(1) as f64;
        }
        let after_warmup = self.total.saturating_sub(self.warmup).max(1) as f64;
        match self.shape {
            Scheduler::Constant => 1.0,
            Scheduler::Linear => self.total.saturating_sub(step) as f64 / after_warmup,
            Scheduler::Cosine => {
                let progress = (step - self.warmup) as f64 / after_warmup;
                (0.5 * (1.0 + (PI * progress).cos())).max(0.0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rates(shape: Scheduler, warmup: u64, total: u64) -> Vec<f64> {
        let training = TrainingRecipe { lr_scheduler: shape, warmup_steps: Some(warmup), ..Default::default() };
        let schedule = Schedule::new(&training, total);
        (0..total).map(|step| schedule.rate(step)).collect()
    }

    #[test]
    fn a_warmup_the_run_does_not_outlast_is_noticed() {
        let notice = |training: TrainingRecipe, total| Schedule::new(&training, total).notice();
        let steps = |warmup_steps| TrainingRecipe { warmup_steps: Some(warmup_steps), ..Default::default() };
        let said = notice(steps(12), 10).unwrap();
        assert!(said.contains("12 steps") && said.contains("10 steps") && said.contains("2e-4"), "{said}");
        assert!(notice(steps(10), 10).is_some(), "the peak would be the rate of step 11");
        assert_eq!([notice(steps(9), 10), notice(steps(0), 0)], [None, None]);
        assert!(notice(TrainingRecipe { warmup_ratio: Some(1.0), ..Default::default() }, 10).is_some());
    }

    // transformers 5.17: get_scheduler(name, SGD(lr=2e-4), warmup, total).get_last_lr() before each step.
    #[test]
    fn rates_are_those_of_transformers() {
        #[rustfmt::skip]
        let cases: &[(Scheduler, u64, u64, &[f64])] = &[
            (Scheduler::Cosine, 0, 10, &[0.0002, 0.00019510565162951537, 0.00018090169943749476, 0.00015877852522924732, 0.00013090169943749476,
                0.0001, 6.909830056250527e-05, 4.12214747707527e-05, 1.9098300562505266e-05, 4.8943483704846475e-06]),
            (Scheduler::Cosine, 3, 10, &[0.0, 6.666666666666667e-05, 0.00013333333333333334, 0.0002, 0.0001900968867902419, 0.00016234898018587337,
                0.00012225209339563145, 7.774790660436858e-05, 3.7651019814126654e-05, 9.903113209758096e-06]),
            (Scheduler::Cosine, 12, 10, &[0.0, 1.6666666666666667e-05, 3.3333333333333335e-05, 5e-05, 6.666666666666667e-05, 8.333333333333334e-05,
                0.0001, 0.00011666666666666668, 0.00013333333333333334, 0.00015000000000000001]),
            (Scheduler::Linear, 0, 10, &[0.0002, 0.00018, 0.00016, 0.00014, 0.00012, 0.0001, 8e-05, 6e-05, 4e-05, 2e-05]),
            (Scheduler::Linear, 3, 10, &[0.0, 6.666666666666667e-05, 0.00013333333333333334, 0.0002, 0.00017142857142857143, 0.00014285714285714287,
                0.00011428571428571428, 8.571428571428571e-05, 5.714285714285714e-05, 2.857142857142857e-05]),
            (Scheduler::Constant, 3, 10, &[0.0, 6.666666666666667e-05, 0.00013333333333333334, 0.0002, 0.0002, 0.0002, 0.0002, 0.0002, 0.0002, 0.0002]),
            (Scheduler::Cosine, 0, 1, &[0.0002]),
        ];
        for (shape, warmup, total, expected) in cases {
            assert_eq!(&rates(*shape, *warmup, *total), expected, "{shape:?}, warmup {warmup} of {total}");
        }
    }

    #[test]
    fn a_warmup_ratio_is_rounded_up_to_whole_steps() {
        let training = TrainingRecipe { warmup_ratio: Some(0.03), ..Default::default() };
        assert_eq!(Schedule::new(&training, 101).warmup, 4);
    }
}
