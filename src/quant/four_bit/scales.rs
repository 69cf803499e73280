//! The scales of four-bit blocks in eight bits, as bitsandbytes makes them on the CPU: by a table, not by the nearest code.

use std::sync::OnceLock;

use tch::{Kind, Tensor};

use super::super::dynamic;

/// What the 256 codes stand for, in rising order.
pub(super) fn codes() -> &'static [f32; 256] {
    static CODES: OnceLock<[f32; 256]> = OnceLock::new();
    CODES.get_or_init(|| dynamic::codes(true))
}

/// Nearest codes of the numbers from -1 to 1 in steps of 2/65535.
///
/// bitsandbytes on the CPU looks codes up in such a table, so that a number between two codes may get the farther one where they are
/// closer than a step.
fn nearest() -> &'static [u8; 1 << 16] {
    static NEAREST: OnceLock<Box<[u8; 1 << 16]>> = OnceLock::new();
    NEAREST.get_or_init(|| {
        let map = codes();
        let mut code = 0;
        let found = (0..1u32 << 16).map(|i| {
            let value = -1.0 + (2.0 * i as f32) / 65_535.0;
            while code < 255 && 0.5 * (map[code] + map[code + 1]) < value {
                code += 1;
            }
            code as u8
        });
        found.collect::<Vec<u8>>().try_into().expect("as many as were counted")
    })
}

/// Codes (n) u8 of fp32 numbers (n), and the largest magnitude of each block (blocks), as bitsandbytes' `quantize_blockwise` makes
/// them on the CPU.
pub fn quantise(values: &Tensor, block: i64) -> (Tensor, Tensor) {
    let n = values.numel() as i64;
    let blocks = (n + block - 1) / block;
    let rows = values.constant_pad_nd([0, blocks * block - n]).view([blocks, block]);
    let absmax = rows.abs().amax([1], false); // (blocks)
    // A block of zeros has no scale and gets the code 0, whatever that stands for: its scale makes it zero again.
    let scaled = (rows * absmax.reciprocal().unsqueeze(1)).clamp(-1.0, 1.0);
    let place = ((scaled + 1.0) * 0.5 * 65_535.0 + 0.5).nan_to_num(0.0, 0.0, 0.0).to_kind(Kind::Int);
    let table = Tensor::from_slice(nearest()).to_device(values.device());
    let codes = table.index_select(0, &place.view([-1]).narrow(0, 0, n));
    (codes, absmax)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn a_block_of_zeros_stays_zero() {
        let values =
            Tensor::cat(&[Tensor::zeros([4], (Kind::Float, Device::Cpu)), Tensor::from_slice(&[0.5f32, -1.0])], 0);
        let (codes, absmax) = quantise(&values, 4);
        assert_eq!(Vec::<f32>::try_from(absmax).unwrap(), [0.0, 1.0]);
        assert_eq!(Vec::<u8>::try_from(codes.narrow(0, 0, 4)).unwrap(), [0; 4]);
    }
}
