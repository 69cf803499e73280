//! The few libtorch entry points tch lacks: one small C++ file and its safe Rust face.
//!
//! The heart is [`custom`]: an operation computed without a graph hands libtorch's engine a backward written in Rust.
#![allow(unsafe_code)]

mod autograd;
mod cudnn;
mod device;
mod elements;
mod failure;
mod flash;
mod gemm;
mod number;
mod nvml;
mod optimizer;
mod parallel;
mod placed;
mod random;
mod transfer;

use tch::Tensor;
use torch_sys::C_tensor;

pub use autograd::{custom, gradients, records_graph};
pub use cudnn::{CudnnAttention, cudnn_attention, cudnn_attention_backward};
pub use device::{
    CpuMemory, CudaMemory, FEW_SHAPES, MANY_SHAPES, cpu_capability, cpu_memory, cuda_index, cuda_memory, cuda_stream,
    deterministic, keep_freed_memory, keep_shapes, libtorch_folder, set_deterministic, torch_version,
};
pub use elements::{
    Element, elements, elements_mut, filled, filled_beside, filled_many, filled_pair, filled_pair_worth,
};
pub use failure::catching;
pub use flash::{FlashVarlen, flash_varlen, flash_varlen_backward};
pub use gemm::{Rows, bf16_gemm, bf16_gemm_done, bf16_gemm_serves};
#[cfg(target_arch = "x86_64")]
pub use number::Lanes;
pub use number::Number;
pub use nvml::GpuEnergy;
pub use optimizer::{AdamW, add_scaled, clear_gradients, fused_adamw_, global_norm};
pub use parallel::{parallel_for, parallel_tasks, parallel_tasks_with};
pub use placed::{pinned, placed, sent};
pub use random::{keep_mask, uniform};
pub use transfer::Transfer;

type Raw = *mut C_tensor;

fn raw(tensor: &Tensor) -> Raw {
    tensor.as_ptr().cast_mut()
}

fn raws<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> Vec<Raw> {
    tensors.map(raw).collect()
}

fn owned(pointer: Raw) -> Option<Tensor> {
    // SAFETY: the C++ side hands over a new at::Tensor, or null.
    (!pointer.is_null()).then(|| unsafe { Tensor::from_ptr(pointer) })
}
