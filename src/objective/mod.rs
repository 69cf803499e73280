//! What is learned.
