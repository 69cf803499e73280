//! Keys and values of latent attention put together and taken apart in one pass, a token at a time.

use multiversion::multiversion;
use tch::Tensor;

use super::Stored;
use crate::torch_ext::{elements, filled_pair};

/// Keys (T, N, U + P) and values (T, N, W) of `up` (T, N (U + W)) and `shared` (T, 1, P).
pub(in crate::ops) fn keys_values(up: &Tensor, shared: &Tensor, heads: i64, unrotated: i64) -> [Tensor; 2] {
    by_kind!(up.kind(), keys_values_of(up, shared, heads, unrotated))
}

/// The gradients of `up` and `shared` from those of keys and values.
pub(in crate::ops) fn keys_values_backward(dk: &Tensor, dv: &Tensor, unrotated: i64) -> [Tensor; 2] {
    by_kind!(dk.kind(), keys_values_backward_of(dk, dv, unrotated))
}

fn keys_values_of<S: Stored>(up: &Tensor, shared: &Tensor, heads: i64, unrotated: i64) -> [Tensor; 2] {
    let (tokens, rotated) = (up.size()[0], shared.size()[2]);
    let value = up.size()[1] / heads - unrotated;
    let sizes @ [n, u, p, w] = [heads, unrotated, rotated, value].map(|size| size as usize);
    let (up, shared) = (elements::<S>(up), elements::<S>(shared));
    filled_pair::<S, S>(&[tokens, heads, unrotated + rotated], &[tokens, heads, value], |range, k, v| {
        let of = |width: usize| range.start * width..range.end * width;
        put_together(&up[of(n * (u + w))], &shared[of(p)], sizes, k, v);
    })
}

/// N, U, P and W.
type Sizes = [usize; 4];

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn put_together<S: Stored>(up: &[S], shared: &[S], [n, u, p, w]: Sizes, k: &mut [S], v: &mut [S]) {
    let heads = up.chunks_exact(u + w).zip(k.chunks_exact_mut(u + p)).zip(v.chunks_exact_mut(w));
    for (head, ((up, k), v)) in heads.enumerate() {
        let shared = &shared[head / n * p..][..p];
        k[..u].copy_from_slice(&up[..u]);
        k[u..].copy_from_slice(shared);
        v.copy_from_slice(&up[u..]);
    }
}

fn keys_values_backward_of<S: Stored>(dk: &Tensor, dv: &Tensor, unrotated: i64) -> [Tensor; 2] {
    let (tokens, heads, head) = dk.size3().expect("(T, N, U + P)");
    let (rotated, value) = (head - unrotated, dv.size()[2]);
    let sizes @ [n, u, p, w] = [heads, unrotated, rotated, value].map(|size| size as usize);
    let (dk, dv) = (elements::<S>(dk), elements::<S>(dv));
    filled_pair::<S, S>(&[tokens, heads * (unrotated + value)], &[tokens, 1, rotated], |range, dup, dshared| {
        let of = |width: usize| range.start * width..range.end * width;
        take_apart(&dk[of(n * (u + p))], &dv[of(n * w)], sizes, dup, dshared);
    })
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn take_apart<S: Stored>(dk: &[S], dv: &[S], [n, u, p, w]: Sizes, dup: &mut [S], dshared: &mut [S]) {
    let mut sums = vec![0f32; p];
    let tokens = dk.chunks_exact(n * (u + p)).zip(dv.chunks_exact(n * w)).zip(dup.chunks_exact_mut(n * (u + w)));
    for (((dk, dv), dup), dshared) in tokens.zip(dshared.chunks_exact_mut(p)) {
        sums.fill(0.0);
        let heads = dk.chunks_exact(u + p).zip(dv.chunks_exact(w)).zip(dup.chunks_exact_mut(u + w));
        for ((dk, dv), dup) in heads {
            dup[..u].copy_from_slice(&dk[..u]);
            dup[u..].copy_from_slice(dv);
            sums.iter_mut().zip(&dk[u..]).for_each(|(sum, dk)| *sum += dk.wide());
        }
        dshared.iter_mut().zip(&sums).for_each(|(dshared, sum)| *dshared = S::rounded(*sum));
    }
}
