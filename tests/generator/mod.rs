//! The numbers of the small models, made from a tensor's name and an element's index alone.

/// A table of whole numbers from 0 to `limit`, exclusive: each row of `columns` begins where the generator says, and counts on.
#[allow(dead_code)]
pub fn whole_numbers(name: &str, rows: usize, columns: usize, limit: i64) -> Vec<i64> {
    let element = |row: usize, column: usize| ((bits(name, (row * columns) as u64) as i64) + column as i64) % limit;
    (0..rows).flat_map(|row| (0..columns).map(move |column| element(row, column))).collect()
}

/// The generator of `families.py`: a hash of the name and the index, in [-1, 1), scaled and shifted with one rounding each.
pub fn values(name: &str, count: usize, offset: f32, scale: f32) -> Vec<f32> {
    (0..count as u64).map(|index| offset + scale * (bits(name, index) as f32 / 8_388_608.0 - 1.0)).collect()
}

/// The 24 bits of an element.
fn bits(name: &str, index: u64) -> u64 {
    let seed = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let step = 0x9e37_79b9_7f4a_7c15u64;
    let z = seed.wrapping_add(index.wrapping_mul(step)).wrapping_add(step);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) >> 40
}
