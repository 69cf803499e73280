//! How A starts where it is drawn. Every number is a function of the seed, the module's name and its place in A, so neither the order of the
//! modules nor the number of threads changes it, and adding a module leaves the others as they were.

use sha2::{Digest, Sha256};

use crate::recipe::InitLora;
use crate::torch_ext::filled;
use tch::Tensor;

/// A (R, in), fp32 on the CPU, without gradient.
///
/// Of a start that is taken from the weight ([`super::decompose`]), the numbers that its subspace iteration begins with.
///
/// Kaiming is uniform in +-1/sqrt(in), what `kaiming_uniform_(a=sqrt(5))` comes to and PEFT's default; gaussian is normal with
/// standard deviation 1/r, PEFT's `gaussian`.
pub fn start(init: InitLora, seed: u64, module: &str, (r, columns): (i64, i64)) -> Tensor {
    let key = key(seed, module);
    let width = columns as usize;
    filled(&[r, columns], |rows, numbers: &mut [f32]| {
        let first = (rows.start * width) as u64;
        for (index, number) in (first..).zip(numbers) {
            *number = match init {
                InitLora::Kaiming => uniform(key, index) / (columns as f32).sqrt(),
                InitLora::Gaussian => normal(key, index) / r as f32,
                InitLora::Pissa | InitLora::Olora | InitLora::Loftq => normal(key, index),
            };
        }
    }) // (R, in)
}

/// The generator's key: the first 8 bytes of SHA-256 over the seed and the name.
fn key(seed: u64, module: &str) -> [u32; 2] {
    let digest = Sha256::new().chain_update(seed.to_le_bytes()).chain_update(module).finalize();
    let word = |at: usize| u32::from_le_bytes([digest[at], digest[at + 1], digest[at + 2], digest[at + 3]]);
    [word(0), word(4)]
}

/// Uniform in [-1, 1): 24 random bits, as many as an f32 holds.
fn uniform(key: [u32; 2], index: u64) -> f32 {
    let bits = philox([index as u32, (index >> 32) as u32, 0, 0], key)[0] >> 8;
    bits as f32 * (2.0 / 16_777_216.0) - 1.0
}

/// Normal, by Box and Muller's transform in f64.
fn normal(key: [u32; 2], index: u64) -> f32 {
    let [a, b, ..] = philox([index as u32, (index >> 32) as u32, 1, 0], key);
    // Never 0, whose logarithm is infinite.
    let radius = (-2.0 * ((f64::from(a) + 0.5) / 4_294_967_296.0).ln()).sqrt();
    (radius * (std::f64::consts::TAU * f64::from(b) / 4_294_967_296.0).cos()) as f32
}

/// Philox4x32-10, a counter-based generator: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let a = u64::from(counter[0]) * 0xD251_1F53;
        let b = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [(b >> 32) as u32 ^ counter[1] ^ key[0], b as u32, (a >> 32) as u32 ^ counter[3] ^ key[1], a as u32];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Kind;

    #[test]
    fn philox_gives_the_published_numbers() {
        // kat_vectors of Random123.
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let counter = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(philox(counter, [0xa409_3822, 0x299f_31d0]), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn numbers_follow_the_seed_and_the_name_only() {
        let a = start(InitLora::Kaiming, 1, "model.layers.0.q_proj", (16, 4000));
        assert_eq!(a, start(InitLora::Kaiming, 1, "model.layers.0.q_proj", (16, 4000)));
        assert_ne!(a, start(InitLora::Kaiming, 2, "model.layers.0.q_proj", (16, 4000)));
        assert_ne!(a, start(InitLora::Kaiming, 1, "model.layers.1.q_proj", (16, 4000)));
        // One after the other, as no thread would.
        let key = key(1, "model.layers.0.q_proj");
        let serial: Vec<f32> = (0..64_000).map(|index| uniform(key, index) / 4000f32.sqrt()).collect();
        assert_eq!(a.flatten(0, 1), Tensor::from_slice(&serial));
    }

    #[test]
    fn distributions_are_pefts() {
        let moments = |a: &Tensor| {
            let a = a.to_kind(Kind::Double);
            (a.mean(Kind::Double).double_value(&[]), a.std(true).double_value(&[]), a.abs().max().double_value(&[]))
        };
        let (mean, std, largest) = moments(&start(InitLora::Kaiming, 3, "x", (64, 2500)));
        assert!(mean.abs() < 1e-4, "{mean}");
        assert!((std - 0.02 / 3f64.sqrt()).abs() < 1e-4, "{std}");
        assert!(largest <= 0.02 && largest > 0.0199, "{largest}");
        let (mean, std, largest) = moments(&start(InitLora::Gaussian, 3, "x", (64, 2500)));
        assert!(mean.abs() < 2e-4, "{mean}");
        assert!((std * 64.0 - 1.0).abs() < 0.01, "{std}");
        assert!(largest * 64.0 > 4.0 && largest * 64.0 < 6.0, "{largest}");
    }
}
