//! Formats whose scales are searched for: Q4_K, Q5_K, Q6_K.

use half::f16;
use multiversion::multiversion;

use super::{LANES, Lanes, each, lanes, nearest, put_half};

/// Scale, minimum (its negative) and codes of every lane's 32 numbers, such that `scale q - minimum` is near them: of so many tries around
/// what the range says the one with the least error, far numbers counting more. A lane of equal numbers has the scale 0.
#[inline(always)]
fn scale_and_minimum<const MOST: i32, const TRIES: i32>(
    x: &[Lanes; 32],
    first: f32,
) -> (Lanes, Lanes, [[u8; LANES]; 32]) {
    let mut squares = [0.0; LANES];
    for x in x {
        squares = lanes(|l| squares[l] + x[l] * x[l]);
    }
    let spread = lanes(|l| (squares[l] / 32.0).sqrt());
    let weights: [Lanes; 32] = std::array::from_fn(|i| lanes(|l| spread[l] + x[i][l].abs()));
    let (mut least, mut most, mut sum_w) = (x[0], x[0], weights[0]);
    let mut sum_x = lanes(|l| weights[0][l] * x[0][l]);
    for (x, w) in x.iter().zip(&weights).skip(1) {
        least = lanes(|l| if x[l] < least[l] { x[l] } else { least[l] });
        most = lanes(|l| if x[l] > most[l] { x[l] } else { most[l] });
        sum_w = lanes(|l| sum_w[l] + w[l]);
        sum_x = lanes(|l| sum_x[l] + w[l] * x[l]);
    }
    let least = lanes(|l| if least[l] > 0.0 { 0.0 } else { least[l] });
    let most_code = MOST as f32;
    let code = |x: f32, inverse: f32, least: f32| nearest(inverse * (x - least)).clamp(0, MOST);

    let inverse = lanes(|l| most_code / (most[l] - least[l]));
    let (mut scale, mut minimum, mut error) = (lanes(|l| 1.0 / inverse[l]), least, [0.0; LANES]);
    let mut codes = [[0u8; LANES]; 32];
    for i in 0..32 {
        for l in 0..LANES {
            let q = code(x[i][l], inverse[l], least[l]);
            codes[i][l] = q as u8;
            let off = scale[l] * q as f32 + least[l] - x[i][l];
            error[l] += weights[i][l] * (off * off);
        }
    }
    for attempt in 0..=TRIES {
        let range = first + 0.1 * attempt as f32 + most_code;
        let inverse = lanes(|l| range / (most[l] - minimum[l]));
        let (mut sum_q, mut sum_qq, mut sum_qx) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
        let mut tried = [[0u8; LANES]; 32];
        for i in 0..32 {
            for l in 0..LANES {
                let q = code(x[i][l], inverse[l], minimum[l]);
                tried[i][l] = q as u8;
                let wq = weights[i][l] * q as f32;
                sum_q[l] += wq;
                sum_qq[l] += wq * q as f32;
                sum_qx[l] += wq * x[i][l];
            }
        }
        let determinant = lanes(|l| sum_w[l] * sum_qq[l] - sum_q[l] * sum_q[l]);
        let own_minimum = lanes(|l| (sum_qq[l] * sum_x[l] - sum_q[l] * sum_qx[l]) / determinant[l]);
        let own_scale = lanes(|l| {
            let both = (sum_w[l] * sum_qx[l] - sum_x[l] * sum_q[l]) / determinant[l];
            if own_minimum[l] > 0.0 { sum_qx[l] / sum_qq[l] } else { both }
        });
        let own_minimum = lanes(|l| if own_minimum[l] > 0.0 { 0.0 } else { own_minimum[l] });
        let mut own_error = [0.0; LANES];
        for i in 0..32 {
            for l in 0..LANES {
                let off = own_scale[l] * f32::from(tried[i][l]) + own_minimum[l] - x[i][l];
                own_error[l] += weights[i][l] * (off * off);
            }
        }
        let better: [bool; LANES] = std::array::from_fn(|l| determinant[l] > 0.0 && own_error[l] < error[l]);
        error = lanes(|l| if better[l] { own_error[l] } else { error[l] });
        scale = lanes(|l| if better[l] { own_scale[l] } else { scale[l] });
        minimum = lanes(|l| if better[l] { own_minimum[l] } else { minimum[l] });
        for (codes, tried) in codes.iter_mut().zip(&tried) {
            for l in 0..LANES {
                codes[l] = if better[l] { tried[l] } else { codes[l] };
            }
        }
    }
    for l in 0..LANES {
        if most[l] == least[l] {
            (scale[l], minimum[l]) = (0.0, least[l]);
            codes.iter_mut().for_each(|codes| codes[l] = 0);
        }
    }
    (scale, lanes(|l| -minimum[l]), codes)
}

/// The parts of two blocks of 256 numbers, side by side; zeros where there is but one.
#[inline(always)]
fn side_by_side(numbers: &[f32]) -> [Lanes; 32] {
    std::array::from_fn(|i| lanes(|l| numbers.get(32 * l + i).copied().unwrap_or(0.0)))
}

/// What Q4_K and Q5_K share: writes scales and minima into `block`, and gives the codes (256).
#[inline(always)]
fn scaled<const MOST: i32>(x: &[f32], scales: &[f32], minima: &[f32], codes: &mut [u8; 256], block: &mut [u8]) {
    let most = |of: &[f32]| of.iter().fold(0.0f32, |most, &x| if x > most { x } else { most });
    let (largest_scale, largest_minimum) = (most(scales), most(minima));
    let share = |largest: f32| if largest > 0.0 { 63.0 / largest } else { 0.0 };
    let (of_scales, of_minima) = (share(largest_scale), share(largest_minimum));
    let six_bits = |x: f32| (nearest(x) as u8).min(63);
    let scales: [u8; 8] = std::array::from_fn(|j| six_bits(of_scales * scales[j]));
    let minima: [u8; 8] = std::array::from_fn(|j| six_bits(of_minima * minima[j]));
    put_half(block, 0, largest_scale / 63.0);
    put_half(block, 2, largest_minimum / 63.0);
    for j in 0..4 {
        block[4 + j] = scales[j] | scales[j + 4] >> 4 << 6;
        block[8 + j] = minima[j] | minima[j + 4] >> 4 << 6;
        block[12 + j] = scales[j + 4] & 15 | (minima[j + 4] & 15) << 4;
    }
    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let (d, least) = (half(0), half(2));
    for (j, (x, codes)) in x.chunks_exact(32).zip(codes.chunks_exact_mut(32)).enumerate() {
        let d = d * f32::from(scales[j]);
        if d == 0.0 {
            continue;
        }
        let least = least * f32::from(minima[j]);
        for (code, x) in codes.iter_mut().zip(x) {
            *code = nearest((x + least) / d).clamp(0, MOST) as u8;
        }
    }
}

/// Blocks of Q4_K or Q5_K, two at a time: `write` lays codes out behind a block's scales.
#[inline(always)]
fn in_pairs<const BYTES: usize, const MOST: i32, const TRIES: i32>(
    numbers: &[f32],
    bytes: &mut [u8],
    first: f32,
    write: impl Fn(&[u8; 256], &mut [u8]),
) {
    for (numbers, blocks) in numbers.chunks(512).zip(bytes.chunks_mut(2 * BYTES)) {
        let (scales, minima, found) = scale_and_minimum::<MOST, TRIES>(&side_by_side(numbers), first);
        for (number, (x, block)) in numbers.chunks_exact(256).zip(blocks.chunks_exact_mut(BYTES)).enumerate() {
            let parts = 8 * number..8 * number + 8;
            let mut codes: [u8; 256] = std::array::from_fn(|i| found[i % 32][parts.start + i / 32]);
            scaled::<MOST>(x, &scales[parts.clone()], &minima[parts], &mut codes, block);
            write(&codes, block);
        }
    }
}

/// f16 d, dmin; 8 scales and minima of 6 bits; 128 bytes of 4 bits: x = (d s) q - dmin m, per 32.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+f16c", "x86_64+avx2+f16c"))]
pub(crate) fn q4_k(numbers: &[f32], bytes: &mut [u8]) {
    in_pairs::<144, 15, 20>(numbers, bytes, -1.0, |codes, block| {
        for (pair, out) in codes.chunks_exact(64).zip(block[16..].chunks_exact_mut(32)) {
            for (i, byte) in out.iter_mut().enumerate() {
                *byte = pair[i] | pair[i + 32] << 4;
            }
        }
    });
}

/// As Q4_K, with 32 bytes of fifth bits before the codes.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+f16c", "x86_64+avx2+f16c"))]
pub(crate) fn q5_k(numbers: &[f32], bytes: &mut [u8]) {
    in_pairs::<176, 31, 15>(numbers, bytes, -0.5, |codes, block| {
        let (fifth, low) = block[16..].split_at_mut(32);
        fifth.fill(0);
        for (number, (pair, out)) in codes.chunks_exact(64).zip(low.chunks_exact_mut(32)).enumerate() {
            for i in 0..32 {
                out[i] = pair[i] & 15 | (pair[i + 32] & 15) << 4;
                fifth[i] |= (pair[i] >> 4 | pair[i + 32] >> 4 << 1) << (2 * number);
            }
        }
    });
}

/// A magnitude below which a part counts as zeros.
const NOTHING: f32 = 1e-15;

/// Scale and codes of every lane's 16 numbers, such that `scale (q - 32)` is near them: of nineteen tries around what the farthest number says
/// the best, by its squares. A lane of zeros has the scale 0.
#[inline(always)]
fn scale_alone(x: &[Lanes; 16]) -> (Lanes, [[u8; LANES]; 16]) {
    let mut far: Lanes = [0.0; LANES];
    for x in x {
        far = lanes(|l| if x[l].abs() > far[l].abs() { x[l] } else { far[l] });
    }
    let code = |x: f32, inverse: f32| nearest(inverse * x).clamp(-32, 31);
    let sums = |inverse: &Lanes| {
        let (mut along, mut squares) = ([0.0; LANES], [0.0; LANES]);
        for x in x {
            for l in 0..LANES {
                let (q, w) = (code(x[l], inverse[l]) as f32, x[l] * x[l]);
                along[l] += w * x[l] * q;
                squares[l] += w * q * q;
            }
        }
        (along, squares)
    };
    let mut best_inverse = lanes(|l| -32.0 / far[l]);
    let (along, squares) = sums(&best_inverse);
    let mut scale = lanes(|l| if squares[l] == 0.0 { 0.0 } else { along[l] / squares[l] });
    let mut best = lanes(|l| scale[l] * along[l]);
    for attempt in (-9..=9).filter(|attempt| *attempt != 0) {
        let range = -(32.0 + 0.1 * attempt as f32);
        let inverse = lanes(|l| range / far[l]);
        let (along, squares) = sums(&inverse);
        let better: [bool; LANES] =
            std::array::from_fn(|l| squares[l] > 0.0 && along[l] * along[l] > best[l] * squares[l]);
        scale = lanes(|l| if better[l] { along[l] / squares[l] } else { scale[l] });
        best = lanes(|l| if better[l] { scale[l] * along[l] } else { best[l] });
        best_inverse = lanes(|l| if better[l] { inverse[l] } else { best_inverse[l] });
    }
    let nothing: [bool; LANES] = std::array::from_fn(|l| far[l].abs() < NOTHING);
    let codes = x
        .each_ref()
        .map(|x| std::array::from_fn(|l| if nothing[l] { 0 } else { (code(x[l], best_inverse[l]) + 32) as u8 }));
    (lanes(|l| if nothing[l] { 0.0 } else { scale[l] }), codes)
}

/// 128 bytes of 4 bits; 64 bytes of 2 bits; 16 i8 scales; f16 d: x = (d s) (q - 32), per 16.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+f16c", "x86_64+avx2+f16c"))]
pub(crate) fn q6_k(numbers: &[f32], bytes: &mut [u8]) {
    each::<256, 210>(numbers, bytes, |x, block| {
        let parts: [Lanes; 16] = std::array::from_fn(|i| lanes(|l| x[16 * l + i]));
        let (scales, found) = scale_alone(&parts);
        let far = scales.iter().fold(0.0f32, |far, &scale| if scale.abs() > far.abs() { scale } else { far });
        if far.abs() < NOTHING {
            return block.fill(0);
        }
        let inverse = -128.0 / far;
        put_half(block, 208, 1.0 / inverse);
        let d = f16::from_le_bytes([block[208], block[209]]).to_f32();
        let mut codes: [u8; 256] = std::array::from_fn(|i| found[i % 16][i / 16]);
        for (j, (x, codes)) in x.chunks_exact(16).zip(codes.chunks_exact_mut(16)).enumerate() {
            let eight_bits = nearest(inverse * scales[j]).min(127) as i8;
            block[192 + j] = eight_bits as u8;
            let d = d * f32::from(eight_bits);
            if d == 0.0 {
                continue;
            }
            for (code, x) in codes.iter_mut().zip(x) {
                *code = (nearest(x / d).clamp(-32, 31) + 32) as u8;
            }
        }
        let (low, high) = block.split_at_mut(128);
        for ((q, low), high) in
            codes.chunks_exact(128).zip(low.chunks_exact_mut(64)).zip(high[..64].chunks_exact_mut(32))
        {
            for i in 0..32 {
                low[i] = q[i] & 15 | (q[i + 64] & 15) << 4;
                low[i + 32] = q[i + 32] & 15 | (q[i + 96] & 15) << 4;
                high[i] = q[i] >> 4 | q[i + 32] >> 4 << 2 | q[i + 64] >> 4 << 4 | q[i + 96] >> 4 << 6;
            }
        }
    });
}
