//! The numbers of the small models, made from a tensor's name and an element's index alone.

/// The generator of `families.py`: a hash of the name and the index, in [-1, 1), scaled and shifted with one rounding each.
pub fn values(name: &str, count: usize, offset: f32, scale: f32) -> Vec<f32> {
    let seed = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let step = 0x9e37_79b9_7f4a_7c15u64;
    let element = |index: u64| {
        let z = seed.wrapping_add(index.wrapping_mul(step)).wrapping_add(step);
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let u = ((z ^ (z >> 31)) >> 40) as f32 / 8_388_608.0 - 1.0;
        offset + scale * u
    };
    (0..count as u64).map(element).collect()
}
