//! The triangular systems of the chunks, which libtorch would solve one at a time: on the CPU in registers, a row at a time.

use multiversion::multiversion;
use tch::Tensor;

use super::CHUNK;
use crate::ops::cpu;
use crate::torch_ext::{elements, filled};

const C: usize = CHUNK as usize;

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
