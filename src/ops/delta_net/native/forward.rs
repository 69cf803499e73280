//! A task of the forward: chunk after chunk of a document.

use super::chunk::{Gates, Keys, learn, pack, rounded, scale, scale_rows, seen, unpack, value_rows, write};
use super::{C, Inputs, Place, RUN, Shape};
use crate::ops::cpu::Stored;
use crate::ops::cpu::products::{Left, Part, product};

/// What a thread works in.
pub(super) struct Room {
    keys: Keys,
    gates: Gates,
    /// The transpose of k: (P', C).
    turned: Vec<f32>,
    /// D, A, B: (C, C).
    decay: Vec<f32>,
    system: Vec<f32>,
    seen: Vec<f32>,
    /// U (C, H').
    learned: Vec<f32>,
    /// (C, H').
    read: Vec<f32>,
    /// (C, H').
    spare: Vec<f32>,
    /// S of each head of the group: (G, P', H').
    states: Vec<f32>,
}

impl Room {
    pub(super) fn new(shape: &Shape) -> Self {
        let (key_wide, value_wide) = (shape.key_wide(), shape.value_wide());
        let room = |size: usize| vec![0f32; size];
        Self {
            keys: Keys::new(key_wide),
            gates: Gates::new(),
            turned: room(key_wide * C),
            decay: room(C * C),
            system: room(C * C),
            seen: room(C * C),
            learned: room(C * value_wide),
            read: room(C * value_wide),
            spare: room(C * value_wide),
            states: room(shape.group * key_wide * value_wide),
        }
    }
}

/// o (L, G H) and the states that are kept (.., G P H) of a document and a group of heads.
pub(super) fn task<S: Stored>(
    inputs: &Inputs<'_, S>,
    place: Place<'_>,
    before: Option<&[f32]>,
    room: &mut Room,
    output: &mut [S],
    states: &mut [f32],
) {
    let Place { shape, document, .. } = place;
    let (key, value, group) = (shape.key, shape.value, shape.group);
    let (key_wide, value_wide) = (shape.key_wide(), shape.value_wide());
    let state_size = key_wide * value_wide;
    let Room { keys, gates, turned, decay, system, seen: by_queries, learned, read, spare, states: own } = room;
    if let Some(before) = before {
        unpack(before, (key, value), (own, state_size, value_wide));
    }
    let mut kept = states.chunks_exact_mut(shape.state());
    for index in 0..document.chunks() {
        let (first, count) = document.chunk(index);
        let (begins, ends) = (index == 0 && before.is_none(), index + 1 == document.chunks());
        let goes_on = !ends || shape.continued;
        keys.read(inputs, place, (first, count), turned);
        let rows = keys.rows;
        for g in 0..group {
            let state = &mut own[g * state_size..(g + 1) * state_size];
            gates.read(inputs, place, g, (first, count));
            gates.decay(rows, decay);
            seen(keys, decay, &gates.beta, system, by_queries);
            value_rows(inputs.v, place, g, (first, count), Some(&gates.beta), learned);
            learn(keys, (key, key_wide, value_wide), gates, system, (!begins).then_some(&*state), learned, spare);
            if !begins {
                let (left, size) = (Left::plain(&keys.q, key_wide), [rows, value_wide, key]);
                product(size, Part::Whole, left, (state, value_wide), (spare, value_wide), false);
                scale_rows(spare, &gates.entering, (rows, value_wide), read);
            }
            let (left, size) = (Left::plain(by_queries, C), [rows, value_wide, rows]);
            product(size, Part::LowerLeft, left, (learned, value_wide), (read, value_wide), !begins);
            let out = &mut output[first * group * value + g * value..];
            rounded((read, value_wide), (count, value), None, (out, group * value));
            if goes_on {
                if !begins {
                    scale(state, gates.passing);
                }
                write(keys, (key_wide, value_wide), gates, learned, state, begins, spare);
            }
        }
        if goes_on && (ends || (index + 1) % RUN == 0) {
            let kept = kept.next().expect("room for every state that is kept");
            pack(own, state_size, value_wide, (key, value), kept);
        }
    }
}
