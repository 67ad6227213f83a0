//! `cargo xtask <verb>`: the checks and reports people and CI run.
fn main() {}
