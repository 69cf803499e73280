//! Signals that ask a run to stop: it finishes its step, saves its state and ends.

use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Once};

use signal_hook::SigId;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1};

/// Whether a signal asked the run to stop. SIGINT, SIGTERM, SIGUSR1 (sent ahead of time by batch systems) and SIGHUP do.
///
/// Further signals change nothing: the save they might cut short is on its way. SIGPIPE is ignored by
/// every Rust program, so a reader of the output that goes away does not end the training.
#[derive(Debug, Default)]
pub struct Interrupts {
    received: Arc<AtomicUsize>,
    registered: Vec<SigId>,
}

/// Set while nobody listens: signals then end the process as usual. For the whole process, as signals are.
static DEAF: AtomicBool = AtomicBool::new(true);
static DEFAULTS: Once = Once::new();

impl Interrupts {
    /// Listens until dropped. A signal that the process was started to ignore (`nohup`, background jobs) stays ignored.
    pub fn listen() -> std::io::Result<Self> {
        let mut interrupts = Self::default();
        let ignored = ignored_signals();
        let heard = [SIGINT, SIGTERM, SIGUSR1, SIGHUP].into_iter().filter(|signal| ignored & (1 << (signal - 1)) == 0);
        for signal in heard.clone() {
            let received = Arc::clone(&interrupts.received);
            interrupts.registered.push(signal_hook::flag::register_usize(signal, received, signal as usize)?);
        }
        DEAF.store(false, Ordering::SeqCst);
        // A handler once installed stays: this one does what the system would have done without any.
        let mut installed = Ok(());
        DEFAULTS.call_once(|| {
            installed = heard
                .clone()
                .try_for_each(|signal| signal_hook::flag::register_conditional_default(signal, &DEAF).map(drop));
        });
        installed.map(|()| interrupts)
    }

    /// The name of the signal that asked to stop.
    pub fn received(&self) -> Option<&'static str> {
        match self.received.load(Ordering::SeqCst) {
            0 => None,
            signal => Some(signal_hook::low_level::signal_name(signal as i32).unwrap_or("a signal")),
        }
    }

    /// Asks to stop, as `signal` would.
    #[cfg(test)]
    pub fn raise(&self, signal: i32) {
        self.received.store(signal as usize, Ordering::SeqCst);
    }

    /// Another handle on the same request.
    #[cfg(test)]
    pub fn share(&self) -> Self {
        Self { received: Arc::clone(&self.received), registered: Vec::new() }
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        for id in self.registered.drain(..) {
            DEAF.store(true, Ordering::SeqCst);
            signal_hook::low_level::unregister(id);
        }
    }
}

/// The mask of signals this process ignores; empty where the system does not say.
fn ignored_signals() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_noted_and_a_second_one_does_no_harm() {
        // SIGUSR1 only: the test runner itself may be sent the others.
        let interrupts = Interrupts::listen().unwrap();
        assert_eq!(interrupts.received(), None);
        signal_hook::low_level::raise(SIGUSR1).unwrap();
        assert_eq!(interrupts.received(), Some("SIGUSR1"));
        signal_hook::low_level::raise(SIGUSR1).unwrap();
        assert_eq!(interrupts.received(), Some("SIGUSR1"));
    }

    #[test]
    fn a_program_started_to_ignore_a_signal_is_seen() {
        // Rust's own runtime ignores SIGPIPE.
        assert_ne!(ignored_signals() & (1 << (libc::SIGPIPE - 1)), 0);
    }
}
