//! What the tokens of a chunk see of each other, in one pass on the CPU; and their triangular systems, which libtorch would solve
//! one at a time: on the CPU in registers, a row at a time.

use multiversion::multiversion;
use multiversion::target::target_cfg_f;
use tch::Tensor;

use super::CHUNK;
use crate::ops::cpu;
use crate::torch_ext::{elements, filled, filled_many};

const C: usize = CHUNK as usize;

/// Letters as in the formulas of `chunk`; each (M, N, C, C), fp32.
pub(super) struct Seen {
    /// D.
    pub(super) decay: Tensor,
    /// `(k_i k_j) D_ij` for j < i.
    pub(super) keys: Tensor,
    /// B.
    pub(super) queries: Tensor,
    /// A.
    pub(super) system: Tensor,
}

/// Of the products of keys with keys and of queries with keys (M, K, C, C), the sums c (M, N, C), who sees whom (M, 1, C, C), 0 or
/// minus infinity, and b (M, N, C, 1); all fp32.
pub(super) fn seen(keys: &Tensor, queries: &Tensor, sums: &Tensor, within: &Tensor, beta: &Tensor) -> Seen {
    let (m, value_heads, _) = sums.size3().expect("(M, N, C)");
    let key_heads = keys.size()[1];
    let group = value_heads / key_heads;
    let size = [m, value_heads, CHUNK, CHUNK];
    if cpu::serves(&[keys, queries, sums, within, beta]) {
        let [keys, queries, sums, within, beta] = [keys, queries, sums, within, beta].map(elements::<f32>);
        let rows = m * value_heads * CHUNK;
        let (value_heads, key_heads, group) = (value_heads as usize, key_heads as usize, group as usize);
        let [decay, keys, queries, system] = filled_many::<f32, 4>(&[rows, CHUNK], |range, outputs| {
            let [decay, own_keys, own_queries, system] = outputs.map(|output| output.chunks_exact_mut(C));
            let outputs = decay.zip(own_keys).zip(own_queries.zip(system));
            for (row, ((decay, own_keys), (own_queries, system))) in range.zip(outputs) {
                let (head, i) = (row / C, row % C);
                let (m, n) = (head / value_heads, head % value_heads);
                let products = ((m * key_heads + n / group) * C + i) * C;
                let token =
                    Token { i, sums: &sums[head * C..][..C], within: &within[(m * C + i) * C..][..C], beta: beta[row] };
                let products = [&keys[products..][..C], &queries[products..][..C]];
                seen_row(token, products, [decay, own_keys, own_queries, system]);
            }
        });
        let [decay, keys, queries, system] = [decay, keys, queries, system].map(|x| x.view(size));
        return Seen { decay, keys, queries, system };
    }
    let decay = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).g_add_(within).exp_(); // (M, N, C, C)
    let by_group = decay.view([m, key_heads, group, CHUNK, CHUNK]);
    let faded = |products: &Tensor| (products.unsqueeze(2) * &by_group).view(size);
    let keys = faded(keys).tril_(-1);
    Seen { queries: faded(queries), system: &keys * beta, keys, decay }
}

/// A token of a chunk, and what there is of the others.
struct Token<'a> {
    /// Which one it is.
    i: usize,
    sums: &'a [f32],
    within: &'a [f32],
    beta: f32,
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn seen_row(token: Token<'_>, [by_keys, by_queries]: [&[f32]; 2], outputs: [&mut [f32]; 4]) {
    let fused = target_cfg_f!(target_feature = "fma");
    let [decay, keys, queries, system] = outputs.map(|output| <&mut [f32; C]>::try_from(output).expect("C columns"));
    let [sums, within, by_keys, by_queries] =
        [token.sums, token.within, by_keys, by_queries].map(|row| <&[f32; C]>::try_from(row).expect("C columns"));
    for j in 0..C {
        let faded = cpu::exp(sums[token.i] - sums[j], fused);
        decay[j] = if within[j] == 0.0 { faded } else { 0.0 };
        queries[j] = by_queries[j] * decay[j];
        keys[j] = if j < token.i { by_keys[j] * decay[j] } else { 0.0 };
        system[j] = keys[j] * token.beta;
    }
}

/// `(I + A)^-1` (..., C, C), fp32; of A (..., C, C) only what lies below the diagonal is read.
pub(super) fn inverse(system: &Tensor) -> Tensor {
    let size = system.size();
    if cpu::serves(&[system]) {
        let systems = elements::<f32>(system);
        let inverses = filled::<f32>(&[systems.len() as i64 / (CHUNK * CHUNK), CHUNK * CHUNK], |range, out| {
            invert(&systems[range.start * C * C..range.end * C * C], out);
        });
        return inverses.view(size.as_slice());
    }
    let one = Tensor::eye(CHUNK, (system.kind(), system.device()));
    system.linalg_solve_triangular(&one.expand(size.as_slice(), false), false, true, true).contiguous()
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+fma", "x86_64+avx2+fma"))]
fn invert(systems: &[f32], inverses: &mut [f32]) {
    for (system, inverse) in systems.chunks_exact(C * C).zip(inverses.chunks_exact_mut(C * C)) {
        for i in 0..C {
            let mut row = [0f32; C];
            row[i] = 1.0;
            for (j, known) in inverse.chunks_exact(C).enumerate().take(i) {
                let factor = system[i * C + j];
                for (value, known) in row.iter_mut().zip(known) {
                    *value -= factor * known;
                }
            }
            inverse[i * C..(i + 1) * C].copy_from_slice(&row);
        }
    }
}
