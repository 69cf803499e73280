//! That every kernel compiles, and that those of the block equal their twins on the GPU that tests emulate and on a real one. (Those of
//! `quant` are compared beside their formats.)

use tch::{Device, Kind, Tensor};

use super::compiler::{Compiler, Target};
use super::emulator::{names, on_gpus, plainly};
use super::*;
use crate::ops::LogitMap;
use crate::ops::cross_entropy::softmax;
use crate::ops::norm::tests::frozen;
use crate::ops::rope::{RopeLayout, Rotation};
use crate::ops::testing::randn;
use crate::ops::{Activation, Norm};
use crate::torch_ext;

/// NVRTC; nothing, said so, where it is not. A libtorch with CUDA brings it.
fn compiler() -> Option<Compiler> {
    let has_cuda = torch_ext::libtorch_folder().is_some_and(|folder| folder.join("libtorch_cuda.so").exists());
    match Compiler::find() {
        Ok(compiler) => Some(compiler),
        Err(error) if !has_cuda => {
            eprintln!("no kernel was compiled: {error}");
            None
        }
        Err(error) => panic!("libtorch has CUDA, and yet {error}"),
    }
}

#[test]
fn every_kernel_compiles_for_each_architecture_and_keeps_to_registers() {
    let Some(compiler) = compiler() else { return };
    for source in &SOURCES {
        for architecture in [80, 86, 89, 90, 100, 120] {
            let target = compiler.target(architecture).unwrap();
            assert_eq!(target, Target::Machine(architecture));
            let compiled = compiler.compile(source, target, &["--ptxas-options=-v"]).unwrap();
            let what = format!("{} for {}", source.file, target.name());
            assert!(compiled.image.starts_with(b"\x7fELF"), "{what} is machine code");
            for name in names(source) {
                let section = format!(".text.{name}");
                let there = compiled.image.windows(section.len()).any(|window| window == section.as_bytes());
                assert!(there, "{what} has {name}");
            }
            let spills: Vec<&str> = compiled.log.lines().filter(|line| line.contains("spill stores")).collect();
            assert_eq!(spills.len(), names(source).count(), "{what}: {}", compiled.log);
            let none = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";
            assert!(spills.iter().all(|line| line.contains(none)), "{what}: {}", compiled.log);
        }
    }
}

/// A kernel's assembly for each of its names.
fn assembly(compiler: &Compiler, source: &Source) -> Vec<(String, String)> {
    let image = compiler.compile(source, Target::Assembly(80), &[]).unwrap().image;
    let text = String::from_utf8(image).unwrap();
    let entries = text.split(".entry ").skip(1);
    entries.map(|entry| (entry.split('(').next().unwrap_or_default().to_string(), entry.to_string())).collect()
}

/// Loads and stores that the compiler took apart cost a good part of the memory's speed.
#[test]
fn kernels_read_and_write_sixteen_bytes_at_a_time() {
    let Some(compiler) = compiler() else { return };
    let mut looked_at = 0;
    for source in &SOURCES {
        for (name, text) in assembly(&compiler, source) {
            // Codes come by as many as fill sixteen bytes of numbers, and go by four or eight bytes.
            let codes = ["int8_", "fp8_dequantise", "grouped_", "mxfp4_"].iter().any(|own| name.starts_with(own));
            let reads = codes || text.contains("ld.global.v4") || text.contains("ld.global.nc.v4");
            let writes = name.contains("_quantise_") || text.contains("st.global.v4");
            assert!(reads && writes || name.contains("_odd_"), "{name}");
            if name.starts_with("four_bit_dequantise_bf16") {
                assert_eq!(text.matches("st.global.v4").count(), 4, "{name}: a store for each of four rounds");
            }
            looked_at += 1;
        }
    }
    assert_eq!(looked_at, SOURCES.iter().map(|source| names(source).count()).sum::<usize>());
}

/// Bit exactness hangs on it: a fused multiply-add rounds once where the CPU rounds twice.
#[test]
fn exact_kernels_have_no_fused_multiply_add_and_flush_no_denormals() {
    let Some(compiler) = compiler() else { return };
    for source in &SOURCES {
        let all = assembly(&compiler, source);
        if source.options == IEEE {
            // What is looked for is spelled so.
            assert!(all.iter().any(|(_, text)| text.contains("fma.rn.f32")), "{}", source.file);
            continue;
        }
        // A division to the last bit is made of them, so what quantises is not looked at.
        for (name, text) in all.iter().filter(|(name, _)| !name.contains("_quantise_")) {
            assert!(text.contains("mul.rn.f32") || text.contains("mul.f32"), "{name}");
            assert!(!text.contains("fma.") && !text.contains(".ftz"), "{name}");
        }
    }
}

#[test]
fn an_error_in_a_kernel_is_told_with_its_place() {
    let Some(compiler) = compiler() else { return };
    let broken = Source {
        text: "#line 7 \"broken.cu\"\nint f() { return x; }\n",
        file: "broken.cu",
        options: IEEE,
        kernels: &[],
    };
    let error = compiler.compile(&broken, Target::Machine(90), &[]).map(drop).unwrap_err().to_string();
    assert!(error.contains("broken.cu(7)") && error.contains("\"x\""), "{error}");
}

#[test]
fn a_device_newer_than_the_compiler_gets_assembly_and_an_older_one_an_error() {
    let compiler = Compiler::for_tests((13, 0));
    assert_eq!(compiler.target(90).unwrap(), Target::Machine(90));
    assert_eq!(compiler.target(103).unwrap(), Target::Assembly(90));
    assert_eq!(compiler.target(150).unwrap(), Target::Assembly(120));
    let error = compiler.target(70).unwrap_err().to_string();
    assert!(error.contains("sm_70") && error.contains("13.0"), "{error}");
}

/// What a machine without a driver sees, once; operations then stay libtorch's.
#[test]
fn without_a_driver_preparing_says_so_and_no_kernel_serves() {
    if std::path::Path::new("/proc/driver/nvidia/version").exists() {
        return eprintln!("this machine has a driver: what is said without one was not looked at");
    }
    let folder = tempfile::tempdir().unwrap();
    assert!(prepare(Device::Cpu, folder.path(), &|_, _| ()).is_ok());
    let error = prepare(Device::Cuda(0), folder.path(), &|_, _| ()).unwrap_err();
    assert_eq!(error.exit_code(), 8);
    assert!(error.to_string().contains("libcuda.so.1") && error.to_string().contains("help: "), "{error}");
    assert!(!device::is_prepared(Device::Cuda(0)));
    assert!(prepare(Device::Cuda(1000), folder.path(), &|_, _| ()).unwrap_err().to_string().contains("1000"));
}

/// Largest difference from numbers in fp32, as a share of the larger of a number and `floor`.
fn off(found: &Tensor, expected: &Tensor, floor: f64) -> f64 {
    let found = found.to_device(Device::Cpu).to_kind(Kind::Double);
    let expected = expected.to_device(Device::Cpu).to_kind(Kind::Double);
    assert_eq!(found.size(), expected.size());
    ((found - &expected).abs() / expected.abs().clamp_min(floor)).max().double_value(&[])
}

/// Half of the distance between neighbours, and what fp32 leaves behind before that rounding.
fn tolerance(kind: Kind) -> f64 {
    match kind {
        Kind::BFloat16 => 0.5f64.powi(8) + 2e-5,
        Kind::Half => 0.5f64.powi(11) + 2e-5,
        _ => 2e-5,
    }
}

const KINDS: [Kind; 3] = [Kind::Float, Kind::BFloat16, Kind::Half];

/// A number of a kind, and in fp32 what it stands for.
fn both(shape: &[i64], seed: u64, kind: Kind) -> (Tensor, Tensor) {
    let narrow = randn(shape, seed).to_kind(kind);
    let wide = narrow.to_kind(Kind::Float);
    (narrow, wide)
}

/// A few numbers to a row, a warp's, a block's, and widths that are no multiple of sixteen bytes; rows that do not fill the last block.
#[test]
fn norms_equal_their_twins_at_every_width() {
    for kind in KINDS {
        for (rows, width, turns) in [(9, 4, 3), (5, 35, 1), (6, 128, 2), (3, 576, 1), (2, 4104, 1), (2, 4099, 1)] {
            for (centred, biased) in [(false, false), (true, true), (true, false)] {
                let ((x, wide_x), (dy, wide_dy)) = (both(&[rows, width], 1, kind), both(&[rows, width], 2, kind));
                let norm = |device| {
                    let weight = (randn(&[turns, width], 3) * 0.2 + 1.0).to_device(device);
                    frozen(weight, biased.then(|| randn(&[width], 4).to_device(device)), 1e-5, centred)
                };
                let (y, stats) = plainly(|| norm(Device::Cpu).forward(&wide_x));
                let dx = plainly(|| norm(Device::Cpu).backward(&wide_dy, &wide_x, &stats, None));
                // The same of a sum, as it is rounded, and with a gradient added that comes another way.
                let ((given, wide_given), (more, wide_more)) =
                    (both(&[rows, width], 5, kind), both(&[rows, width], 6, kind));
                let sum = (&wide_x + &wide_given * 0.3).to_kind(kind).to_kind(Kind::Float);
                let (y_of_sum, _) = plainly(|| norm(Device::Cpu).forward(&sum));
                on_gpus(|device| {
                    let (x, dy, norm) = (x.to_device(device), dy.to_device(device), norm(device));
                    let what = format!("{rows} x {width}, {turns} turns, centred {centred}, {kind:?} on {device:?}");
                    let (own_y, own_stats) = cuda_norm(&norm, &x);
                    assert!(off(&own_stats, &stats, 1e-3) < 2e-5, "statistics, {what}");
                    assert!(off(&own_y, &y, 0.1) < tolerance(kind), "y, {what}: {:e}", off(&own_y, &y, 0.1));
                    let again = norm_again(&x, &norm.weight, norm.bias.as_ref(), &own_stats);
                    assert!(again.equal(&own_y), "y again, {what}");
                    let back = |more| norm_backward(&dy, &x, &norm.weight, &own_stats, centred, more);
                    let own_dx = back(None);
                    assert!(off(&own_dx, &dx, 0.1) < 2.0 * tolerance(kind), "dx, {what}: {:e}", off(&own_dx, &dx, 0.1));
                    let (given, more) = (given.to_device(device), more.to_device(device));
                    let with_more = off(&back(Some(&more)), &(&dx + &wide_more), 0.1);
                    assert!(with_more < 2.0 * tolerance(kind), "dx and more, {what}: {with_more:e}");
                    let given = Some((&given, 0.3));
                    let (own_sum, own_y, _) =
                        super::norm(&x, given, &norm.weight, norm.bias.as_ref(), norm.eps, norm.centred);
                    let own_sum = own_sum.expect("something is given");
                    assert!(off(&own_sum, &sum, 0.1) < 2.0 * tolerance(kind), "the sum, {what}");
                    // Where the sum is rounded otherwise, by a bit, so is what is made of it.
                    let sum_off = off(&own_y, &y_of_sum, 0.1);
                    assert!(sum_off < 4.0 * tolerance(kind), "y of the sum, {what}: {sum_off:e}");
                });
            }
        }
    }
}

fn cuda_norm(norm: &Norm, x: &Tensor) -> (Tensor, Tensor) {
    assert!(serves(&[x]));
    let (_, y, stats) = super::norm(x, None, &norm.weight, norm.bias.as_ref(), norm.eps, norm.centred);
    (y, stats)
}

#[test]
fn rotations_of_two_tensors_in_one_launch_equal_their_twins() {
    for kind in KINDS {
        for pairs in [false, true] {
            // Heads of q and k, their sizes, elements that turn, where they begin: by sixteen bytes, and not.
            for ([q, k], [head_q, head_k], half, first) in
                [([4, 2], [64, 64], 32, [0, 0]), ([3, 1], [96, 64], 16, [64, 32]), ([2, 5], [13, 6], 3, [7, 0])]
            {
                let tokens = 11;
                let angle = randn(&[tokens, half], 5) * 3.0;
                let (cos, sin) = (angle.cos(), angle.sin());
                let inputs = [both(&[tokens, q, head_q], 6, kind), both(&[tokens, k, head_k], 7, kind)];
                let layout = if pairs { RopeLayout::Pairs } else { RopeLayout::Halves };
                for direction in [1.0, -1.0] {
                    let rotation = Rotation { layout, cos: cos.shallow_clone(), sin: sin.shallow_clone() };
                    let twin =
                        |i: usize| plainly(|| crate::ops::rope::rotate(&inputs[i].1, &rotation, first[i], direction));
                    let expected = [twin(0), twin(1)];
                    on_gpus(|device| {
                        let x = inputs.each_ref().map(|(x, _)| x.to_device(device));
                        let (cos, sin) = (cos.to_device(device), sin.to_device(device));
                        let angles = Angles { pairs, cos: &cos, sin: &sin };
                        assert!(rotates(&[&x[0], &x[1]], angles));
                        let found = rotate(&[&x[0], &x[1]], angles, &first, direction as f32);
                        for (found, expected) in found.iter().zip(&expected) {
                            let off = off(found, expected, 0.1);
                            assert!(
                                off < tolerance(kind),
                                "{kind:?} {layout:?} {head_q} {direction} on {device:?}: {off:e}"
                            );
                        }
                        let alone = rotate(&[&x[0]], angles, &first[..1], direction as f32);
                        assert!(alone[0].equal(&found[0]), "alone, {kind:?} {layout:?} {head_q}");
                    });
                }
            }
        }
    }
}

/// Heads of whole vectors and not, which turn whole or in part, by norms of either kind, with weights that take turns.
#[test]
fn heads_normed_and_rotated_in_one_launch_equal_their_twins() {
    for kind in KINDS {
        for pairs in [false, true] {
            for ([q, k], [head_q, head_k], half, first, centred) in [
                ([4, 2], [64, 64], 32, [0, 0], false),
                ([3, 1], [96, 64], 16, [64, 32], true),
                ([3, 1], [72, 40], 16, [8, 0], false),
                ([2, 5], [13, 6], 3, [7, 0], true),
                ([2, 5], [13, 6], 3, [2, 0], false),
            ] {
                let tokens = 11;
                let angle = randn(&[tokens, half], 5) * 3.0;
                let (cos, sin) = (angle.cos(), angle.sin());
                let layout = if pairs { RopeLayout::Pairs } else { RopeLayout::Halves };
                let (counts, sizes) = ([q, k], [head_q, head_k]);
                let make = |i: usize, seed| both(&[tokens, counts[i], sizes[i]], seed, kind);
                let (x, dy) = ([make(0, 6), make(1, 7)], [make(0, 8), make(1, 9)]);
                let norm = |i: usize| {
                    let turns = if centred { counts[i] } else { 1 };
                    frozen(randn(&[turns, sizes[i]], 10 + i as u64) * 0.2 + 1.0, None, 1e-5, centred)
                };
                let norms = [norm(0), norm(1)];
                let rotation = Rotation { layout, cos: cos.shallow_clone(), sin: sin.shallow_clone() };
                let turned =
                    |x: &Tensor, i: usize, direction| crate::ops::rope::rotate(x, &rotation, first[i], direction);
                let expected = [0, 1].map(|i| {
                    plainly(|| {
                        let rows = x[i].1.view([-1, sizes[i]]);
                        let (y, stats) = norms[i].forward(&rows);
                        let back = turned(&dy[i].1, i, -1.0).view([-1, sizes[i]]);
                        let dx = norms[i].backward(&back, &rows, &stats, None);
                        (turned(&y.view_as(&x[i].1), i, 1.0), dx.view_as(&x[i].1))
                    })
                });
                on_gpus(|device| {
                    let [x, dy] = [&x, &dy].map(|both| both.each_ref().map(|(t, _)| t.to_device(device)));
                    let weights = norms.each_ref().map(|norm| norm.weight.to_device(device));
                    let (cos, sin) = (cos.to_device(device), sin.to_device(device));
                    let angles = Angles { pairs, cos: &cos, sin: &sin };
                    let heads = [0, 1].map(|i| NormedHeads {
                        x: &x[i],
                        weight: &weights[i],
                        eps: 1e-5,
                        centred,
                        first: first[i],
                    });
                    assert!(norms_and_rotates(&heads, angles));
                    let y = norm_and_rotate(&heads, angles);
                    let dx = norm_and_rotate_backward(&[&dy[0], &dy[1]], &heads, angles);
                    for (i, (expected_y, expected_dx)) in expected.iter().enumerate() {
                        let (y, dx) = (off(&y[i], expected_y, 0.1), off(&dx[i], expected_dx, 0.1));
                        let what = format!("{i}, {kind:?} {layout:?} {sizes:?} on {device:?}");
                        assert!(y < tolerance(kind) && dx < 2.0 * tolerance(kind), "y {y:e}, dx {dx:e}: {what}");
                    }
                    let alone = norm_and_rotate(&heads[..1], angles);
                    assert!(alone[0].equal(&y[0]), "alone, {kind:?} {layout:?} {sizes:?}");
                });
            }
        }
    }
}

#[test]
fn gated_activations_equal_their_twins_with_and_without_up() {
    let clamped = Activation::Clamped { limit: 1.2, slope: 1.702, offset: 1.0 };
    for kind in KINDS {
        for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Sigmoid, clamped] {
            for shape in [[3, 8], [7, 129]] {
                let [gate, up, dy] = [1, 2, 3].map(|seed| both(&shape, seed, kind));
                for with_up in [true, false] {
                    let wide_up = with_up.then_some(&up.1);
                    let y = plainly(|| activation.gated(&gate.1, wide_up));
                    let (dgate, dup, _) = plainly(|| activation.gated_backward(&dy.1, &gate.1, wide_up, false));
                    on_gpus(|device| {
                        // Of their own: they are written over at last.
                        let [gate, up, dy] = [&gate.0, &up.0, &dy.0].map(|t| t.to_device(device).copy());
                        let up = with_up.then_some(&up);
                        let what = format!("{activation:?} {kind:?} {shape:?}, up {with_up}, on {device:?}");
                        let own_y = gated(activation.curve(), &gate, up);
                        let close = |found: &Tensor, expected: &Tensor, name: &str| {
                            let off = off(found, expected, 0.1);
                            assert!(off < tolerance(kind), "{name}, {what}: {off:e}");
                        };
                        close(&own_y, &y, "y");
                        // Onto memory of their own, then onto what they are made of.
                        for in_place in [false, true] {
                            let curve = activation.curve();
                            let (own_dgate, own_dup, again) = gated_backward(curve, &dy, &gate, up, in_place);
                            assert_eq!(own_dgate.data_ptr() == gate.data_ptr(), in_place, "{what}");
                            assert!(again.equal(&own_y), "y again, {what}, {in_place}");
                            close(&own_dgate, &dgate, "dgate");
                            assert_eq!(own_dup.is_some(), with_up);
                            if let (Some(own), Some(dup)) = (&own_dup, &dup) {
                                close(own, dup, "dup");
                            }
                        }
                    });
                }
            }
        }
    }
}

/// Rows by sixteen bytes and not, shorter and longer than a block takes at once.
#[test]
fn cross_entropies_and_their_gradients_equal_their_twins() {
    for kind in KINDS {
        for width in [7, 64, 501, 2048, 5008] {
            for (factor, cap) in [(1.0, None), (0.25, None), (1.5, Some(2.0))] {
                let (products, wide) = both(&[3, width], 8, kind);
                let (products, wide) = (products * 4.0, wide * 4.0);
                let targets = Tensor::from_slice(&[0, width - 1, width / 2]);
                let map = LogitMap { scale: factor, soft_cap: cap };
                let (losses, gradient) = plainly(|| softmax(&wide, map, &targets, 3.0, Some(Kind::Float)));
                on_gpus(|device| {
                    let (products, targets) = (products.to_device(device), targets.to_device(device));
                    let (own, own_gradient) = softmax_cross_entropy(&products, &targets, (factor, cap), 3.0, kind);
                    let what = format!("{width} logits, {factor} {cap:?} {kind:?} on {device:?}");
                    assert!(off(&own, &losses, 0.1) < 2e-5, "loss, {what}: {:e}", off(&own, &losses, 0.1));
                    let off = off(&own_gradient, gradient.as_ref().unwrap(), 1e-2);
                    assert!(off < tolerance(kind) + 1e-4, "gradient, {what}: {off:e}");
                    // The same products in fp32.
                    let wide = wide.to_device(device);
                    let (of_fp32, its_gradient) = softmax_cross_entropy(&wide, &targets, (factor, cap), 3.0, kind);
                    assert!(of_fp32.equal(&own) && its_gradient.equal(&own_gradient), "of fp32, {what}");
                });
            }
        }
    }
}

#[test]
fn what_is_not_finite_is_seen_in_the_loss_and_the_gradient() {
    on_gpus(|device| {
        for (wrong, at) in [(f32::NAN, 1), (f32::INFINITY, 1), (f32::NEG_INFINITY, 3)] {
            let mut logits = [0.5f32; 600];
            logits[at] = wrong;
            let products = Tensor::from_slice(&logits).view([1, 600]).to_device(device);
            let target = Tensor::from_slice(&[3i64]).to_device(device);
            let (loss, gradient) = softmax_cross_entropy(&products, &target, (1.0, None), 1.0, Kind::Float);
            assert!(!loss.double_value(&[0, 0]).is_finite(), "{wrong} on {device:?}");
            assert!(gradient.isnan().all().int64_value(&[]) == 1, "{wrong} on {device:?}");
        }
        // What is masked out is not broken.
        let mut logits = [f32::NEG_INFINITY; 600];
        logits[17] = 2.0;
        let products = Tensor::from_slice(&logits).view([1, 600]).to_device(device);
        let (loss, gradient) = softmax_cross_entropy(
            &products,
            &Tensor::from_slice(&[17i64]).to_device(device),
            (1.0, None),
            1.0,
            Kind::Float,
        );
        assert_eq!(loss.double_value(&[0, 0]), 0.0);
        assert!(gradient.abs().max().double_value(&[]) == 0.0, "{device:?}");
    });
}
