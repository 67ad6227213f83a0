//! Mixture-of-Experts checkpoints on disk.
