//! The trainer: steps, schedule, state, metrics.
//!
//! [`RunFolder`] locks the output folder, [`Trainer`] steps through the data and says how it went in an [`Outcome`].
//! A run is a function of its recipe, data, base and device: dropout is drawn from the seed and the step, so a
//! [`State`] holds no random generator and a resumed run equals the one that was never stopped, bit for bit.

mod cut;
mod device;
mod disk;
mod folder;
mod ledger;
mod machines;
mod memory;
mod meter;
mod metrics;
mod optimizer;
mod outcome;
mod page;
mod progress;
mod report;
mod scaler;
mod schedule;
mod signals;
mod source;
pub mod speed;
mod state;
mod tensorboard;
mod trainer;

pub use cut::Cut;
pub use device::device_name;
pub use folder::{RunFolder, Start};
pub use ledger::{Best, Chosen, Identity, Ledger, LossSum};
pub use machines::{CARDS, Card, measured};
pub use memory::{
    Choice, MemoryPlan, Planned, RunMemory, Step, Wish, advice, budget, caches_dequantised, choices, choose, divisors,
    free_bytes, overhead, refuse_what_does_not_fit, sizes,
};
pub use meter::{Energy, Meter};
pub use metrics::{EvalRecord, Event, Events, Metrics, StepRecord, memory_bytes, peak_memory_bytes};
pub use optimizer::{Optimizer, bytes_of_state, restore};
pub use outcome::Outcome;
pub use page::Page;
pub use progress::Progress;
pub use report::curves;
pub use scaler::Scaler;
pub use schedule::Schedule;
pub use signals::Interrupts;
pub use source::{BatchSource, Datasets, MicroBatches};
pub use state::{State, States};
pub use trainer::{Run, Trainer};
