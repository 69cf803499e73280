//! Work on libtorch's own CPU threads.

use std::ffi::c_void;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

unsafe extern "C" {
    fn engraft_parallel_for(
        n: i64,
        grain: i64,
        body: unsafe extern "C" fn(*mut c_void, i64, i64),
        context: *mut c_void,
    );
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

/// Runs `task(i)` for every i below `n` on libtorch's CPU threads, each thread taking the next one when it is done.
pub fn parallel_tasks(n: usize, task: impl Fn(usize) + Sync) {
    parallel_tasks_with(n, || (), |(), i| task(i));
}

/// [`parallel_tasks`] with a `room` to work in, which every thread makes for itself and uses for all its tasks.
pub fn parallel_tasks_with<T>(n: usize, room: impl Fn() -> T + Sync, task: impl Fn(&mut T, usize) + Sync) {
    let next = std::sync::atomic::AtomicUsize::new(0);
    parallel_for((tch::get_num_threads() as usize).min(n), 1, |workers| {
        for _ in workers {
            let mut room = room();
            loop {
                let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                if i >= n {
                    break;
                }
                task(&mut room, i);
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

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
