//! Against what bitsandbytes makes of the same tensors (`tests/python/bnb_quants.py`), and kernels against their twins.

use std::collections::BTreeMap;

use tch::{Device, Kind, Tensor};

use super::*;

fn golden() -> BTreeMap<String, Tensor> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/bnb_quants.safetensors");
    Tensor::read_safetensors(path).expect("the fixture is committed").into_iter().collect()
}

/// Bit for bit: -0 is not 0.
pub(in crate::quant) fn assert_same(found: &Tensor, expected: &Tensor, what: &str) {
    assert_eq!((found.kind(), found.numel()), (expected.kind(), expected.numel()), "{what}");
    let bits = |t: &Tensor| {
        let t = t.contiguous().view([-1]);
        match t.kind() {
            Kind::Float => t.view_dtype(Kind::Int),
            Kind::Half | Kind::BFloat16 => t.view_dtype(Kind::Int16),
            _ => t,
        }
        .to_kind(Kind::Int64)
    };
    let wrong = bits(found).ne_tensor(&bits(expected)).to_kind(Kind::Int64);
    let count = wrong.sum(Kind::Int64).int64_value(&[]);
    let first = wrong.argmax(None, false).int64_value(&[]);
    let at = |t: &Tensor| t.contiguous().view([-1]).to_kind(Kind::Double).double_value(&[first]);
    assert!(count == 0, "{what}: {count} differ, the first at {first}: {:e} is not {:e}", at(found), at(expected));
}

fn flat(tensor: &Tensor) -> Tensor {
    tensor.contiguous().view([-1])
}

#[test]
fn codes_magnitudes_and_numbers_are_those_of_bitsandbytes() {
    let golden = golden();
    let mut compared = 0;
    for (name, packed) in golden.iter().filter(|(name, _)| name.ends_with(".packed")) {
        let place = name.strip_suffix(".packed").unwrap();
        let mut parts = place.split('.');
        let tensor = &golden[parts.next().unwrap()];
        let code = if parts.next() == Some("nf4") { FourBitType::Nf4 } else { FourBitType::Fp4 };
        let block = parts.next().unwrap().parse().unwrap();
        let nested = parts.next().is_some();
        let mut found = FourBit::of(tensor, code, block, nested);
        assert_same(&found.codes, &flat(packed), name);
        match &found.absmax {
            Absmax::Plain(absmax) => assert_same(absmax, &golden[&format!("{place}.absmax")], name),
            Absmax::Nested { codes, absmax, offset, map } => {
                assert_same(codes, &golden[&format!("{place}.absmax")], name);
                assert_same(absmax, &golden[&format!("{place}.nested_absmax")], name);
                assert_same(&Tensor::from_slice(&[*offset]), &golden[&format!("{place}.nested_offset")], name);
                assert_same(map, &golden["dynamic.code"], "the dynamic map");
            }
        }
        for (short, kind) in [("f32", Kind::Float), ("f16", Kind::Half), ("bf16", Kind::BFloat16)] {
            // bitsandbytes rounds with an instruction of AVX-512 that takes denormal numbers for zero, where the processor has it.
            let stored = if place.starts_with("denormal") { "f32" } else { short };
            let expected = &golden[&format!("{place}.{stored}")].to_kind(kind);
            (found.stored, found.kind) = (kind, kind);
            assert_same(&found.dequantised(), expected, &format!("{place} as {short}"));
            assert_same(&found.dequantised_plainly(), expected, &format!("{place} as {short}, plainly"));
        }
        compared += 1;
    }
    assert!(compared > 40, "{compared} cases");
}

#[test]
fn code_books_are_those_of_bitsandbytes() {
    let golden = golden();
    for code in [FourBitType::Nf4, FourBitType::Fp4] {
        assert_same(&Tensor::from_slice(code.values()), &golden[&format!("{code}.code")], "code book");
    }
}

#[test]
fn kernels_equal_their_twins_at_every_block_size() {
    tch::manual_seed(3);
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        for block in BLOCKS {
            for n in [1, 31, 2 * block - 1, 2 * block, 3 * block + 33] {
                let values = Tensor::randn([n], (Kind::Float, Device::Cpu)).to_kind(kind);
                for code in [FourBitType::Nf4, FourBitType::Fp4] {
                    let what = format!("{code} {kind:?} block {block}, {n} numbers");
                    let (codes, absmax) = quantise_plainly(&values, code, block);
                    let found = FourBit::of(&values, code, block, false);
                    assert_same(&found.codes, &flat(&codes), &what);
                    let Absmax::Plain(own) = &found.absmax else { unreachable!("not asked for double quantisation") };
                    assert_same(own, &absmax, &what);
                    assert_same(&found.dequantised(), &found.dequantised_plainly(), &what);
                }
            }
        }
    }
}
