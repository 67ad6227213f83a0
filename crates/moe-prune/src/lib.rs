//! Pruning plans.
