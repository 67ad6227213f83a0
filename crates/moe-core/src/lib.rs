//! Mixture-of-Experts decoder models on Burn.
