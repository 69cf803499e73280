//! Stored forms of quantised weights.
