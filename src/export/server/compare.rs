//! A server's answer beside what both models said: by its tokens, and by the probabilities it tells.

use super::dialect::{Answer, Likely, Token};
use crate::evaluate::{Candidate, Ended, Finding, Place, Said, Strength, Tolerance};
use crate::export::probe::Asked;

/// Log-probabilities below this are a server's way to say that there is none.
const LEAST: f64 = -60.0;
/// Part of an answer that it must have where it ends sooner: less of it is told by any model that begins alike.
const ENOUGH: f64 = 0.5;

/// What answers are compared by, and what all of them tell together.
pub(super) struct Comparison<'a> {
    /// Token ids that end an answer.
    pub stop: &'a [u32],
    pub tolerance: &'a Tolerance,
    pub strength: Strength,
    /// Whether it went on where the trained model ends.
    pub goes_on: bool,
    /// Answers that ended too soon to tell anything by their words.
    pub cut_short: usize,
}

/// What came of comparing one answer.
pub(super) struct Compared {
    pub finding: Finding,
    /// Distances of the log-probabilities, in spreads.
    pub from_trained: Option<f64>,
    pub from_base: Option<f64>,
}

/// Whether an answer may be the one that was said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Follows {
    /// It may, and it ends where that ended, or might have.
    Whole,
    /// It may, by its words.
    Yes,
    /// It ends so soon that its words tell nothing.
    Short,
    /// It goes on where nothing was said: by its words alone it is another.
    Past,
    /// It is another.
    No,
}

impl<'a> Comparison<'a> {
    pub fn by(stop: &'a [u32], tolerance: &'a Tolerance) -> Self {
        Self { stop, tolerance, strength: Strength::default(), goes_on: false, cut_short: 0 }
    }

    /// Compares one more answer.
    pub fn add(&mut self, asked: &Asked, answer: &Answer) -> Compared {
        let beside = |said: &Said| {
            let (follows, same_until) = self.follows(said, answer);
            (follows, distance(said, answer, same_until), same_until)
        };
        let (trained, from_trained, same_until) = beside(&asked.trained);
        let (base, from_base) = asked.base.as_ref().map_or((Follows::No, None), |said| {
            let (follows, distance, _) = beside(said);
            (follows, distance)
        });
        if let Some(said) = &asked.base {
            self.add_strength(&asked.trained, said, answer, same_until.min(asked.trained.alike(said)));
        }
        // A handful of numbers scatters more than the hundreds that the tolerance's mean is of.
        let near = |distance: Option<f64>| distance.map(|distance| distance <= 2.0 * self.tolerance.mean);
        let may = |follows, distance| match follows {
            Follows::Whole | Follows::Yes | Follows::Short => near(distance).unwrap_or(true),
            Follows::Past => near(distance).unwrap_or(false),
            Follows::No => false,
        };
        let mut may_be = [may(trained, from_trained), may(base, from_base)];
        if let ([true, true], Some(from_trained), Some(from_base)) = (may_be, from_trained, from_base) {
            // Both are within what rounding explains: one that is much nearer is it.
            may_be = [from_trained <= 4.0 * from_base, from_base <= 4.0 * from_trained];
        }
        may_be = match (may_be, trained, base) {
            // Where one of them ended and the other would have gone on, it is the one.
            ([true, true], Follows::Whole, Follows::Short) => [true, false],
            ([true, true], Follows::Short, Follows::Whole) => [false, true],
            // Nothing but words, and too few of them: they are any model's that begins so.
            ([true, false], Follows::Short, _) if from_trained.is_none() => [true, true],
            ([false, true], _, Follows::Short) if from_base.is_none() => [true, true],
            _ => may_be,
        };
        let unsaid = may_be == [true, true] && [trained, base].contains(&Follows::Short);
        self.cut_short += usize::from(unsaid && from_trained.is_none());
        self.goes_on |= may_be[0] && goes_on(&asked.trained, answer);
        Compared { finding: Finding::of(may_be[0], may_be[1]), from_trained, from_base }
    }

    /// What the probabilities tell at the places that come behind the very same tokens: the first `same_until`, and the one behind.
    fn add_strength(&mut self, trained: &Said, base: &Said, answer: &Answer, same_until: usize) {
        let places = trained.places.iter().zip(&base.places).zip(&answer.tokens).take(same_until + 1);
        for ((of_trained, of_base), token) in places {
            let tokens = token.top.iter().filter(|likely| likely.log_probability > LEAST).filter_map(|likely| {
                let of = |place: &Place| named(place, likely).map(|candidate| place.log_probability(candidate));
                let (trained, base) = (of(of_trained)?, of(of_base)?);
                let spread = of_trained.spread;
                Some((likely.log_probability / spread, trained / spread, base / spread))
            });
            self.strength.add(tokens);
        }
    }

    /// Whether an answer may be the one that was said: token by token, or letter by letter, up to where another token is as likely as
    /// the tolerance allows. Then how many tokens are the very same.
    fn follows(&self, said: &Said, answer: &Answer) -> (Follows, usize) {
        if answer.tokens.is_empty() {
            return (self.follows_as_text(said, &answer.text), 0);
        }
        for (index, id) in said.ids.iter().enumerate() {
            let place = &said.places[index];
            let Some(token) = answer.tokens.get(index) else {
                return (self.ended(place, index as f64 / said.ids.len() as f64), index);
            };
            let expected = place.top.iter().find(|candidate| candidate.id == *id);
            if !expected.is_some_and(|expected| is(token, expected)) {
                let instead = place.top.iter().find(|candidate| is(token, candidate));
                let allowed = instead.is_some_and(|instead| place.gap(instead) <= place.most(self.tolerance));
                return (if allowed { Follows::Yes } else { Follows::No }, index);
            }
        }
        let follows = match (said.ids.is_empty(), answer.tokens.get(said.ids.len())) {
            (true, Some(first)) => self.said_nothing(said, answer, first),
            (_, None) if said.ended == Ended::Stop => Follows::Whole,
            (false, Some(end)) if said.ended == Ended::Stop && self.is_end(end, said) => Follows::Whole,
            _ => Follows::Yes,
        };
        (follows, said.ids.len())
    }

    /// Whether a token behind all that was said is the one that ended it, which some servers show.
    fn is_end(&self, token: &Token, said: &Said) -> bool {
        let place = &said.places[said.ids.len()];
        place.top.iter().any(|one| self.stop.contains(&one.id) && is(token, one))
    }

    /// Of an answer that ends at a place, with a `part` of what was said.
    fn ended(&self, place: &Place, part: f64) -> Follows {
        let may_end =
            place.top.iter().any(|one| self.stop.contains(&one.id) && place.gap(one) <= place.most(self.tolerance));
        match part >= ENOUGH {
            _ if may_end => Follows::Whole,
            true => Follows::Yes,
            false => Follows::Short,
        }
    }

    /// Whether an answer may be that of a model that said nothing: nothing, too, or what comes behind the end where a server passes
    /// over that, which only its probabilities tell.
    fn said_nothing(&self, said: &Said, answer: &Answer, first: &Token) -> Follows {
        if answer.text.trim().is_empty() {
            return Follows::Whole;
        }
        let place = &said.places[0];
        let instead = place.top.iter().find(|candidate| is(first, candidate));
        let allowed = instead.is_some_and(|instead| place.gap(instead) <= place.most(self.tolerance));
        if allowed { Follows::Yes } else { Follows::Past }
    }

    fn follows_as_text(&self, said: &Said, text: &str) -> Follows {
        // Tokenizers differ in whether they show the space before the first word, and servers in whether they cut it off.
        let (ours, theirs) = (said.text.trim(), text.trim());
        if ours == theirs {
            return if said.ended == Ended::Stop { Follows::Whole } else { Follows::Yes };
        }
        if ours.is_empty() || theirs.is_empty() {
            return Follows::No;
        }
        if theirs.starts_with(ours) {
            return Follows::Yes;
        }
        let common =
            ours.chars().zip(theirs.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum::<usize>();
        let (ends, part) = (common == theirs.len(), common as f64 / ours.len() as f64);
        let mut end = 0;
        let skipped = said.text.len() - said.text.trim_start().len();
        for (id, place) in said.ids.iter().zip(&said.places) {
            let Some(expected) = place.top.iter().find(|candidate| candidate.id == *id) else { return Follows::No };
            let begin = end;
            end += expected.token.len();
            if end.saturating_sub(skipped) > common {
                if ends {
                    return self.ended(place, part);
                }
                let rest = theirs.get(begin.saturating_sub(skipped).min(common)..).unwrap_or_default();
                let fits = |candidate: &&Candidate| {
                    let word = if begin == 0 { candidate.token.trim_start() } else { candidate.token.as_str() };
                    !word.is_empty() && rest.starts_with(word)
                };
                let instead = place.top.iter().filter(fits).find(|candidate| candidate.id != *id);
                let allowed = instead.is_some_and(|instead| place.gap(instead) <= place.most(self.tolerance));
                return if allowed { Follows::Yes } else { Follows::No };
            }
        }
        match (ends, part >= ENOUGH) {
            (true, true) => Follows::Yes,
            (true, false) => Follows::Short,
            (false, _) => Follows::No,
        }
    }
}

/// Whether an answer goes on where the trained model ends.
fn goes_on(said: &Said, answer: &Answer) -> bool {
    said.ended == Ended::Stop
        && match answer.tokens.len() {
            0 => answer.text.trim().len() > said.text.trim().len(),
            count => count > said.ids.len() + 1,
        }
}

/// The root of the mean square of the differences of log-probabilities at the places that were reached by the very same tokens, in
/// spreads; `None` where the server told none.
fn distance(said: &Said, answer: &Answer, same_until: usize) -> Option<f64> {
    let (mut squares, mut count) = (0.0, 0u32);
    for (place, token) in said.places.iter().zip(&answer.tokens).take(same_until + 1) {
        for likely in token.top.iter().filter(|likely| likely.log_probability > LEAST) {
            // A token that is not among the likeliest here is at most as likely as the last of them.
            let (apart, tells) = match (named(place, likely), place.top.last()) {
                (Some(candidate), _) => (likely.log_probability - place.log_probability(candidate), true),
                (None, Some(last)) => {
                    let above = likely.log_probability - place.log_probability(last);
                    (above, above > 0.0)
                }
                (None, None) => (0.0, false),
            };
            if tells {
                squares += (apart / place.spread).powi(2);
                count += 1;
            }
        }
    }
    (count > 0).then(|| (squares / f64::from(count)).sqrt())
}

fn is(token: &Token, candidate: &Candidate) -> bool {
    same(token.id, &token.text, candidate)
}

/// The candidate of just that text before one that differs by spaces.
fn named<'a>(place: &'a Place, likely: &Likely) -> Option<&'a Candidate> {
    let exactly = place.top.iter().find(|candidate| likely.id.is_none() && likely.text == candidate.token);
    exactly.or_else(|| place.top.iter().find(|candidate| same(likely.id, &likely.text, candidate)))
}

/// By the id where it is told, else by the text, which some servers show without the space before it.
fn same(id: Option<u32>, text: &str, candidate: &Candidate) -> bool {
    match id {
        Some(id) => id == candidate.id,
        None => text == candidate.token || (!text.trim().is_empty() && text.trim() == candidate.token.trim()),
    }
}
