//! The trainer: steps, schedule, state, metrics.
