//! GPUs by their published figures, and the processor at hand by a short measurement.

use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use super::speed::Machine;
use crate::model::ModelSpec;

/// A GPU by its data sheet.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Card {
    /// As it is typed.
    pub key: &'static str,
    /// As its maker calls it.
    pub name: &'static str,
    /// Memory, in MiB, as the driver reports it.
    mebibytes: u64,
    /// Dense bf16 products with fp32 sums, in TFLOP/s.
    teraflops: f64,
    /// Memory bandwidth, in TB/s.
    terabytes: f64,
    /// Part of the products' peak that FlashAttention-2 reaches forward: the newer tensor cores need another kernel for more.
    attention: f64,
}

/// Part of the published peak that large products reach (790 of 989 TFLOP/s were measured on an H200).
const OF_MATMUL: f64 = 0.8;
/// Part of the published bandwidth that a copy reaches (4.3 of 4.8 TB/s there).
const OF_BANDWIDTH: f64 = 0.9;
/// Backward's rate by forward's.
const BACKWARD: f64 = 0.8;
/// What the driver, the context and code take of a GPU's memory.
const OF_CONTEXT: u64 = 600 << 20;

const OLDER: f64 = 0.6;
const NEWER: f64 = 0.35;

/// Known GPUs, from their makers' data sheets.
pub const CARDS: &[Card] = &[
    Card { key: "b200", name: "B200", mebibytes: 183_359, teraflops: 2250.0, terabytes: 8.0, attention: 0.25 },
    Card { key: "h200", name: "H200", mebibytes: 143_771, teraflops: 989.0, terabytes: 4.8, attention: NEWER },
    Card { key: "h100", name: "H100 SXM", mebibytes: 81_559, teraflops: 989.0, terabytes: 3.35, attention: NEWER },
    Card { key: "h100-pcie", name: "H100 PCIe", mebibytes: 81_559, teraflops: 756.0, terabytes: 2.0, attention: NEWER },
    Card { key: "a100", name: "A100 80GB", mebibytes: 81_920, teraflops: 312.0, terabytes: 2.04, attention: OLDER },
    Card { key: "a100-40", name: "A100 40GB", mebibytes: 40_960, teraflops: 312.0, terabytes: 1.555, attention: OLDER },
    Card { key: "l40s", name: "L40S", mebibytes: 46_068, teraflops: 362.0, terabytes: 0.864, attention: OLDER },
    Card { key: "l4", name: "L4", mebibytes: 23_034, teraflops: 121.0, terabytes: 0.3, attention: OLDER },
    Card { key: "a10", name: "A10", mebibytes: 23_028, teraflops: 125.0, terabytes: 0.6, attention: OLDER },
    Card { key: "a6000", name: "RTX A6000", mebibytes: 49_140, teraflops: 155.0, terabytes: 0.768, attention: OLDER },
    Card { key: "5090", name: "RTX 5090", mebibytes: 32_607, teraflops: 209.5, terabytes: 1.79, attention: OLDER },
    Card { key: "4090", name: "RTX 4090", mebibytes: 24_564, teraflops: 165.2, terabytes: 1.008, attention: OLDER },
    Card { key: "3090", name: "RTX 3090", mebibytes: 24_576, teraflops: 71.0, terabytes: 0.936, attention: OLDER },
];

impl Card {
    /// The card of this key.
    ///
    /// # Errors
    /// A sentence that lists those known.
    pub fn find(key: &str) -> Result<Self, String> {
        let typed = key.to_lowercase();
        let known = || CARDS.iter().map(|card| card.key).collect::<Vec<_>>().join(", ");
        let found = CARDS.iter().find(|card| card.key == typed).copied();
        found.ok_or_else(|| format!("the GPUs whose figures are known are {}", known()))
    }

    /// The card that a driver calls so, as in `NVIDIA H100 80GB HBM3`.
    pub fn called(name: &str) -> Option<Self> {
        let words: Vec<String> = name.to_lowercase().split([' ', '-']).map(ToString::to_string).collect();
        let of = |card: &&Card| words.iter().any(|word| *word == card.key);
        let smaller = words.iter().any(|word| word == "40gb");
        let pcie = words.iter().any(|word| word == "pcie");
        let found = CARDS.iter().find(of)?;
        let other = match found.key {
            "a100" if smaller => "a100-40",
            "h100" if pcie => "h100-pcie",
            key => key,
        };
        CARDS.iter().find(|card| card.key == other).copied()
    }

    /// Bytes that a run may have of its memory.
    pub fn memory(&self) -> u64 {
        (self.mebibytes << 20) - OF_CONTEXT
    }

    /// How fast it is: its published figures, as far as programs reach them.
    pub fn machine(&self) -> Machine {
        let Self { name, teraflops, terabytes, attention, .. } = *self;
        let forward = teraflops * 1e12 * attention;
        Machine {
            name: name.into(),
            figures: format!(
                "{teraflops} TFLOP/s of bf16 products and {terabytes} TB/s as published, of which {:.0} % and {:.0} % are counted on",
                100.0 * OF_MATMUL,
                100.0 * OF_BANDWIDTH
            ),
            matmul: teraflops * 1e12 * OF_MATMUL,
            attention_forward: forward,
            attention_backward: BACKWARD * forward,
            bandwidth: terabytes * 1e12 * OF_BANDWIDTH,
        }
    }
}

/// Part of the products' rate that attention reaches on a CPU: blocks of 128 by 128 between which the softmax is made.
const CPU_ATTENTION: f64 = 0.3;

/// The processor at hand: products as large as the model's and copies, for less than a second in all.
pub fn measured(spec: &ModelSpec, kind: Kind) -> Machine {
    const PRODUCTS: Duration = Duration::from_millis(350);
    const COPIES: Duration = Duration::from_millis(150);
    let options = (kind, Device::Cpu);
    let width = spec.hidden_size.clamp(64, 4096);
    let (rows, inner, columns) = (512, width, (4 * width).min(8192));
    let x = Tensor::ones([rows, inner], options);
    let weight = Tensor::ones([columns, inner], options);
    let rate = |least: Duration, of_one: f64, run: &dyn Fn()| {
        run(); // what is compiled or taken once is not measured
        let (began, mut count) = (Instant::now(), 0u32);
        while count == 0 || began.elapsed() < least {
            run();
            count += 1;
        }
        f64::from(count) * of_one / began.elapsed().as_secs_f64()
    };
    let operations = 2.0 * (rows * inner * columns) as f64;
    let matmul = tch::no_grad(|| rate(PRODUCTS, operations, &|| drop(x.matmul(&weight.tr()))));
    let from = Tensor::ones([16 << 20], (Kind::Float, Device::Cpu));
    let to = from.empty_like();
    let bytes = 2.0 * 4.0 * f64::from(16 << 20);
    let bandwidth = tch::no_grad(|| rate(COPIES, bytes, &|| to.shallow_clone().copy_(&from)));
    Machine {
        name: super::device_name(Device::Cpu),
        figures: format!(
            "measured just now: {:.2} TFLOP/s of products of {rows} x {inner} x {columns}, copies at {:.1} GB/s",
            matmul / 1e12,
            bandwidth / 1e9
        ),
        matmul,
        attention_forward: CPU_ATTENTION * matmul,
        attention_backward: BACKWARD * CPU_ATTENTION * matmul,
        bandwidth,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_found_by_key_and_by_what_drivers_call_them() {
        assert_eq!(Card::find("H200").unwrap().name, "H200");
        let error = Card::find("gtx").unwrap_err();
        assert!(error.contains("a100, a100-40") && error.contains("4090"), "{error}");
        for (called, key) in [
            ("NVIDIA H200", Some("h200")),
            ("NVIDIA H100 80GB HBM3", Some("h100")),
            ("NVIDIA H100 PCIe", Some("h100-pcie")),
            ("NVIDIA A100-SXM4-40GB", Some("a100-40")),
            ("NVIDIA A100-SXM4-80GB", Some("a100")),
            ("NVIDIA GeForce RTX 4090", Some("4090")),
            ("NVIDIA GeForce GTX 1080", None),
        ] {
            assert_eq!(Card::called(called).map(|card| card.key), key, "{called}");
        }
        assert!((149e9..151e9).contains(&(Card::find("h200").unwrap().memory() as f64)));
    }
}
