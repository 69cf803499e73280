//! The few libtorch entry points tch lacks: one small C++ file and its safe Rust face.
//!
//! The heart is [`custom`]: an operation computed without a graph hands libtorch's engine a backward written in Rust.
#![allow(unsafe_code)]

use std::any::Any;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use half::{bf16, f16};
use tch::{Device, Kind, Tensor};
use torch_sys::C_tensor;

use crate::error::{Error, Fault, Result};

type Raw = *mut C_tensor;
type Backward = Box<dyn FnOnce(&[Tensor]) -> Vec<Option<Tensor>> + Send>;

unsafe extern "C" {
    fn engraft_custom(
        inputs: *const Raw,
        n_inputs: usize,
        outputs: *const Raw,
        n_outputs: usize,
        closure: *mut c_void,
        name: *const c_char,
    ) -> *mut c_char;
    fn engraft_gradients(
        outputs: *const Raw,
        grad_outputs: *const Raw,
        n_outputs: usize,
        inputs: *const Raw,
        n_inputs: usize,
        out: *mut Raw,
    ) -> *mut c_char;
    #[allow(clippy::too_many_arguments)]
    fn engraft_fused_adamw(
        params: *const Raw,
        grads: *const Raw,
        exp_avgs: *const Raw,
        exp_avg_sqs: *const Raw,
        steps: *const Raw,
        n: usize,
        lr: f64,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        grad_scale: Raw,
        found_inf: Raw,
    ) -> *mut c_char;
    fn engraft_clear_gradients(tensors: *const Raw, n: usize);
    fn engraft_global_norm(tensors: *const Raw, n: usize, out: *mut Raw) -> *mut c_char;
    fn engraft_keep_mask(like: Raw, keep: f64, seed: u64, out: *mut Raw) -> *mut c_char;
    fn engraft_uniform(like: Raw, low: f64, high: f64, seed: u64, out: *mut Raw) -> *mut c_char;
    #[allow(clippy::too_many_arguments)]
    fn engraft_flash_varlen(
        q: Raw,
        k: Raw,
        v: Raw,
        offsets: Raw,
        longest: i64,
        scale: f64,
        window_left: i64,
        out: *mut Raw,
    ) -> *mut c_char;
    #[allow(clippy::too_many_arguments)]
    fn engraft_flash_varlen_backward(
        grad: Raw,
        q: Raw,
        k: Raw,
        v: Raw,
        output: Raw,
        logsumexp: Raw,
        offsets: Raw,
        longest: i64,
        scale: f64,
        window_left: i64,
        rng_state: Raw,
        unused: Raw,
        out: *mut Raw,
    ) -> *mut c_char;
    fn engraft_cuda_memory(
        index: c_int,
        allocated: *mut i64,
        peak: *mut i64,
        free: *mut i64,
        total: *mut i64,
    ) -> *mut c_char;
    fn engraft_parallel_for(
        n: i64,
        grain: i64,
        body: unsafe extern "C" fn(*mut c_void, i64, i64),
        context: *mut c_void,
    );
    #[allow(clippy::too_many_arguments)]
    fn engraft_bf16_gemm(
        m: i64,
        n: i64,
        k: i64,
        lda: i64,
        ldb: i64,
        ldc: i64,
        accumulate: c_int,
        a: *const bf16,
        b: *const bf16,
        c: *mut f32,
    ) -> *mut c_char;
    fn engraft_bf16_gemm_done();
    fn engraft_cpu_capability() -> *const c_char;
    fn engraft_torch_version() -> *const c_char;
}

/// Wires `outputs`, computed without a graph, to `inputs` by a backward written in Rust.
///
/// `backward` receives one gradient per output (zeros where the output was not used) and returns one per input, `None` where
/// there is none to give. It runs once, without a graph being recorded, possibly on libtorch's own thread (it is `Send`); a
/// panic in it becomes a libtorch error. When no input requires a gradient, or gradients are off, it is dropped at once and
/// the outputs are plain tensors.
///
/// A closure may keep the very tensors passed as `outputs`: what is returned are other handles to the same storage, so no
/// reference cycle arises.
pub fn custom(
    name: &'static CStr,
    inputs: &[&Tensor],
    outputs: Vec<Tensor>,
    backward: impl FnOnce(&[Tensor]) -> Vec<Option<Tensor>> + Send + 'static,
) -> Vec<Tensor> {
    if !records_graph(inputs) {
        return outputs;
    }
    let outputs: Vec<Tensor> = outputs.iter().map(Tensor::detach).collect();
    let closure: Box<Backward> = Box::new(Box::new(backward));
    let inputs = raws(inputs.iter().copied());
    let wired = raws(outputs.iter());
    // SAFETY: the pointers are of live tensors; the node takes ownership of the closure, which is given back exactly once to
    // `engraft_backward_call` or `engraft_backward_drop`.
    let error = unsafe {
        engraft_custom(
            inputs.as_ptr(),
            inputs.len(),
            wired.as_ptr(),
            wired.len(),
            Box::into_raw(closure).cast(),
            name.as_ptr(),
        )
    };
    expect(error);
    outputs
}

/// Whether an operation on `inputs` would be recorded: gradients are on and one of them requires one.
pub fn records_graph(inputs: &[&Tensor]) -> bool {
    // SAFETY: reads and writes back libtorch's thread-local flag.
    let enabled = unsafe {
        let before = torch_sys::at_grad_set_enabled(1);
        torch_sys::at_grad_set_enabled(before);
        before != 0
    };
    enabled && inputs.iter().any(|t| t.requires_grad())
}

/// The gradients of `outputs`, contracted with `grad_outputs`, with respect to `inputs`; `None` where an input was not used.
pub fn gradients(outputs: &[&Tensor], grad_outputs: &[&Tensor], inputs: &[&Tensor]) -> Vec<Option<Tensor>> {
    assert_eq!(outputs.len(), grad_outputs.len(), "one upstream gradient per output");
    let (outputs, grads) = (raws(outputs.iter().copied()), raws(grad_outputs.iter().copied()));
    let inputs = raws(inputs.iter().copied());
    let mut out = vec![std::ptr::null_mut(); inputs.len()];
    // SAFETY: live tensors; `out` has room for one pointer per input.
    expect(unsafe {
        engraft_gradients(
            outputs.as_ptr(),
            grads.as_ptr(),
            outputs.len(),
            inputs.as_ptr(),
            inputs.len(),
            out.as_mut_ptr(),
        )
    });
    out.into_iter().map(owned).collect()
}

/// Hyper-parameters of one AdamW step (arXiv:1711.05101).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub learning_rate: f64,
    /// First decay.
    pub beta1: f64,
    /// Second decay.
    pub beta2: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
}

/// libtorch's fused AdamW over all parameters in one call; `steps` are fp32 scalars, already counting this step.
///
/// `guard` decides on the device, without waiting for it: `(divisor, skip)`, two fp32 scalars. Gradients are divided
/// by the first (in place); nothing changes where the second is 1.
pub fn fused_adamw_(
    params: &[Tensor],
    grads: &[Tensor],
    exp_avgs: &[Tensor],
    exp_avg_sqs: &[Tensor],
    steps: &[Tensor],
    settings: AdamW,
    guard: Option<(&Tensor, &Tensor)>,
) -> Result<()> {
    let n = params.len();
    assert!([grads.len(), exp_avgs.len(), exp_avg_sqs.len(), steps.len()].iter().all(|len| *len == n));
    let lists = [params, grads, exp_avgs, exp_avg_sqs, steps].map(|list| raws(list.iter()));
    // SAFETY: live tensors, lists of equal length.
    checked(unsafe {
        engraft_fused_adamw(
            lists[0].as_ptr(),
            lists[1].as_ptr(),
            lists[2].as_ptr(),
            lists[3].as_ptr(),
            lists[4].as_ptr(),
            n,
            settings.learning_rate,
            settings.beta1,
            settings.beta2,
            settings.weight_decay,
            settings.epsilon,
            guard.map_or(std::ptr::null_mut(), |(divisor, _)| raw(divisor)),
            guard.map_or(std::ptr::null_mut(), |(_, skip)| raw(skip)),
        )
    })
}

/// Drops the gradient of every tensor: the next backward then gives its own away instead of adding it to zeros.
pub fn clear_gradients(tensors: &[Tensor]) {
    let list = raws(tensors.iter());
    // SAFETY: live tensors.
    unsafe { engraft_clear_gradients(list.as_ptr(), list.len()) }
}

/// L2 norm over all elements of all tensors: an fp32 scalar on their device.
pub fn global_norm(tensors: &[Tensor]) -> Tensor {
    let list = raws(tensors.iter());
    let mut out = std::ptr::null_mut();
    // SAFETY: live tensors; `out` is filled on success.
    expect(unsafe { engraft_global_norm(list.as_ptr(), list.len(), &mut out) });
    owned(out).expect("filled on success")
}

/// A uint8 mask shaped and placed like `like`, 1 with probability `keep`: a pure function of `seed`.
pub fn keep_mask(like: &Tensor, keep: f64, seed: u64) -> Tensor {
    let mut out = std::ptr::null_mut();
    // SAFETY: a live tensor; `out` is filled on success.
    expect(unsafe { engraft_keep_mask(raw(like), keep, seed, &mut out) });
    owned(out).expect("filled on success")
}

/// fp32 uniform in [low, high), shaped and placed like `like`: a pure function of `seed`.
pub fn uniform(like: &Tensor, low: f64, high: f64, seed: u64) -> Tensor {
    let mut out = std::ptr::null_mut();
    // SAFETY: a live tensor; `out` is filled on success.
    expect(unsafe { engraft_uniform(raw(like), low, high, seed, &mut out) });
    owned(out).expect("filled on success")
}

/// What FlashAttention's forward keeps for its backward.
pub struct FlashVarlen {
    /// (T, N, H).
    pub output: Tensor,
    /// (N, T), fp32.
    pub logsumexp: Tensor,
    rng_state: Tensor,
    unused: Tensor,
}

/// Causal FlashAttention-2 over documents laid end to end; CUDA only.
///
/// q (T, N, H), k and v (T, K, H), `offsets` int32 on the device; `window` keys to the left besides the query's own.
pub fn flash_varlen(
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    offsets: &Tensor,
    longest: i64,
    scale: f64,
    window: Option<i64>,
) -> FlashVarlen {
    let mut out = [std::ptr::null_mut(); 4];
    // SAFETY: live tensors; `out` has room for the four results.
    expect(unsafe {
        engraft_flash_varlen(
            raw(q),
            raw(k),
            raw(v),
            raw(offsets),
            longest,
            scale,
            window.unwrap_or(-1),
            out.as_mut_ptr(),
        )
    });
    let [output, logsumexp, rng_state, unused] = out.map(|p| owned(p).expect("filled on success"));
    FlashVarlen { output, logsumexp, rng_state, unused }
}

/// The gradients (dq, dk, dv) of [`flash_varlen`].
pub fn flash_varlen_backward(
    grad: &Tensor,
    (q, k, v): (&Tensor, &Tensor, &Tensor),
    forward: &FlashVarlen,
    offsets: &Tensor,
    longest: i64,
    scale: f64,
    window: Option<i64>,
) -> [Tensor; 3] {
    let mut out = [std::ptr::null_mut(); 3];
    // SAFETY: live tensors; `out` has room for the three results.
    expect(unsafe {
        engraft_flash_varlen_backward(
            raw(grad),
            raw(q),
            raw(k),
            raw(v),
            raw(&forward.output),
            raw(&forward.logsumexp),
            raw(offsets),
            longest,
            scale,
            window.unwrap_or(-1),
            raw(&forward.rng_state),
            raw(&forward.unused),
            out.as_mut_ptr(),
        )
    });
    out.map(|p| owned(p).expect("filled on success"))
}

/// Memory of a CUDA device, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaMemory {
    /// Allocated by tensors now.
    pub allocated: i64,
    /// The most that was allocated by tensors at once.
    pub peak: i64,
    /// Free on the device.
    pub free: i64,
    /// All there is on the device.
    pub total: i64,
}

/// Memory of CUDA device `index`; an error where libtorch has no CUDA.
pub fn cuda_memory(index: usize) -> Result<CudaMemory> {
    let mut memory = CudaMemory { allocated: 0, peak: 0, free: 0, total: 0 };
    // SAFETY: four distinct places to write to.
    checked(unsafe {
        engraft_cuda_memory(
            index as c_int,
            &mut memory.allocated,
            &mut memory.peak,
            &mut memory.free,
            &mut memory.total,
        )
    })?;
    Ok(memory)
}

/// Tells the C library's allocator to keep what is freed: a training step asks for the same blocks over and over, and handing
/// them back to the kernel costs a page fault for every 4 KiB, every time. A no-op where there is no glibc.
pub fn keep_freed_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets numbers of the allocator; unknown or refused ones change nothing.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, c_int::MAX);
        libc::mallopt(libc::M_TOP_PAD, 256 << 20);
    }
}

/// Runs `body(range)` over `0..n` on libtorch's own CPU threads, in chunks of at least `grain`: one pool, no oversubscription.
pub fn parallel_for(n: usize, grain: usize, body: impl Fn(Range<usize>) + Sync) {
    unsafe extern "C" fn call<F: Fn(Range<usize>) + Sync>(context: *mut c_void, begin: i64, end: i64) {
        // SAFETY: `context` is the `&F` passed below, alive until `engraft_parallel_for` returns.
        let body = unsafe { &*context.cast::<F>() };
        // A panic must not cross C++ frames: bodies are arithmetic over slices cut to size; abort with the message if one does.
        if catch_unwind(AssertUnwindSafe(|| body(begin as usize..end as usize))).is_err() {
            std::process::abort();
        }
    }
    fn trampoline<F: Fn(Range<usize>) + Sync>(_: &F) -> unsafe extern "C" fn(*mut c_void, i64, i64) {
        call::<F>
    }
    let call = trampoline(&body);
    // SAFETY: `body` outlives the call and is `Sync`.
    unsafe { engraft_parallel_for(n as i64, grain as i64, call, std::ptr::from_ref(&body).cast_mut().cast()) }
}

/// A Rust type that lies in memory as the elements of a kind of tensor (tch 0.24's own trait says `Half` of `bf16`).
pub trait Element: Copy + Send + Sync + 'static {
    /// The kind of tensor.
    const KIND: Kind;
}

impl Element for f32 {
    const KIND: Kind = Kind::Float;
}

impl Element for bf16 {
    const KIND: Kind = Kind::BFloat16;
}

impl Element for f16 {
    const KIND: Kind = Kind::Half;
}

impl Element for i64 {
    const KIND: Kind = Kind::Int64;
}

/// The elements of a contiguous CPU tensor.
///
/// Panics when the tensor is elsewhere, not contiguous, or of another number type. The caller must not change the tensor in
/// place while the slice lives, as everywhere in libtorch.
pub fn elements<T: Element>(tensor: &Tensor) -> &[T] {
    assert!(tensor.device() == Device::Cpu && tensor.is_contiguous(), "elements of a contiguous CPU tensor");
    assert_eq!(tensor.kind(), T::KIND, "number type");
    if tensor.numel() == 0 {
        return &[];
    }
    // SAFETY: contiguous, on the CPU and of type T, so `numel` elements lie at `data_ptr`; alive as long as the tensor is.
    unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast(), tensor.numel()) }
}

/// A new contiguous CPU tensor whose rows are written by `fill`, in parallel: it gets a range of rows and their elements.
///
/// A row is everything behind the first dimension. Every element must be written: the memory comes as it is.
pub fn filled<T: Element>(shape: &[i64], fill: impl Fn(Range<usize>, &mut [T]) + Sync) -> Tensor {
    let [tensor, _] = filled_pair::<T, f32>(shape, &[0], |rows, elements, _| fill(rows, elements));
    tensor
}

/// Two new tensors at once, as [`filled`]; they have equally many rows, or the second is empty.
pub fn filled_pair<T: Element, U: Element>(
    first: &[i64],
    second: &[i64],
    fill: impl Fn(Range<usize>, &mut [T], &mut [U]) + Sync,
) -> [Tensor; 2] {
    let (first, second) = (Blank::<T>::new(first), Blank::<U>::new(second));
    assert!(second.is_empty() || second.rows() == first.rows(), "as many rows in both");
    let grain = (32_768 / (first.width + second.width).max(1)).max(1);
    parallel_for(first.rows(), grain, |range| {
        // SAFETY: `parallel_for` hands out every row once.
        let (a, b) = unsafe { (first.part(&range), second.part(&range)) };
        fill(range, a, b);
    });
    [first.tensor, second.tensor]
}

/// N new tensors of one shape at once, as [`filled`].
pub fn filled_many<T: Element, const N: usize>(
    shape: &[i64],
    fill: impl Fn(Range<usize>, [&mut [T]; N]) + Sync,
) -> [Tensor; N] {
    let blanks = [(); N].map(|()| Blank::<T>::new(shape));
    let grain = (32_768 / (N * blanks[0].width).max(1)).max(1);
    parallel_for(blanks[0].rows(), grain, |range| {
        // SAFETY: `parallel_for` hands out every row once.
        let parts = blanks.each_ref().map(|blank| unsafe { blank.part(&range) });
        fill(range, parts);
    });
    blanks.map(|blank| blank.tensor)
}

/// A new contiguous CPU tensor that several threads write, each its own rows.
struct Blank<T> {
    tensor: Tensor,
    /// Of `tensor`'s elements; not null unless it is empty.
    first: *mut T,
    /// Elements of a row.
    width: usize,
}

// SAFETY: the tensor is seen by no one else, and `part` is called for each row by one thread only.
unsafe impl<T: Send> Sync for Blank<T> {}

impl<T: Element> Blank<T> {
    fn new(shape: &[i64]) -> Self {
        let tensor = Tensor::empty(shape, (T::KIND, Device::Cpu));
        let first = tensor.data_ptr().cast();
        Self { tensor, first, width: shape[1..].iter().product::<i64>() as usize }
    }

    fn rows(&self) -> usize {
        self.tensor.size()[0] as usize
    }

    fn is_empty(&self) -> bool {
        self.tensor.numel() == 0
    }

    /// The elements of a range of rows; none of an empty tensor.
    ///
    /// # Safety
    /// No two slices that live at once overlap.
    #[allow(clippy::mut_from_ref)]
    unsafe fn part(&self, rows: &Range<usize>) -> &mut [T] {
        if self.is_empty() {
            return &mut [];
        }
        assert!(rows.end <= self.rows());
        // SAFETY: within the tensor, as just asserted; not overlapping, by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(rows.start * self.width), rows.len() * self.width) }
    }
}

/// The elements of a contiguous CPU tensor, to be written; as [`elements`]. No one else may be reading the tensor.
pub fn elements_mut<T: Element>(tensor: &mut Tensor) -> &mut [T] {
    let length = elements::<T>(tensor).len();
    if length == 0 {
        return &mut [];
    }
    // SAFETY: as in `elements`, which has checked; the handle is borrowed exclusively.
    unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast(), length) }
}

/// Runs `task(i)` for every i below `n` on libtorch's CPU threads, each thread taking the next one when it is done.
pub fn parallel_tasks(n: usize, task: impl Fn(usize) + Sync) {
    let next = std::sync::atomic::AtomicUsize::new(0);
    parallel_for((tch::get_num_threads() as usize).min(n), 1, |workers| {
        for _ in workers {
            loop {
                let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                if i >= n {
                    break;
                }
                task(i);
            }
        }
    });
}

/// A matrix operand: its elements and the distance between rows.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// Elements, from the first one on.
    pub elements: &'a [bf16],
    /// Elements from one row to the next.
    pub stride: usize,
}

/// `C (m, n) = A (m, k) B (k, n)` in fp32, added to C when `accumulate`; one thread. B holds pairs of rows side by side
/// (k/2, n, 2) and k is even. Only where [`bf16_gemm_serves`].
pub fn bf16_gemm((m, n, k): (usize, usize, usize), a: Rows<'_>, b: &[bf16], c: &mut [f32], accumulate: bool) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(k > 0 && k % 2 == 0 && a.stride >= k, "k is even and a row of A holds it");
    assert!(
        a.elements.len() >= (m - 1) * a.stride + k && b.len() >= k * n && c.len() >= m * n,
        "operands are large enough"
    );
    // SAFETY: all that is read and written lies within the slices, as just asserted.
    expect(unsafe {
        engraft_bf16_gemm(
            m as i64,
            n as i64,
            k as i64,
            a.stride as i64,
            n as i64,
            n as i64,
            c_int::from(accumulate),
            a.elements.as_ptr(),
            b.as_ptr(),
            c.as_mut_ptr(),
        )
    });
}

/// To be called when a thread is through with its [`bf16_gemm`] calls.
pub fn bf16_gemm_done() {
    // SAFETY: no arguments; harmless where there is nothing to give back.
    unsafe { engraft_bf16_gemm_done() }
}

/// Whether libtorch has the kernel behind [`bf16_gemm`] for this processor: tried once, on numbers whose product is known.
pub fn bf16_gemm_serves() -> bool {
    static SERVES: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| {
        let a: Vec<bf16> = (0..8).map(|i| bf16::from_f32(i as f32)).collect(); // (2, 4)
        let b: Vec<bf16> = (0..8).map(|i| bf16::from_f32((i % 3) as f32)).collect(); // (2, 2, 2)
        let mut c = [0f32; 4];
        // SAFETY: a (2, 4), b (4, 2) and c (2, 2) are as large as said.
        let error = unsafe { engraft_bf16_gemm(2, 2, 4, 4, 2, 2, 0, a.as_ptr(), b.as_ptr(), c.as_mut_ptr()) };
        bf16_gemm_done();
        // b's pairs spell the rows (0, 2), (1, 0), (1, 0), (2, 1).
        message(error).is_none() && c == [9.0, 3.0, 25.0, 15.0]
    });
    *SERVES
}

/// The instruction set libtorch chose for its CPU kernels, as in `AVX512`.
pub fn cpu_capability() -> &'static str {
    // SAFETY: a NUL-terminated string that lives as long as the program.
    unsafe { CStr::from_ptr(engraft_cpu_capability()) }.to_str().unwrap_or("unknown")
}

/// libtorch's version, as in `2.11.0`.
pub fn torch_version() -> &'static str {
    // SAFETY: a NUL-terminated string literal of the C++ file.
    unsafe { CStr::from_ptr(engraft_torch_version()) }.to_str().unwrap_or("unknown")
}

/// Runs `body` and turns a libtorch failure (tch panics) into an error; running out of memory comes with advice.
pub fn catching<T>(place: &str, body: impl FnOnce() -> Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(result) => result,
        Err(panic) => {
            let text = panic_text(&*panic);
            if text.contains("out of memory")
                || text.contains("can't allocate memory")
                || text.contains("DefaultCPUAllocator")
            {
                return Err(Error::Device(Fault::new(place, reason(&text)).hint(
                    "training takes less with a lower training.micro_batch_size (and gradient_accumulation_steps raised by the same factor), \
                     training.recompute: full, a lower dataset.max_length or a lower adapter.r; everything does with a smaller base or dtype",
                )));
            }
            std::panic::resume_unwind(panic)
        }
    }
}

/// What libtorch's text says of memory, without the stack it adds. tch shows its errors with line ends spelled out.
fn reason(text: &str) -> &str {
    let lines = text.lines().flat_map(|line| line.split("\\n"));
    lines.map(str::trim).find(|line| line.contains("memory")).unwrap_or("out of memory")
}

/// Where a device is, as an index libtorch understands.
pub fn cuda_index(device: Device) -> Option<usize> {
    match device {
        Device::Cuda(index) => Some(index),
        _ => None,
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string))
        .unwrap_or_else(|| "panic without a message".into())
}

/// Calls the Rust half of a node. Consumes `closure` and the gradients.
#[unsafe(no_mangle)]
unsafe extern "C" fn engraft_backward_call(
    closure: *mut c_void,
    grads: *mut Raw,
    n_grads: usize,
    out: *mut Raw,
    n_out: usize,
) -> *mut c_char {
    // SAFETY: `closure` was made by `custom` and is handed over exactly once; `grads` are new tensors that become ours.
    let (backward, grads) = unsafe {
        let backward: Box<Backward> = Box::from_raw(closure.cast());
        let grads: Vec<Tensor> =
            std::slice::from_raw_parts(grads, n_grads).iter().map(|p| Tensor::from_ptr(*p)).collect();
        (backward, grads)
    };
    let result = catch_unwind(AssertUnwindSafe(|| {
        let results = backward(&grads);
        assert_eq!(results.len(), n_out, "a backward returns one gradient per input");
        results
    }));
    match result {
        Ok(results) => {
            for (i, gradient) in results.into_iter().enumerate() {
                if let Some(mut tensor) = gradient {
                    // SAFETY: `out` has room for `n_out` pointers; C++ takes the tensor over, so it is not dropped here.
                    unsafe { *out.add(i) = tensor.as_mut_ptr() };
                    std::mem::forget(tensor);
                }
            }
            std::ptr::null_mut()
        }
        Err(panic) => {
            let text = CString::new(panic_text(&*panic).replace('\0', " ")).unwrap_or_default();
            // SAFETY: C++ frees the copy with free().
            unsafe { libc::strdup(text.as_ptr()) }
        }
    }
}

/// Drops a backward that was never called.
#[unsafe(no_mangle)]
unsafe extern "C" fn engraft_backward_drop(closure: *mut c_void) {
    // SAFETY: as in `engraft_backward_call`.
    let backward: Box<Backward> = unsafe { Box::from_raw(closure.cast()) };
    // What a backward holds are tensors, whose drop does not panic; should one, it must not cross C++ frames.
    let _ = catch_unwind(AssertUnwindSafe(|| drop(backward)));
}

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

fn message(error: *mut c_char) -> Option<String> {
    if error.is_null() {
        return None;
    }
    // SAFETY: a malloc'd, NUL-terminated message, ours to free.
    unsafe {
        let text = CStr::from_ptr(error).to_string_lossy().into_owned();
        libc::free(error.cast());
        Some(text)
    }
}

fn checked(error: *mut c_char) -> Result<()> {
    match message(error) {
        None => Ok(()),
        Some(text) => Err(Error::Device(Fault::new("libtorch", text))),
    }
}

/// Panics as tch's own operations do: these calls fail only on a broken invariant or out of memory (see [`catching`]).
fn expect(error: *mut c_char) {
    if let Some(text) = message(error) {
        panic!("{text}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(values: &[f32]) -> Tensor {
        Tensor::from_slice(values).set_requires_grad(true)
    }

    fn square(x: &Tensor, counter: std::sync::Arc<()>) -> Tensor {
        let y = tch::no_grad(|| x * x);
        let saved = x.detach();
        custom(c"test::square", &[x], vec![y], move |grads| {
            let _alive = &counter;
            vec![Some(&grads[0] * &saved * 2.0)]
        })
        .remove(0)
    }

    #[test]
    fn a_rust_backward_gives_the_gradient_of_autograd() {
        let x = leaf(&[1.0, -2.0, 3.0]);
        let alive = std::sync::Arc::new(());
        (square(&x, alive.clone()) * Tensor::from_slice(&[1f32, 10.0, 100.0])).sum(Kind::Float).backward();
        assert_eq!(Vec::<f32>::try_from(x.grad()).unwrap(), [2.0, -40.0, 600.0]);
        assert_eq!(std::sync::Arc::strong_count(&alive), 1, "the closure is dropped after backward");
    }

    #[test]
    fn a_backward_that_is_never_called_is_dropped_with_its_graph() {
        let alive = std::sync::Arc::new(());
        let x = leaf(&[1.0]);
        let y = square(&x, alive.clone());
        assert_eq!(std::sync::Arc::strong_count(&alive), 2);
        drop(y);
        assert_eq!(std::sync::Arc::strong_count(&alive), 1);
        let _ = tch::no_grad(|| square(&x, alive.clone()));
        assert_eq!(std::sync::Arc::strong_count(&alive), 1, "without a graph it is dropped at once");
    }

    #[test]
    fn a_closure_that_keeps_an_output_makes_no_cycle() {
        let alive = std::sync::Arc::new(());
        let counter = alive.clone();
        let x = leaf(&[0.5]);
        let y = tch::no_grad(|| x.exp());
        let saved = y.shallow_clone();
        let y = custom(c"test::exp", &[&x], vec![y], move |grads| {
            let _alive = &counter;
            vec![Some(&grads[0] * &saved)]
        });
        drop(y);
        assert_eq!(std::sync::Arc::strong_count(&alive), 1);
    }

    #[test]
    fn a_panic_in_a_backward_becomes_a_libtorch_error() {
        let x = leaf(&[1.0]);
        let y = custom(c"test::panic", &[&x], vec![x.detach() * 1.0], |_| panic!("the reason"));
        let error = y[0].sum(Kind::Float).f_backward().unwrap_err().to_string();
        assert!(error.contains("the reason") && error.contains("test::panic"), "{error}");
    }

    #[test]
    fn running_out_of_memory_is_one_line_without_libtorchs_stack() {
        let taken = catching("a place", || Ok(Tensor::zeros([1 << 50], (Kind::Float, Device::Cpu))));
        let error = taken.unwrap_err();
        assert_eq!(error.exit_code(), 8);
        let text = error.to_string();
        assert!(text.starts_with("a place: ") && text.contains("memory") && text.contains("adapter.r"), "{text}");
        assert!(text.len() < 800 && !text.contains("frame #"), "{text}");
    }

    #[test]
    fn backward_twice_is_refused() {
        let x = leaf(&[1.0]);
        let y = square(&x, Default::default()).sum(Kind::Float);
        y.backward();
        assert!(y.f_backward().is_err());
    }

    #[test]
    fn masks_and_uniforms_are_functions_of_their_seed() {
        let like = Tensor::zeros([1000], (Kind::Float, Device::Cpu));
        let (a, b, c) = (keep_mask(&like, 0.75, 7), keep_mask(&like, 0.75, 7), keep_mask(&like, 0.75, 8));
        assert!(a.equal(&b) && !a.equal(&c));
        let kept = a.sum(Kind::Int64).int64_value(&[]);
        assert!((680..820).contains(&kept), "{kept} of 1000 kept at 0.75");
        assert!(uniform(&like, -1.0, 1.0, 7).equal(&uniform(&like, -1.0, 1.0, 7)));
    }

    #[test]
    fn parallel_for_visits_everything_once() {
        let seen: Vec<std::sync::atomic::AtomicU32> = (0..10_001).map(|_| 0.into()).collect();
        parallel_for(seen.len(), 100, |range| {
            for i in range {
                seen[i].fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        });
        assert!(seen.iter().all(|n| n.load(std::sync::atomic::Ordering::Relaxed) == 1));
    }

    #[test]
    fn parallel_for_uses_libtorchs_threads() {
        tch::set_num_threads(2);
        let threads = std::sync::Mutex::new(std::collections::HashSet::new());
        parallel_for(2, 1, |_| {
            threads.lock().unwrap().insert(std::thread::current().id());
        });
        assert_eq!(threads.lock().unwrap().len(), 2, "compiled without OpenMP it would be one");
    }
}
