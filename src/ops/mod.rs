//! Differentiable operations with hand-written backward, each beside its slow twin.
