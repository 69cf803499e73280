//! Which model it is that answers: the trained one, its bare base, or another.

use std::fmt;

use serde::Serialize;

use super::Strength;

/// Which model one probe's answer is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// The trained one, and not the base.
    Trained,
    /// The base, and not the trained one.
    Base,
    /// Either: both answer alike as far as the form can tell.
    Alike,
    /// Neither.
    Other,
}

/// Which model answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// The trained one.
    Trained,
    /// The bare base: what was trained is not in it.
    Base,
    /// Neither of the two.
    Other,
    /// No probe tells the two apart.
    CannotTell,
}

/// Part of the probes that tell something which one model must be found by: what runs elsewhere rounds some to neither side, and
/// one or two to the other, where an answer in words alone goes another way early.
const HALF: f64 = 0.5;
/// Part of those that say it is one of the two.
const MOST: f64 = 2.0 / 3.0;

impl Finding {
    /// Of whether an answer may be the trained model's and whether it may be the base's.
    pub fn of(trained: bool, base: bool) -> Self {
        match (trained, base) {
            (true, false) => Self::Trained,
            (false, true) => Self::Base,
            (true, true) => Self::Alike,
            (false, false) => Self::Other,
        }
    }
}

impl Verdict {
    /// Of numbers that must all agree: those that our own reader computes.
    pub fn strict(findings: &[Finding]) -> Self {
        let all = |one: Finding| findings.iter().all(|finding| [one, Finding::Alike].contains(finding));
        match () {
            () if all(Finding::Alike) => Self::CannotTell,
            () if all(Finding::Trained) => Self::Trained,
            () if all(Finding::Base) => Self::Base,
            () => Self::Other,
        }
    }

    /// Of answers from elsewhere: what half of the probes say that tell something, and two thirds of those that name one of the two.
    pub fn of_most(findings: &[Finding]) -> Self {
        let count = |one: Finding| findings.iter().filter(|finding| **finding == one).count() as f64;
        let told = findings.len() as f64 - count(Finding::Alike);
        let [trained, base] = [Finding::Trained, Finding::Base].map(count);
        let is = |one: f64| one >= HALF * told && one >= MOST * (trained + base);
        match () {
            () if told == 0.0 => Self::CannotTell,
            () if is(trained) => Self::Trained,
            () if is(base) => Self::Base,
            () => Self::Other,
        }
    }

    /// This one, or where no probe by itself tells anything, what all their numbers together do.
    #[must_use]
    pub fn or_by(self, strength: &Strength) -> Self {
        match (self, strength.finding()) {
            (Self::CannotTell, Some(Finding::Trained)) => Self::Trained,
            (Self::CannotTell, Some(Finding::Base)) => Self::Base,
            (Self::CannotTell, Some(Finding::Other)) => Self::Other,
            (told, _) => told,
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Trained => "the trained model",
            Self::Base => "the bare base: what was trained is not in it",
            Self::Other => "neither the trained model nor its base",
            Self::CannotTell => "cannot tell: the trained model and its base answer every probe alike in this form",
        })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Trained => "trained",
            Self::Base => "base",
            Self::Alike => "alike",
            Self::Other => "neither",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_probe_of_another_model_is_enough_for_our_own_numbers_but_not_for_a_servers() {
        use Finding::{Alike, Base, Other, Trained};
        for (findings, strict, most) in [
            (vec![Trained, Alike, Trained], Verdict::Trained, Verdict::Trained),
            (vec![Base, Alike], Verdict::Base, Verdict::Base),
            (vec![Alike, Alike], Verdict::CannotTell, Verdict::CannotTell),
            (vec![Trained, Trained, Trained, Other], Verdict::Other, Verdict::Trained),
            (vec![Base, Base, Base, Trained], Verdict::Other, Verdict::Base),
            (vec![Trained, Base], Verdict::Other, Verdict::Other),
            // A real server's bare base, whose answers are told by their words alone.
            (vec![Base, Trained, Base, Alike, Base, Base, Base, Other], Verdict::Other, Verdict::Base),
            (vec![Base, Base, Trained, Trained, Trained], Verdict::Other, Verdict::Other),
            (vec![Trained, Other, Other], Verdict::Other, Verdict::Other),
            (vec![Other, Alike], Verdict::Other, Verdict::Other),
            (vec![], Verdict::CannotTell, Verdict::CannotTell),
        ] {
            assert_eq!(Verdict::strict(&findings), strict, "{findings:?}");
            assert_eq!(Verdict::of_most(&findings), most, "{findings:?}");
        }
    }
}
