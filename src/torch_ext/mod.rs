//! The few libtorch entry points tch lacks: one small C++ file and its safe Rust face.
