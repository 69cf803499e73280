//! Who gets an adapter, what it is, how it starts, is loaded and merged.
