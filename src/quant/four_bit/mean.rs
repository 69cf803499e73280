//! A mean in one order of sums, whatever the device and the number of threads: that of torch on one thread of a CPU.

/// Numbers that are summed side by side: a vector of AVX2, which torch sums with on wider processors, too.
const LANES: usize = 8;
/// Vectors that are summed side by side.
const ROWS: usize = 4;
/// Sums of sums: each level adds up what a run of the one before it came to.
const LEVELS: usize = 4;

type Vector = [f32; LANES];

/// The mean as torch has it (`Tensor::mean`), bit for bit: a cascade of sums, so that the error of a long one stays small.
pub(super) fn of(values: &[f32]) -> f32 {
    let (vectors, rest) = values.as_chunks::<LANES>();
    let sum = match (vectors, rest.as_chunks::<ROWS>()) {
        ([], ([[a, b, c, d]], few)) => few.iter().fold(*a, |sum, value| sum + value) + b + c + d,
        _ => rest.iter().chain(&sum_of_vectors(vectors)).fold(0.0, |sum, value| sum + value),
    };
    sum / values.len() as f32
}

fn sum_of_vectors(vectors: &[Vector]) -> Vector {
    let (rows, rest) = vectors.as_chunks::<ROWS>();
    let mut sums = cascade(rows);
    rest.iter().for_each(|vector| add(&mut sums[0], vector));
    let [mut sum, others @ ..] = sums;
    others.iter().for_each(|other| add(&mut sum, other));
    sum
}

/// The sums of each of the four columns of vectors.
fn cascade(rows: &[[Vector; ROWS]]) -> [Vector; ROWS] {
    let log = rows.len().max(1).next_power_of_two().trailing_zeros() as usize;
    let power = (log / LEVELS).max(4);
    let (step, mask) = (1 << power, (1 << power) - 1);
    let mut levels = [[[0f32; LANES]; ROWS]; LEVELS];
    let steps = rows.chunks_exact(step);
    let rest = steps.remainder();
    for (number, run) in steps.enumerate() {
        run.iter().for_each(|row| add_all(&mut levels[0], row));
        let done = (number + 1) * step;
        for level in 1..LEVELS {
            let below = std::mem::replace(&mut levels[level - 1], [[0f32; LANES]; ROWS]);
            add_all(&mut levels[level], &below);
            if done & (mask << (level * power)) != 0 {
                break;
            }
        }
    }
    let [mut sums, higher @ ..] = levels;
    rest.iter().for_each(|row| add_all(&mut sums, row));
    higher.iter().for_each(|level| add_all(&mut sums, level));
    sums
}

fn add_all(sums: &mut [Vector; ROWS], row: &[Vector; ROWS]) {
    sums.iter_mut().zip(row).for_each(|(sum, vector)| add(sum, vector));
}

fn add(sum: &mut Vector, vector: &Vector) {
    sum.iter_mut().zip(vector).for_each(|(sum, value)| *sum += value);
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    /// Below 32768 numbers torch sums in one thread, however many there are.
    #[test]
    fn it_is_the_mean_that_torch_makes_in_one_thread() {
        tch::manual_seed(29);
        for n in [1, 7, 8, 31, 32, 33, 511, 512, 513, 2047, 4096 + 17, 16_384, 21_111, 32_767] {
            let values = Tensor::randn([n], (Kind::Float, Device::Cpu)).exp();
            let found = super::of(&Vec::<f32>::try_from(&values).unwrap());
            let expected = values.mean(Kind::Float).double_value(&[]) as f32;
            assert_eq!(found.to_bits(), expected.to_bits(), "{n} numbers: {found} is not {expected}");
        }
    }

    /// What `torch.tensor(values).mean()` is after `torch.set_num_threads(1)` (torch 2.11), for numbers `(1 + (i * i) % 1009) / 1009`.
    #[test]
    fn so_it_is_of_more_numbers() {
        for (n, expected) in EXPECTED {
            let values: Vec<f32> = (0..n).map(|i| (1 + i * i % 1009) as f32 / 1009.0).collect();
            assert_eq!(super::of(&values).to_bits(), expected, "{n} numbers");
        }
    }

    const EXPECTED: [(u64, u32); 4] =
        [(32_768, 0x3f00_1b22), (65_536, 0x3f00_27e3), (300_007, 0x3f00_1f66), (3_000_017, 0x3f00_205e)];
}
