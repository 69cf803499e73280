//! Which documents come when, and which share a packed row: a function of (seed, epoch) alone.
//!
//! An epoch's occurrences are the documents of every row, each as often as its file's weight says. They are mixed as a
//! whole up to [`WINDOW`] of them; beyond that blocks of neighbours are mixed, then documents within windows, so that the
//! cache is read in stretches. A window is packed best-fit decreasing (longest document first, into the fullest bin that
//! still takes it; Johnson 1973) and its bins are put in random order. A document is never cut and never padded.

use std::collections::BTreeMap;

use rayon::prelude::*;

/// Documents mixed and packed together.
const WINDOW: usize = 131_072;
/// The same where the recipe keeps the files' order: small, so that packing moves documents little.
const ORDERED_WINDOW: usize = 2048;
/// Neighbours that stay in one window when there are several windows.
const BLOCK: usize = 1024;

/// The documents of one file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Span {
    /// The first one's index among all.
    pub first: u32,
    /// How many.
    pub count: u32,
    /// How often each row is seen per epoch.
    pub weight: f64,
}

/// Everything that decides the order.
pub(super) struct Order<'a> {
    pub spans: &'a [Span],
    /// Tokens of a document.
    pub length: &'a (dyn Fn(u32) -> u32 + Sync),
    /// Row of a document in its file.
    pub row: &'a (dyn Fn(u32) -> u64 + Sync),
    /// Tokens of a packed row; None: each document is a row of its own.
    pub capacity: Option<u32>,
    pub shuffle: bool,
    pub seed: u64,
}

/// Rows of one window: each is a run of documents.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Bins {
    documents: Vec<u32>,
    /// Where each bin ends in `documents`.
    ends: Vec<u32>,
}

impl Bins {
    fn bin(&self, index: usize) -> &[u32] {
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.documents[start as usize..self.ends[index] as usize]
    }
}

/// One pass over the data, laid out.
pub(super) struct Epoch {
    number: u64,
    occurrences: Vec<u32>,
    window: usize,
    /// Bins before each window; the last is how many there are.
    before: Vec<u64>,
    /// The window read last.
    open: Option<(usize, Bins)>,
}

impl Epoch {
    /// Lays out epoch `number`.
    pub fn new(order: &Order, number: u64) -> Self {
        let mut occurrences = order.occurrences(number);
        let window = if order.shuffle || order.capacity.is_none() { WINDOW } else { ORDERED_WINDOW };
        if order.shuffle && occurrences.len() > window {
            let mut blocks: Vec<&[u32]> = occurrences.chunks(BLOCK).collect();
            Random::new([order.seed, number, MIX_BLOCKS, 0]).shuffle(&mut blocks);
            occurrences = blocks.concat();
        }
        let windows = occurrences.len().div_ceil(window);
        let mut epoch = Self { number, occurrences, window, before: vec![0], open: None };
        let mut before = vec![0; windows + 1];
        match order.capacity {
            None => {
                (0..=windows).for_each(|index| before[index] = (index * window).min(epoch.occurrences.len()) as u64)
            }
            Some(_) if windows == 1 => {
                let bins = epoch.lay_out(order, 0);
                before[1] = bins.ends.len() as u64;
                epoch.open = Some((0, bins));
            }
            Some(_) => {
                let counts: Vec<u64> =
                    (0..windows).into_par_iter().map(|index| epoch.lay_out(order, index).ends.len() as u64).collect();
                for (index, count) in counts.into_iter().enumerate() {
                    before[index + 1] = before[index] + count;
                }
            }
        }
        epoch.before = before;
        epoch
    }

    /// Which pass it is.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Rows of the pass.
    pub fn bins(&self) -> u64 {
        self.before.last().copied().unwrap_or(0)
    }

    /// Tokens of the pass.
    pub fn tokens(&self, order: &Order) -> u64 {
        self.occurrences.iter().map(|document| u64::from((order.length)(*document))).sum()
    }

    /// Documents seen, counted as often as they are.
    #[cfg(test)]
    pub fn occurrences(&self) -> usize {
        self.occurrences.len()
    }

    /// The documents of a row.
    pub fn bin(&mut self, order: &Order, index: u64) -> &[u32] {
        let window = self.before.partition_point(|before| *before <= index) - 1;
        if self.open.as_ref().is_none_or(|(open, _)| *open != window) {
            self.open = Some((window, self.lay_out(order, window)));
        }
        // Set just above, where it was not already.
        let bins = &self.open.as_ref().expect("a window is open").1;
        bins.bin((index - self.before[window]) as usize)
    }

    fn lay_out(&self, order: &Order, window: usize) -> Bins {
        let end = ((window + 1) * self.window).min(self.occurrences.len());
        let mut documents = self.occurrences[window * self.window..end].to_vec();
        if order.shuffle {
            Random::new([order.seed, self.number, MIX_DOCUMENTS, window as u64]).shuffle(&mut documents);
        }
        let Some(capacity) = order.capacity else {
            let ends = (1..=documents.len() as u32).collect();
            return Bins { documents, ends };
        };
        let mut bins = best_fit_decreasing(&documents, order.length, capacity);
        if order.shuffle {
            Random::new([order.seed, self.number, MIX_BINS, window as u64]).shuffle(&mut bins);
        } else {
            bins.iter_mut().for_each(|bin| bin.sort_unstable());
            bins.sort_by_key(|bin| bin.iter().min().copied());
        }
        bins.iter_mut().for_each(|bin| bin.iter_mut().for_each(|at| *at = documents[*at as usize]));
        let mut ends = Vec::with_capacity(bins.len());
        let mut end = 0;
        for bin in &bins {
            end += bin.len() as u32;
            ends.push(end);
        }
        Bins { documents: bins.concat(), ends }
    }
}

/// Bins of positions in `documents`, none fuller than `capacity`; a document longer than that gets a bin of its own.
fn best_fit_decreasing(documents: &[u32], length: &(dyn Fn(u32) -> u32 + Sync), capacity: u32) -> Vec<Vec<u32>> {
    let mut longest_first: Vec<(u32, u32)> =
        (0..).zip(documents).map(|(at, document)| (at, length(*document))).collect();
    longest_first.sort_by_key(|(_, length)| std::cmp::Reverse(*length));
    let mut bins: Vec<Vec<u32>> = Vec::new();
    // Room left -> the bins that have just that.
    let mut room: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for (at, length) in longest_first {
        let (left, bin) = match room.range_mut(length..).next() {
            Some((&left, open)) => {
                // A key is removed with its last bin.
                let bin = open.pop().expect("no key without a bin");
                if open.is_empty() {
                    room.remove(&left);
                }
                bins[bin as usize].push(at);
                (left, bin)
            }
            None => {
                bins.push(vec![at]);
                (capacity.max(length), bins.len() as u32 - 1)
            }
        };
        if left > length {
            room.entry(left - length).or_default().push(bin);
        }
    }
    bins
}

impl Order<'_> {
    /// The epoch's documents in file order: whole weights as whole passes, the rest as a seeded part of the rows.
    fn occurrences(&self, epoch: u64) -> Vec<u32> {
        let mut occurrences = Vec::new();
        for (file, span) in self.spans.iter().enumerate() {
            let documents = span.first..span.first + span.count;
            let (whole, part) = (span.weight.floor() as u64, span.weight.fract());
            for _ in 0..whole {
                occurrences.extend(documents.clone());
            }
            if part > 0.0 {
                let draw = Random::new([self.seed, epoch, DRAW_ROWS, file as u64]).next();
                let ticket = |document: u32| mix((self.row)(document) ^ draw);
                let mut tickets: Vec<u64> = Vec::new();
                let mut last = None;
                for document in documents.clone() {
                    let row = (self.row)(document);
                    if last.replace(row) != Some(row) {
                        tickets.push(ticket(document));
                    }
                }
                let wanted = (tickets.len() as f64 * part).round() as usize;
                // A small weight still shows a row of a small file.
                let wanted = if whole == 0 { wanted.max(1) } else { wanted }.min(tickets.len());
                if wanted > 0 {
                    // `mix` never gives two rows one ticket, so exactly `wanted` rows hold at most this one.
                    let limit = *tickets.select_nth_unstable(wanted - 1).1;
                    occurrences.extend(documents.filter(|document| ticket(*document) <= limit));
                }
            }
        }
        occurrences
    }
}

const DRAW_ROWS: u64 = 1;
const MIX_BLOCKS: u64 = 2;
const MIX_DOCUMENTS: u64 = 3;
const MIX_BINS: u64 = 4;

/// SplitMix64 (Steele, Lea, Flood 2014): written out so that an order never changes with a library's version.
struct Random(u64);

impl Random {
    /// A stream of its own for each of these numbers.
    fn new(names: [u64; 4]) -> Self {
        Self(names.into_iter().fold(0, |state, name| mix(state ^ name).wrapping_add(0x9e37_79b9_7f4a_7c15)))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Fisher-Yates.
    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = ((u128::from(self.next()) * (last as u128 + 1)) >> 64) as usize;
            items.swap(last, other);
        }
    }
}

/// SplitMix64's finaliser: a bijection.
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lengths(count: usize, longest: u64, seed: u64) -> Vec<u32> {
        let mut random = Random::new([seed, 0, 0, 0]);
        (0..count).map(|_| 1 + (random.next() % longest) as u32).collect()
    }

    fn epoch_of(
        lengths: &[u32],
        spans: &[Span],
        capacity: Option<u32>,
        shuffle: bool,
        seed: u64,
        number: u64,
    ) -> Vec<Vec<u32>> {
        let order = Order {
            spans,
            length: &|document| lengths[document as usize],
            row: &|document| u64::from(document) / 2,
            capacity,
            shuffle,
            seed,
        };
        let mut epoch = Epoch::new(&order, number);
        let bins: Vec<Vec<u32>> = (0..epoch.bins()).map(|index| epoch.bin(&order, index).to_vec()).collect();
        assert_eq!(bins.iter().map(Vec::len).sum::<usize>(), epoch.occurrences());
        bins
    }

    fn whole(count: usize) -> Vec<Span> {
        vec![Span { first: 0, count: count as u32, weight: 1.0 }]
    }

    #[test]
    fn every_document_is_packed_once_and_no_bin_overflows() {
        for (round, count) in [1, 2, 17, 1000, 5000, 140_000].into_iter().enumerate() {
            let capacity = 512;
            let lengths = lengths(count, [512, 300, 40][round % 3], round as u64);
            for shuffle in [true, false] {
                let bins = epoch_of(&lengths, &whole(count), Some(capacity), shuffle, 7, round as u64);
                let mut seen: Vec<u32> = bins.concat();
                seen.sort_unstable();
                assert!(seen.iter().copied().eq(0..count as u32), "count {count}");
                let fill = |bin: &Vec<u32>| bin.iter().map(|document| lengths[*document as usize]).sum::<u32>();
                assert!(bins.iter().all(|bin| !bin.is_empty() && fill(bin) <= capacity));
                if count >= 1000 {
                    let efficiency =
                        f64::from(bins.iter().map(fill).sum::<u32>()) / (bins.len() as f64 * f64::from(capacity));
                    assert!(efficiency > 0.97, "{efficiency} for {count}, shuffle {shuffle}");
                }
            }
        }
    }

    #[test]
    fn best_fit_takes_the_fullest_bin_that_fits() {
        let lengths = [6, 5, 4, 3, 2];
        let bins = best_fit_decreasing(&[0, 1, 2, 3, 4], &|document| lengths[document as usize], 10);
        assert_eq!(bins, [vec![0, 2], vec![1, 3, 4]]);
    }

    #[test]
    fn an_order_is_its_seeds_and_epochs() {
        let lengths = lengths(3000, 100, 1);
        let at = |seed, number| epoch_of(&lengths, &whole(3000), Some(256), true, seed, number);
        assert_eq!(at(1, 0), at(1, 0));
        assert_ne!(at(1, 0), at(1, 1));
        assert_ne!(at(1, 0), at(2, 0));
    }

    #[test]
    fn an_order_never_changes_between_versions() {
        let bins = epoch_of(&[1; 10], &whole(10), None, true, 42, 0);
        assert_eq!(bins.concat(), FIRST_TEN);
    }

    /// What seed 42 gives; a change here breaks the resume of every saved run.
    const FIRST_TEN: [u32; 10] = [2, 8, 0, 1, 7, 5, 4, 9, 3, 6];

    #[test]
    fn without_shuffling_documents_stay_in_file_order() {
        let bins = epoch_of(&[1; 5000], &whole(5000), None, false, 42, 3);
        assert!(bins.concat().into_iter().eq(0..5000));
    }

    #[test]
    fn large_sets_are_mixed_across_windows() {
        let count = 2 * WINDOW + 5;
        let bins = epoch_of(&vec![1; count], &whole(count), None, true, 1, 0);
        let first: Vec<u32> = bins[..WINDOW].concat();
        let low = first.iter().filter(|document| (**document as usize) < WINDOW).count();
        assert!(low > WINDOW / 3 && low < 2 * WINDOW / 3, "{low}");
    }

    #[test]
    fn weights_repeat_rows_or_draw_a_part_that_changes() {
        // Two documents per row: a row is drawn whole.
        let spans = [Span { first: 0, count: 200, weight: 0.5 }, Span { first: 200, count: 10, weight: 2.0 }];
        let at = |epoch| {
            let mut seen = epoch_of(&[1; 210], &spans, None, true, 1, epoch).concat();
            seen.sort_unstable();
            seen
        };
        let (zero, one) = (at(0), at(1));
        assert_ne!(zero, one);
        for seen in [zero, one] {
            let (half, twice) = seen.split_at(100);
            assert!(half.iter().all(|document| *document < 200));
            assert!(half.chunks(2).all(|pair| pair[0] % 2 == 0 && pair[1] == pair[0] + 1));
            assert!(twice.chunks(2).all(|pair| pair[0] == pair[1] && pair[0] >= 200));
            assert_eq!(twice.len(), 20);
        }
    }
}
