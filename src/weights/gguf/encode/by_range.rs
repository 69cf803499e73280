//! Formats whose scales follow from a block's range: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

use multiversion::multiversion;

use super::{LANES, each, inverse, lanes, nearest, put_half};

/// The largest magnitude.
#[inline(always)]
fn largest(x: &[f32; 32]) -> f32 {
    // Magnitudes are in the order of their bits.
    f32::from_bits(x.iter().fold(0, |largest, x| largest.max(x.to_bits() & 0x7fff_ffff)))
}

/// The first of the numbers with the largest magnitude; 0 of zeros, whatever their sign.
#[inline(always)]
fn farthest(x: &[f32; 32]) -> f32 {
    let (least, most) = range(x);
    if least == 0.0 && most == 0.0 {
        0.0
    } else if most > -least {
        most
    } else if most < -least {
        least
    } else {
        x.iter().copied().find(|x| x.abs() == most).unwrap_or(0.0)
    }
}

/// The smallest and the largest: of equal ones, which only zeros show, the first.
#[inline(always)]
fn range(x: &[f32; 32]) -> (f32, f32) {
    let less = |a: f32, b: f32| if b < a { b } else { a };
    let more = |a: f32, b: f32| if b > a { b } else { a };
    let mut least = lanes(|l| less(x[l], x[l + LANES]));
    let mut most = lanes(|l| more(x[l], x[l + LANES]));
    for half in [8, 4, 2, 1] {
        for l in 0..half {
            least[l] = less(least[l], least[l + half]);
            most[l] = more(most[l], most[l + half]);
        }
    }
    let first = |number: f32| match number == 0.0 {
        true => x.iter().copied().find(|x| *x == 0.0).unwrap_or(number),
        false => number,
    };
    (first(least[0]), first(most[0]))
}

/// The lower four bits of 32 codes, those of the first half below those of the second.
#[inline(always)]
fn nibbles(codes: &[u8; 32], to: &mut [u8; 16]) {
    for i in 0..16 {
        to[i] = (codes[i] & 15) | codes[i + 16] << 4;
    }
}

/// The fifth bits of 32 codes.
#[inline(always)]
fn fifth(codes: &[u8; 32]) -> [u8; 4] {
    let mut bits = [0; 4];
    for (bits, codes) in bits.iter_mut().zip(codes.as_chunks().0) {
        // The product moves the lowest bit of byte i to bit 56 + i.
        let lowest = u64::from_le_bytes(*codes) >> 4 & 0x0101_0101_0101_0101;
        *bits = (lowest.wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8;
    }
    bits
}

macro_rules! kernel {
    ($(#[$doc:meta])* $name:ident, $values:literal, $bytes:literal, $each:expr) => {
        $(#[$doc])*
        #[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+avx512dq+avx2+f16c", "x86_64+avx2+f16c"))]
        pub(crate) fn $name(numbers: &[f32], bytes: &mut [u8]) {
            each::<$values, $bytes>(numbers, bytes, $each);
        }
    };
}

kernel!(
    /// f16 d; 32 i8: q = round(x / d), d = largest / 127.
    q8_0, 32, 34, |x, block| {
        let d = largest(x) / 127.0;
        let inverse = inverse(d);
        put_half(block, 0, d);
        for (q, x) in block[2..].iter_mut().zip(x) {
            *q = half_away(x * inverse) as i8 as u8;
        }
    }
);

/// The nearest whole number, of two the one farther from zero, of one of a magnitude below 2^22.
#[inline(always)]
fn half_away(x: f32) -> i32 {
    let whole = x.trunc();
    let rest = x - whole;
    nearest(if rest >= 0.5 {
        whole + 1.0
    } else if rest <= -0.5 {
        whole - 1.0
    } else {
        whole
    })
}

/// Codes `min(largest, x / d + largest / 2 + 1/2)`, rounded down, with d = farthest / -(largest + 1) * 2.
#[inline(always)]
fn around_zero<const MOST: i32>(x: &[f32; 32]) -> (f32, [u8; 32]) {
    let middle = (MOST + 1) / 2;
    let d = farthest(x) / -middle as f32;
    let inverse = inverse(d);
    let mut codes = [0; 32];
    for (code, x) in codes.iter_mut().zip(x) {
        *code = nearest((x * inverse + (middle as f32 + 0.5)).trunc()).min(MOST) as u8;
    }
    (d, codes)
}

/// Codes `(x - least) / d`, rounded, with d = (most - least) / MOST.
#[inline(always)]
fn above_least<const MOST: i32>(x: &[f32; 32]) -> (f32, f32, [u8; 32]) {
    let (least, most) = range(x);
    let d = (most - least) / MOST as f32;
    let inverse = inverse(d);
    let mut codes = [0; 32];
    for (code, x) in codes.iter_mut().zip(x) {
        *code = nearest(((x - least) * inverse + 0.5).trunc()).min(MOST) as u8;
    }
    (d, least, codes)
}

kernel!(
    /// f16 d; 16 bytes, low nibbles the first half: q = x / d + 8.
    q4_0, 32, 18, |x, block| {
        let (d, codes) = around_zero::<15>(x);
        put_half(block, 0, d);
        nibbles(&codes, block.last_chunk_mut().expect("sixteen bytes of codes"));
    }
);

kernel!(
    /// f16 d, m; 16 bytes: q = (x - m) / d.
    q4_1, 32, 20, |x, block| {
        let (d, least, codes) = above_least::<15>(x);
        put_half(block, 0, d);
        put_half(block, 2, least);
        nibbles(&codes, block.last_chunk_mut().expect("sixteen bytes of codes"));
    }
);

kernel!(
    /// f16 d; 32 fifth bits; 16 bytes: q = x / d + 16.
    q5_0, 32, 22, |x, block| {
        let (d, codes) = around_zero::<31>(x);
        put_half(block, 0, d);
        block[2..6].copy_from_slice(&fifth(&codes));
        nibbles(&codes, block.last_chunk_mut().expect("sixteen bytes of codes"));
    }
);

kernel!(
    /// f16 d, m; 32 fifth bits; 16 bytes: q = (x - m) / d.
    q5_1, 32, 24, |x, block| {
        let (d, least, codes) = above_least::<31>(x);
        put_half(block, 0, d);
        put_half(block, 2, least);
        block[4..8].copy_from_slice(&fifth(&codes));
        nibbles(&codes, block.last_chunk_mut().expect("sixteen bytes of codes"));
    }
);
