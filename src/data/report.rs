//! What a dataset turned out to hold, on one screen.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A row's place and what is remarkable about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// File and row, counted from 0.
    pub place: String,
    /// What happened there.
    pub what: String,
}

/// Rows of one kind: how many, and the first of them by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// How many rows.
    pub count: u64,
    /// The first few.
    pub first: Vec<Place>,
}

impl Tally {
    /// How many rows are named.
    const NAMED: usize = 5;

    /// Counts a row, and names it while few are.
    pub(crate) fn add(&mut self, place: impl fmt::Display, what: impl fmt::Display) {
        self.count += 1;
        if self.first.len() < Self::NAMED {
            self.first.push(Place { place: place.to_string(), what: what.to_string() });
        }
    }

    /// How many rows are `what`, and the first of them, a line each.
    pub fn list(&self, what: &str) -> String {
        let mut list = format!("{} row(s) {what}:", self.count);
        for row in &self.first {
            list += &format!("\n  {}: {}", row.place, row.what);
        }
        if self.count > self.first.len() as u64 {
            list += "\n  ...";
        }
        list
    }

    /// Adds a file's tally; `file` comes before its places, which are rows.
    pub(super) fn merge(&mut self, file: &str, other: &Tally) {
        self.count += other.count;
        let room = Self::NAMED.saturating_sub(self.first.len());
        let named = other.first.iter().take(room);
        self.first
            .extend(named.map(|row| Place { place: format!("{file}, row {}", row.place), what: row.what.clone() }));
    }
}

/// What a dataset holds once tokenised. Counts are of the files, each row once, before weights.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DatasetReport {
    /// What was decided about the columns.
    pub inference: Vec<String>,
    /// Files.
    pub files: u64,
    /// Rows read.
    pub rows: u64,
    /// Documents made of them.
    pub documents: u64,
    /// Tokens of all documents.
    pub tokens: u64,
    /// Tokens that are targets.
    pub trained_tokens: u64,
    /// Tokens of the longest document.
    pub longest: u64,
    /// Rows left out because they are longer than `max_length`.
    pub overlong: Tally,
    /// Rows cut to `max_length` behind their answer.
    pub truncated: Tally,
    /// Rows cut to `max_length` within their answer, so that its end is not trained.
    pub answer_cut: Tally,
    /// Rows left out because they are not what the format says.
    pub malformed: Tally,
    /// Rows left out because nothing in them is trained.
    pub nothing_trained: Tally,
    /// Rows left out because they are empty.
    pub empty: Tally,
    /// With `packing`: rows of `max_length` tokens in the first epoch.
    pub bins: Option<u64>,
    /// With `packing`: the part of them that is filled, from 0 to 1.
    pub packing_efficiency: Option<f64>,
    /// What else a person should know: a rebuilt cache, an empty file.
    pub notices: Vec<String>,
}

impl DatasetReport {
    /// Rows left out, whatever the reason.
    pub fn dropped(&self) -> u64 {
        [&self.overlong, &self.malformed, &self.nothing_trained, &self.empty].iter().map(|tally| tally.count).sum()
    }

    /// Rows cut to `max_length`, behind their answer or within it.
    pub fn cut(&self) -> u64 {
        self.truncated.count + self.answer_cut.count
    }

    pub(super) fn tallies(&self) -> [(&'static str, &Tally); 6] {
        [
            ("truncated to max_length behind the answer", &self.truncated),
            ("truncated to max_length within the answer, whose end is then not trained", &self.answer_cut),
            ("left out, longer than max_length", &self.overlong),
            ("left out, malformed", &self.malformed),
            ("left out, nothing trained", &self.nothing_trained),
            ("left out, empty", &self.empty),
        ]
    }
}

impl fmt::Display for DatasetReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for sentence in &self.inference {
            writeln!(f, "{sentence}")?;
        }
        let share = if self.tokens == 0 { 0.0 } else { 100.0 * self.trained_tokens as f64 / self.tokens as f64 };
        writeln!(f, "rows            {} in {} file(s)", self.rows, self.files)?;
        writeln!(f, "documents       {}, the longest of {} tokens", self.documents, self.longest)?;
        writeln!(f, "tokens          {}", self.tokens)?;
        write!(f, "trained tokens  {} ({share:.1}%)", self.trained_tokens)?;
        if let (Some(bins), Some(efficiency)) = (self.bins, self.packing_efficiency) {
            write!(f, "\npacked rows     {bins}, {:.1}% full", 100.0 * efficiency)?;
        }
        for (what, tally) in self.tallies().into_iter().filter(|(_, tally)| tally.count > 0) {
            write!(f, "\n{}", tally.list(what))?;
        }
        if self.answer_cut.count > 0 && self.answer_cut.count >= self.documents {
            write!(f, "\nWARNING: no row's answer is whole, so no end of turn is trained: raise max_length")?;
        }
        for notice in &self.notices {
            write!(f, "\nnote: {notice}")?;
        }
        Ok(())
    }
}
