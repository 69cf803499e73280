//! A task of the backward: run after run of a document, the last one first. In a run the states before its chunks are made again, then
//! its chunks are walked back.

use multiversion::multiversion;
use multiversion::target::target_cfg_f;

use super::chunk::{
    Gates, Keys, Within, add_rows, dot, dot_rows, learn, rounded, scale, scale_rows, seen, unpack, value_rows, within,
    write,
};
use super::{C, Inputs, Place, RUN, Shape};
use crate::ops::cpu::products::{Left, Part, product, solve, transpose};
use crate::ops::cpu::{self, Stored};

/// What a thread works in.
pub(super) struct Room {
    chunks: Vec<OfKeys>,
    heads: Vec<OfValues>,
    /// A, B and their gradients, the first of A and negative: (C, C).
    system: Vec<f32>,
    seen: Vec<f32>,
    dsystem: Vec<f32>,
    dseen: Vec<f32>,
    /// dO, X and what is made of them: (C, H').
    doutput: Vec<f32>,
    x: Vec<f32>,
    spare: Vec<f32>,
    /// (C, P').
    back: Vec<f32>,
    /// A transpose: (P', C), (H', C) or (H', P').
    turned: Vec<f32>,
    /// dS of each head of the group: (G, P', H').
    dstates: Vec<f32>,
}

/// Of a chunk of a run, what its value heads share.
struct OfKeys {
    keys: Keys,
    /// The gradients of q and k: (C, P').
    dq: Vec<f32>,
    dk: Vec<f32>,
    /// The gradients of the products of keys with keys and queries with keys: (C, C).
    dproducts: [Vec<f32>; 2],
}

/// Of a chunk of a run and one value head.
struct OfValues {
    gates: Gates,
    /// D: (C, C).
    decay: Vec<f32>,
    /// U: (C, H').
    learned: Vec<f32>,
    /// S before it: (P', H').
    state: Vec<f32>,
}

/// What is written, of the document and the group of heads.
pub(super) struct Gradients<'a, S> {
    /// (L, P).
    pub(super) q: &'a mut [S],
    /// (L, P).
    pub(super) k: &'a mut [S],
    /// (L, G H).
    pub(super) v: &'a mut [S],
    /// (L, G).
    pub(super) log_decay: &'a mut [f32],
    /// (L, G).
    pub(super) beta: &'a mut [f32],
}

impl Room {
    pub(super) fn new(shape: &Shape) -> Self {
        let (key_wide, value_wide) = (shape.key_wide(), shape.value_wide());
        let room = |size: usize| vec![0f32; size];
        let longest = shape.documents.iter().map(|document| document.chunks().min(RUN)).max().unwrap_or(0);
        let of_keys = || OfKeys {
            keys: Keys::new(key_wide),
            dq: room(C * key_wide),
            dk: room(C * key_wide),
            dproducts: [room(C * C), room(C * C)],
        };
        let of_values = || OfValues {
            gates: Gates::new(),
            decay: room(C * C),
            learned: room(C * value_wide),
            state: room(key_wide * value_wide),
        };
        Self {
            chunks: (0..longest).map(|_| of_keys()).collect(),
            heads: (0..longest).map(|_| of_values()).collect(),
            system: room(C * C),
            seen: room(C * C),
            dsystem: room(C * C),
            dseen: room(C * C),
            doutput: room(C * value_wide),
            x: room(C * value_wide),
            spare: room(C * value_wide),
            back: room(C * key_wide),
            turned: room(C.max(key_wide) * value_wide.max(key_wide)),
            dstates: room(shape.group * key_wide * value_wide),
        }
    }
}

/// The gradients of a document and a group of heads, from that of o (T, N, H) and the states (.., G P H) after its runs.
pub(super) fn task<S: Stored>(
    inputs: &Inputs<'_, S>,
    grad: &[S],
    states: &[f32],
    place: Place<'_>,
    room: &mut Room,
    mut gradients: Gradients<'_, S>,
) {
    let Place { shape, document, .. } = place;
    for run in (0..document.runs()).rev() {
        let indices = run * RUN..document.chunks().min((run + 1) * RUN);
        for (of_keys, index) in room.chunks.iter_mut().zip(indices.clone()) {
            of_keys.keys.read(inputs, place, document.chunk(index), &mut room.turned);
            let OfKeys { dq, dk, dproducts: [dkeys, dqueries], .. } = of_keys;
            [dq, dk, dkeys, dqueries].into_iter().for_each(|gradient| gradient.fill(0.0));
        }
        let before = run.checked_sub(1).map(|run| &states[run * shape.state()..(run + 1) * shape.state()]);
        for g in 0..shape.group {
            let own = before.map(|before| &before[g * shape.key * shape.value..(g + 1) * shape.key * shape.value]);
            room.learn_again(inputs, place, g, indices.clone(), own);
            for index in indices.clone().rev() {
                room.walk_back(inputs, grad, place, g, index, &mut gradients);
            }
        }
        for (of_keys, index) in room.chunks.iter_mut().zip(indices) {
            let from = document.chunk(index).0 * shape.key;
            of_keys.finish(shape, &mut gradients.q[from..], &mut gradients.k[from..]);
        }
    }
}

impl Room {
    /// Fills what there is of each chunk of a run and a value head; `before` is the state (P, H) that the run begins with.
    fn learn_again<S: Stored>(
        &mut self,
        inputs: &Inputs<'_, S>,
        place: Place<'_>,
        g: usize,
        indices: std::ops::Range<usize>,
        before: Option<&[f32]>,
    ) {
        let Place { shape, document, .. } = place;
        let (key, key_wide, value_wide) = (shape.key, shape.key_wide(), shape.value_wide());
        if let Some(before) = before {
            let first = &mut self.heads[0].state;
            unpack(before, (key, shape.value), (first, key_wide * value_wide, value_wide));
        }
        let count = indices.len();
        for (m, index) in indices.enumerate() {
            let (keys, tokens) = (&self.chunks[m].keys, document.chunk(index));
            let [this, next] = match &mut self.heads[m..] {
                [this, next, ..] => [Some(this), Some(next)],
                [this] => [Some(this), None],
                [] => unreachable!("room for every chunk of a run"),
            };
            let OfValues { gates, decay, learned, state } = this.expect("just matched");
            let begins = index == 0;
            gates.read(inputs, place, g, tokens);
            gates.decay(keys.rows, decay);
            seen(keys, decay, &gates.beta, &mut self.system, &mut self.seen);
            value_rows(inputs.v, place, g, tokens, Some(&gates.beta), learned);
            let known = (!begins).then_some(&**state);
            learn(keys, (key, key_wide, value_wide), gates, &self.system, known, learned, &mut self.spare);
            if let Some(next) = next.filter(|_| m + 1 < count) {
                if !begins {
                    next.state.copy_from_slice(state);
                    scale(&mut next.state, gates.passing);
                }
                write(keys, (key_wide, value_wide), gates, learned, &mut next.state, begins, &mut self.spare);
            }
        }
    }

    /// The gradients of a chunk and a value head; moves dS from after the chunk to before it.
    fn walk_back<S: Stored>(
        &mut self,
        inputs: &Inputs<'_, S>,
        grad: &[S],
        place: Place<'_>,
        g: usize,
        index: usize,
        gradients: &mut Gradients<'_, S>,
    ) {
        let Place { shape, document, .. } = place;
        let Shape { key, value, group, .. } = *shape;
        let (key_wide, value_wide) = (shape.key_wide(), shape.value_wide());
        let Self { chunks, heads, system, seen: by_queries, dsystem, dseen, .. } = self;
        let Self { doutput, x, spare, back, turned, dstates, .. } = self;
        let OfKeys { keys, dq, dk, dproducts: [dkeys, dqueries] } = &mut chunks[index % RUN];
        let OfValues { gates, decay, learned, state } = &heads[index % RUN];
        let dstate = &mut dstates[g * key_wide * value_wide..(g + 1) * key_wide * value_wide];
        let (tokens, rows) = (document.chunk(index), keys.rows);
        let (first, count) = tokens;
        // Whether there is a state before the chunk, and whether anything is seen of the one after it.
        let (begins, ends) = (index == 0, index + 1 == document.chunks());
        let (of_values, of_keys) = ((rows, value_wide), (rows, key_wide));

        // X.
        seen(keys, decay, &gates.beta, system, by_queries);
        value_rows(grad, place, g, tokens, None, doutput);
        let (left, size) = (Left::turned(by_queries, C), [rows, value_wide, rows]);
        product(size, Part::UpperLeft, left, (doutput, value_wide), (x, value_wide), false);
        if !ends {
            let (left, size) = (Left::plain(&keys.k, key_wide), [rows, value_wide, key]);
            product(size, Part::Whole, left, (dstate, value_wide), (spare, value_wide), false);
            add_rows(spare, &gates.leaving, of_values, x);
        }
        solve([rows, value_wide], (system, C), true, (x, value_wide));

        // Within the chunk.
        transpose([C, value_wide], (learned, value_wide), (turned, C));
        for (left, out) in [(&*doutput, &mut *dseen), (&*x, &mut *dsystem)] {
            let left = Left::plain(left, value_wide);
            product([rows, C, value], Part::LowerResult, left, (turned, C), (out, C), false);
        }
        let mut dsums = [0f32; C];
        let own = Within { decay, beta: &gates.beta, gradients: [dseen, dsystem] };
        let learning = within(keys, &own, [dkeys, dqueries], &mut dsums);
        value_rows(inputs.v, place, g, tokens, None, spare);
        let mut dbeta = dot_rows(x, spare, of_values);
        dbeta.iter_mut().zip(&learning).for_each(|(dbeta, learning)| *dbeta -= learning);
        let out = &mut gradients.v[first * group * value + g * value..];
        rounded((x, value_wide), (count, value), Some(&gates.beta), (out, group * value));

        // Through the state after the chunk.
        let mut dtotal = 0f32;
        if !ends {
            transpose([key_wide, value_wide], (dstate, value_wide), (turned, key_wide));
            scale_rows(learned, &gates.leaving, of_values, spare);
            let (left, size) = (Left::plain(spare, value_wide), [rows, key_wide, value]);
            product(size, Part::Whole, left, (turned, key_wide), (back, key_wide), false);
            let writing = dot_rows(back, &keys.k, of_keys);
            add_rows(back, &[1.0; C], of_keys, dk);
            for (dsum, writing) in dsums.iter_mut().zip(&writing) {
                *dsum -= writing;
                dtotal += writing;
            }
            if !begins {
                dtotal += gates.passing * dot(state, dstate);
            }
        }

        // Through the state before it.
        if !begins {
            if !ends {
                scale(dstate, gates.passing);
            }
            transpose([key_wide, value_wide], (state, value_wide), (turned, key_wide));
            let through = |rows_of: &[f32], back: &mut [f32]| {
                let (left, size) = (Left::plain(rows_of, value_wide), [rows, key_wide, value]);
                product(size, Part::Whole, left, (turned, key_wide), (back, key_wide), false);
            };
            scale_rows(doutput, &gates.entering, of_values, spare);
            through(spare, back);
            let reading = dot_rows(back, &keys.q, of_keys);
            add_rows(back, &[1.0; C], of_keys, dq);
            let (left, size) = (Left::turned(&keys.q, key_wide), [key_wide, value_wide, rows]);
            product(size, Part::Whole, left, (spare, value_wide), (dstate, value_wide), !ends);

            let removing: [f32; C] = std::array::from_fn(|i| -gates.beta[i] * gates.entering[i]);
            scale_rows(x, &gates.entering, of_values, spare);
            through(spare, back);
            let known = dot_rows(back, &keys.k, of_keys);
            let minus_beta = gates.beta.map(|beta| -beta);
            add_rows(back, &minus_beta, of_keys, dk);
            scale_rows(x, &removing, of_values, spare);
            let left = Left::turned(&keys.k, key_wide);
            product(size, Part::Whole, left, (spare, value_wide), (dstate, value_wide), true);
            for i in 0..count {
                dsums[i] += reading[i] - gates.beta[i] * known[i];
                dbeta[i] -= known[i];
            }
        }

        // A log decay is in all sums from its own on.
        let mut dlog_decay = dtotal;
        for i in (0..count).rev() {
            dlog_decay += dsums[i];
            gradients.log_decay[(first + i) * group + g] = dlog_decay;
            gradients.beta[(first + i) * group + g] = dbeta[i];
        }
    }
}

impl OfKeys {
    /// Writes the gradients of q and k (.., P) before they were made 1 long.
    fn finish<S: Stored>(&mut self, shape: &Shape, dq_out: &mut [S], dk_out: &mut [S]) {
        let Self { keys, dq, dk, dproducts: [dkeys, dqueries] } = self;
        let (key, wide, rows) = (shape.key, shape.key_wide(), keys.rows);
        let size = [rows, wide, rows];
        let add =
            |part, left, right: &[f32], out: &mut [f32]| product(size, part, left, (right, wide), (out, wide), true);
        add(Part::LowerLeft, Left::plain(dqueries, C), &keys.k, dq);
        add(Part::UpperLeft, Left::turned(dqueries, C), &keys.q, dk);
        add(Part::LowerLeft, Left::plain(dkeys, C), &keys.k, dk);
        add(Part::UpperLeft, Left::turned(dkeys, C), &keys.k, dk);
        let [q_scales, k_scales] = &keys.scales;
        let size = (keys.count, key, wide);
        stretched((dq, &keys.q), size, (q_scales, (key as f32).sqrt().recip()), dq_out);
        stretched((dk, &keys.k), size, (k_scales, 1.0), dk_out);
    }
}

/// The gradients of rows (count, P) from those of what they became, y (C, P'): as long as `factor`, by the scales that made them 1 long.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn stretched<S: Stored>(
    (dy, y): (&[f32], &[f32]),
    (count, width, wide): (usize, usize, usize),
    (scales, factor): (&[f32; C], f32),
    out: &mut [S],
) {
    let rows = dy.chunks_exact(wide).zip(y.chunks_exact(wide)).zip(out.chunks_exact_mut(width)).take(count);
    for (((dy, y), out), scale) in rows.zip(scales) {
        let along = cpu::dot(&dy[..width], &y[..width], target_cfg_f!(target_feature = "fma")) / (factor * factor);
        let scale = scale * factor;
        for ((out, dy), y) in out.iter_mut().zip(dy).zip(y) {
            *out = S::rounded((dy - y * along) * scale);
        }
    }
}
