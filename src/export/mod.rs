//! What is written: PEFT adapters, merged models, the manifest.
