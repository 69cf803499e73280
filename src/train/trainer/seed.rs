//! Seeds without a generator.

/// A seed of its own for every micro-batch of a run: a counter hashed (SplitMix64), so there is no generator whose state to save.
pub(super) fn dropout_seed(seed: u64, step: u64, micro_batch: u64) -> u64 {
    [step, micro_batch].into_iter().fold(mix(seed), |hash, counter| mix(hash ^ counter))
}

pub(super) fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_micro_batch_has_a_seed_of_its_own() {
        let mut seeds: Vec<u64> =
            (0..200).flat_map(|step| (0..8).map(move |index| dropout_seed(42, step, index))).collect();
        seeds.extend((0..200).map(|step| dropout_seed(43, step, 0)));
        let count = seeds.len();
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!(seeds.len(), count);
    }
}
