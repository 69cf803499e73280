//! Windows of tokens compressed to one entry each, a window at a time: its shares stay in the nearest cache.

use multiversion::multiversion;
use multiversion::target::target_cfg_f;
use tch::Tensor;

use super::{Stored, exp, multiply_add};
use crate::ops::Documents;
use crate::ops::compress::entries_of;
use crate::torch_ext::{elements, filled, filled_pair};

/// Where windows are: m tokens each.
pub(in crate::ops) struct Windows {
    /// The first token of each (W).
    firsts: Vec<usize>,
    /// Of each (W), whether the window before it is of the same document.
    follows: Vec<bool>,
    /// m.
    rate: usize,
    /// Whether an entry is of the first halves of the window before and of the second halves of its own.
    overlapping: bool,
}

/// Entries (W, H) of k and g (T, width) with the bias (m, width), fp32: for every element the mean of k weighed by the softmax of
/// g + bias over the window.
pub(in crate::ops) fn compress(k: &Tensor, g: &Tensor, bias: &Tensor, windows: &Windows) -> Tensor {
    by_kind!(k.kind(), compress_of(k, g, bias, windows))
}

/// The gradients of k and g (T, width) from that of the entries (W, H).
pub(in crate::ops) fn compress_backward(
    de: &Tensor,
    k: &Tensor,
    g: &Tensor,
    bias: &Tensor,
    windows: &Windows,
) -> [Tensor; 2] {
    by_kind!(k.kind(), compress_backward_of(de, k, g, bias, windows))
}

impl Windows {
    /// The complete windows of `rate` tokens of every document.
    pub(in crate::ops) fn of(documents: &Documents, rate: i64, overlapping: bool) -> Self {
        let (mut firsts, mut follows) = (Vec::new(), Vec::new());
        for (start, length) in documents.spans() {
            let own = entries_of(length, rate);
            firsts.extend((0..own).map(|w| (start + w * rate) as usize));
            follows.extend((0..own).map(|w| w > 0));
        }
        Self { firsts, follows, rate: rate as usize, overlapping }
    }

    /// Rows of tokens that an entry is made of, at most.
    fn slots(&self) -> usize {
        if self.overlapping { 2 * self.rate } else { self.rate }
    }

    /// Of each slot of a window where its H elements begin in k and g, and in the bias; none where there is no window before.
    fn places(&self, window: usize, width: usize) -> impl Iterator<Item = Option<(usize, usize)>> {
        let (first, m, half) = (self.firsts[window], self.rate, if self.overlapping { width / 2 } else { 0 });
        let before = self.overlapping.then_some(()).into_iter().flat_map(move |()| 0..m);
        let before = before.map(move |i| self.follows[window].then(|| ((first + i - m) * width, i * width)));
        before.chain((0..m).map(move |i| Some(((first + i) * width + half, i * width + half))))
    }
}

fn compress_of<S: Stored>(k: &Tensor, g: &Tensor, bias: &Tensor, windows: &Windows) -> Tensor {
    let (width, h) = sizes(k, windows);
    let (k, g, bias) = (elements::<S>(k), elements::<S>(g), elements::<f32>(bias));
    filled::<S>(&[windows.firsts.len() as i64, h as i64], |range, entries| {
        let mut room = Room::new(windows, h);
        for (window, entry) in range.zip(entries.chunks_exact_mut(h)) {
            room.places.clear();
            room.places.extend(windows.places(window, width).flatten());
            room.mean(k, g, bias);
            entry.iter_mut().zip(&room.entry).for_each(|(entry, mean)| *entry = S::rounded(*mean));
        }
    })
}

fn compress_backward_of<S: Stored>(
    de: &Tensor,
    k: &Tensor,
    g: &Tensor,
    bias: &Tensor,
    windows: &Windows,
) -> [Tensor; 2] {
    let (size, (width, h), slots) = (k.size(), sizes(k, windows), windows.slots());
    let (de, k, g, bias) = (elements::<S>(de), elements::<S>(k), elements::<S>(g), elements::<f32>(bias));
    let shape = [windows.firsts.len() as i64, (slots * h) as i64];
    let of_slots = filled_pair::<S, S>(&shape, &shape, |range, dk, dg| {
        let mut room = Room::new(windows, h);
        let each = dk.chunks_exact_mut(slots * h).zip(dg.chunks_exact_mut(slots * h));
        for (window, (dk, dg)) in range.zip(each) {
            room.places.clear();
            room.places.extend(windows.places(window, width).flatten());
            room.mean(k, g, bias);
            // The slots that are not there come first.
            let missing = (slots - room.places.len()) * h;
            room.back(k, &de[window * h..][..h], &mut dk[missing..], &mut dg[missing..]);
        }
    });
    // Of every token its window and its place there.
    let mut of_tokens = vec![None; size[0] as usize];
    for (window, first) in windows.firsts.iter().enumerate() {
        (0..windows.rate).for_each(|i| of_tokens[first + i] = Some((window, i)));
    }
    let [dk_slots, dg_slots] = of_slots.each_ref().map(elements::<S>);
    let of_slot = |window: usize, slot: usize| (window * slots + slot) * h..(window * slots + slot + 1) * h;
    filled_pair::<S, S>(&size, &size, |range, dk, dg| {
        for (token, (dk, dg)) in range.zip(dk.chunks_exact_mut(width).zip(dg.chunks_exact_mut(width))) {
            let (own, next) = match of_tokens[token] {
                None => (None, None),
                Some((window, i)) if windows.overlapping => {
                    let follower = windows.follows.get(window + 1).is_some_and(|follows| *follows);
                    (Some(of_slot(window, windows.rate + i)), follower.then(|| of_slot(window + 1, i)))
                }
                Some((window, i)) => (Some(of_slot(window, i)), None),
            };
            for (d, slots) in [(dk, dk_slots), (dg, dg_slots)] {
                // First halves are the next window's where windows overlap.
                let (of_next, of_own) = d.split_at_mut(width - h);
                for (d, from) in [(of_next, &next), (of_own, &own)] {
                    match from {
                        Some(from) => d.copy_from_slice(&slots[from.clone()]),
                        None => d.fill(S::rounded(0.0)),
                    }
                }
            }
        }
    })
}

/// Width of k, and H.
fn sizes(k: &Tensor, windows: &Windows) -> (usize, usize) {
    let width = k.size()[1] as usize;
    (width, if windows.overlapping { width / 2 } else { width })
}

/// What a window is worked on in.
struct Room {
    /// Where its slots are in k and g, and in the bias.
    places: Vec<(usize, usize)>,
    /// (slots, H).
    shares: Vec<f32>,
    /// (H).
    largest: Vec<f32>,
    sums: Vec<f32>,
    entry: Vec<f32>,
}

impl Room {
    fn new(windows: &Windows, h: usize) -> Self {
        let [largest, sums, entry] = [(); 3].map(|()| vec![0f32; h]);
        Self { places: Vec::new(), shares: vec![0f32; windows.slots() * h], largest, sums, entry }
    }

    fn mean<S: Stored>(&mut self, k: &[S], g: &[S], bias: &[f32]) {
        let Self { places, shares, largest, sums, entry } = self;
        mean(k, (g, bias), places, shares, [largest, sums, entry]);
    }

    fn back<S: Stored>(&self, k: &[S], de: &[S], dk: &mut [S], dg: &mut [S]) {
        back(k, de, (&self.places, &self.shares, &self.entry), dk, dg);
    }
}

/// The entry of a window, and the share of every slot.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn mean<S: Stored>(
    k: &[S],
    (g, bias): (&[S], &[f32]),
    places: &[(usize, usize)],
    shares: &mut [f32],
    [largest, sums, entry]: [&mut [f32]; 3],
) {
    let (fused, h) = (target_cfg_f!(target_feature = "fma"), entry.len());
    largest.fill(f32::NEG_INFINITY);
    for ((place, of_bias), share) in places.iter().zip(shares.chunks_exact_mut(h)) {
        for (((share, g), bias), largest) in
            share.iter_mut().zip(&g[*place..][..h]).zip(&bias[*of_bias..][..h]).zip(&mut *largest)
        {
            *share = g.wide() + bias;
            *largest = largest.max(*share);
        }
    }
    sums.fill(0.0);
    entry.fill(0.0);
    for ((place, _), share) in places.iter().zip(shares.chunks_exact_mut(h)) {
        let each = share.iter_mut().zip(&*largest).zip(&mut *sums).zip(&k[*place..][..h]).zip(&mut *entry);
        for ((((share, largest), sum), k), entry) in each {
            *share = exp(*share - largest, fused);
            *sum += *share;
            *entry = multiply_add(fused, *share, k.wide(), *entry);
        }
    }
    sums.iter_mut().for_each(|sum| *sum = 1.0 / *sum);
    entry.iter_mut().zip(&*sums).for_each(|(entry, inverse)| *entry *= inverse);
    for (share, _) in shares.chunks_exact_mut(h).zip(places) {
        share.iter_mut().zip(&*sums).for_each(|(share, inverse)| *share *= inverse);
    }
}

/// dk and dg of every slot: `share de` and `share (k - entry) de`.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn back<S: Stored>(
    k: &[S],
    de: &[S],
    (places, shares, entry): (&[(usize, usize)], &[f32], &[f32]),
    dk: &mut [S],
    dg: &mut [S],
) {
    let h = entry.len();
    let slots = places.iter().zip(shares.chunks_exact(h)).zip(dk.chunks_exact_mut(h).zip(dg.chunks_exact_mut(h)));
    for (((place, _), share), (dk, dg)) in slots {
        let given = de.iter().zip(share).zip(k[*place..][..h].iter().zip(entry));
        for (((de, share), (k, entry)), (dk, dg)) in given.zip(dk.iter_mut().zip(dg)) {
            let through = de.wide() * share;
            *dk = S::rounded(through);
            *dg = S::rounded(through * (k.wide() - entry));
        }
    }
}
