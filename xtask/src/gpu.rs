//! Tests on a GPU backend, in a target directory of their own: the backend compiles for a quarter of an hour.

use std::process::Command;

use crate::{Result, root};

/// Runs the tests that compare a GPU device with the CPU: models in moe-core, scores in moe-importance. `device` is
/// `wgpu`, `vulkan` or `cuda`. On Mesa 22's software Vulkan take `wgpu`: that driver crashes on the SPIR-V of `vulkan`.
pub fn run(device: &str) -> Result<()> {
    let status = Command::new("cargo")
        .args(["test", "--release", "--package", "moe-core", "--package", "moe-importance", "--features"])
        .arg(format!("moe-core/{device},moe-importance/{device}"))
        .args(["--test", "gpu", "--"])
        // software drivers compile shaders on all cores already
        .arg("--test-threads=1")
        .current_dir(root())
        .env("CARGO_TARGET_DIR", root().join("target-gpu"))
        .env("MOE_GPU_DEVICE", device)
        .status()
        .map_err(|error| format!("cargo: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("the tests on {device} failed").into()) }
}
