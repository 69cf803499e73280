//! That every kernel compiles, that those of the block equal their twins on the GPU that tests emulate and on a real one, and how near
//! to the speed of memory they are there. (Those of `quant` are compared beside their formats.)

use std::time::Instant;

use tch::{Device, Kind, Tensor};

use super::compiler::{Compiler, Target};
use super::emulator::{gpu, names, on_gpus, plainly};
use super::*;
use crate::ops::LogitMap;
use crate::ops::cross_entropy::softmax;
use crate::ops::norm::tests::frozen;
use crate::ops::rope::{RopeLayout, Rotation};
use crate::ops::testing::randn;
use crate::ops::{Activation, Norm};
use crate::quant::{FourBit, FourBitType, Fp8, Int8};
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
        for architecture in [80, 90, 120] {
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
                let dx = plainly(|| norm(Device::Cpu).backward(&wide_dy, &wide_x, &stats));
                on_gpus(|device| {
                    let (x, dy, norm) = (x.to_device(device), dy.to_device(device), norm(device));
                    let what = format!("{rows} x {width}, {turns} turns, centred {centred}, {kind:?} on {device:?}");
                    let (own_y, own_stats) = cuda_norm(&norm, &x);
                    assert!(off(&own_stats, &stats, 1e-3) < 2e-5, "statistics, {what}");
                    assert!(off(&own_y, &y, 0.1) < tolerance(kind), "y, {what}: {:e}", off(&own_y, &y, 0.1));
                    let again = norm_again(&x, &norm.weight, norm.bias.as_ref(), &own_stats);
                    assert!(again.equal(&own_y), "y again, {what}");
                    let own_dx = norm_backward(&dy, &x, &norm.weight, &own_stats, centred);
                    assert!(off(&own_dx, &dx, 0.1) < 2.0 * tolerance(kind), "dx, {what}: {:e}", off(&own_dx, &dx, 0.1));
                });
            }
        }
    }
}

fn cuda_norm(norm: &Norm, x: &Tensor) -> (Tensor, Tensor) {
    assert!(serves(&[x]));
    super::norm(x, &norm.weight, norm.bias.as_ref(), norm.eps, norm.centred)
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
                    let (dgate, dup, _) = plainly(|| activation.gated_backward(&dy.1, &gate.1, wide_up));
                    on_gpus(|device| {
                        let [gate, up, dy] = [&gate.0, &up.0, &dy.0].map(|t| t.to_device(device));
                        let up = with_up.then_some(&up);
                        let what = format!("{activation:?} {kind:?} {shape:?}, up {with_up}, on {device:?}");
                        let own_y = gated(activation.curve(), &gate, up);
                        let close = |found: &Tensor, expected: &Tensor, name: &str| {
                            let off = off(found, expected, 0.1);
                            assert!(off < tolerance(kind), "{name}, {what}: {off:e}");
                        };
                        close(&own_y, &y, "y");
                        let (own_dgate, own_dup, again) = gated_backward(activation.curve(), &dy, &gate, up);
                        assert!(again.equal(&own_y), "y again, {what}");
                        close(&own_dgate, &dgate, "dgate");
                        assert_eq!(own_dup.is_some(), with_up);
                        if let (Some(own), Some(dup)) = (&own_dup, &dup) {
                            close(own, dup, "dup");
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
                let (losses, gradient) = plainly(|| softmax(&wide, map, &targets, 3.0, true));
                on_gpus(|device| {
                    let (products, targets) = (products.to_device(device), targets.to_device(device));
                    let (own, own_gradient) = softmax_cross_entropy(&products, &targets, (factor, cap), 3.0);
                    let what = format!("{width} logits, {factor} {cap:?} {kind:?} on {device:?}");
                    assert!(off(&own, &losses, 0.1) < 2e-5, "loss, {what}: {:e}", off(&own, &losses, 0.1));
                    let off = off(&own_gradient, gradient.as_ref().unwrap(), 1e-2);
                    assert!(off < tolerance(kind) + 1e-4, "gradient, {what}: {off:e}");
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
            let (loss, gradient) = softmax_cross_entropy(&products, &target, (1.0, None), 1.0);
            assert!(!loss.double_value(&[0, 0]).is_finite(), "{wrong} on {device:?}");
            assert!(gradient.isnan().all().int64_value(&[]) == 1, "{wrong} on {device:?}");
        }
        // What is masked out is not broken.
        let mut logits = [f32::NEG_INFINITY; 600];
        logits[17] = 2.0;
        let products = Tensor::from_slice(&logits).view([1, 600]).to_device(device);
        let (loss, gradient) =
            softmax_cross_entropy(&products, &Tensor::from_slice(&[17i64]).to_device(device), (1.0, None), 1.0);
        assert_eq!(loss.double_value(&[0, 0]), 0.0);
        assert!(gradient.abs().max().double_value(&[]) == 0.0, "{device:?}");
    });
}

/// Bytes that each kernel moves in a second, beside those of a copy on the same device, at the shapes of an 8B model.
#[test]
#[ignore = "measures a GPU: `make device-check` runs it"]
fn speed_beside_a_copy() {
    let device = gpu().expect("a GPU: this is for machines that have one");
    let Device::Cuda(index) = device else { unreachable!("a CUDA device was asked for") };
    let (tokens, width, hidden, heads, head) = (8192, 4096, 14336, 32, 128);
    let bf16 = |shape: &[i64]| Tensor::randn(shape, (Kind::BFloat16, device));
    // Seconds of one call: the median of five rounds of twenty.
    let seconds = |run: &dyn Fn()| {
        let mut rounds: Vec<f64> = (0..6)
            .map(|_| {
                tch::Cuda::synchronize(index as i64);
                let began = Instant::now();
                (0..20).for_each(|_| run());
                tch::Cuda::synchronize(index as i64);
                began.elapsed().as_secs_f64() / 20.0
            })
            .skip(1)
            .collect();
        rounds.sort_by(f64::total_cmp);
        rounds[2]
    };
    let (from, mut to) = (bf16(&[hidden, 4 * width]), bf16(&[hidden, 4 * width]));
    let copied = 2.0 * 2.0 * from.numel() as f64;
    let copy = {
        let to = std::cell::RefCell::new(&mut to);
        copied / seconds(&|| to.borrow_mut().copy_(&from))
    };
    println!("{:<34} {:>9.0} GB/s", "copy", copy / 1e9);
    let row = |name: &str, bytes: f64, run: &dyn Fn()| {
        let rate = bytes / seconds(run);
        println!("{name:<34} {:>9.0} GB/s  {:>5.1} % of a copy", rate / 1e9, 100.0 * rate / copy);
    };
    let weight = bf16(&[hidden, width]);
    let numbers = weight.numel() as f64;
    for (nested, block) in [(false, 64), (true, 64), (true, 256)] {
        let four_bit = FourBit::of(&weight, FourBitType::Nf4, block, nested);
        let scales = if nested { 1.0 + 4.0 / 256.0 } else { 4.0 };
        let bytes = numbers * (0.5 + scales / block as f64 + 2.0);
        row(&format!("nf4 made whole, {block}, nested {nested}"), bytes, &|| drop(four_bit.dequantised()));
        row("  its twin", bytes, &|| plainly(|| drop(four_bit.dequantised())));
    }
    row("nf4 made", numbers * 2.5, &|| drop(FourBit::of(&weight, FourBitType::Nf4, 64, false)));
    let int8 = Int8::of(&weight);
    row("int8 made whole", numbers * 3.0, &|| drop(int8.dequantised()));
    let fp8 = Fp8::of(&weight);
    row("fp8 rows made whole", numbers * 3.0, &|| drop(fp8.dequantised()));
    row("fp8 rows made", numbers * 3.0, &|| drop(Fp8::of(&weight)));
    let (x, dy) = (bf16(&[tokens, width]), bf16(&[tokens, width]));
    let norm = frozen(Tensor::ones([1, width], (Kind::Float, device)), None, 1e-5, false);
    let elements = x.numel() as f64;
    let (_, stats) = norm.forward(&x);
    row("RMSNorm", elements * 4.0, &|| drop(norm.forward(&x)));
    row("RMSNorm, backward", elements * 6.0, &|| drop(norm.backward(&dy, &x, &stats)));
    let (q, k) = (bf16(&[tokens, heads, head]), bf16(&[tokens, heads / 4, head]));
    let angle = Tensor::randn([tokens, head / 2], (Kind::Float, device));
    let (cos, sin) = (angle.cos(), angle.sin());
    let angles = Angles { pairs: false, cos: &cos, sin: &sin };
    row("RoPE of q and k", (q.numel() + k.numel()) as f64 * 4.0, &|| drop(rotate(&[&q, &k], angles, &[0, 0], 1.0)));
    let [gate, up, dy] = [(); 3].map(|()| bf16(&[tokens, hidden]));
    let elements = gate.numel() as f64;
    row("SwiGLU", elements * 6.0, &|| drop(Activation::Silu.gated(&gate, Some(&up))));
    row("SwiGLU, backward", elements * 12.0, &|| drop(Activation::Silu.gated_backward(&dy, &gate, Some(&up))));
    row("GeGLU, backward", elements * 12.0, &|| drop(Activation::GeluTanh.gated_backward(&dy, &gate, Some(&up))));
    let (rows, vocabulary) = (128, 128_256);
    let products = bf16(&[rows, vocabulary]);
    let targets = Tensor::zeros([rows], (Kind::Int64, device));
    let bytes = products.numel() as f64 * 4.0;
    row("cross-entropy and gradient", bytes, &|| drop(softmax(&products, LogitMap::PLAIN, &targets, 1.0, true)));
    row("  its twin", bytes, &|| plainly(|| drop(softmax(&products, LogitMap::PLAIN, &targets, 1.0, true))));
}
