//! Choosing a device by name.

use burn::tensor::Device;

use crate::error::{Error, Result};

/// The device called `name`: `flex` (CPU), `wgpu`, `vulkan` or `cuda`, as far as compiled in; `default` is the first of
/// cuda, vulkan, wgpu, flex that is.
///
/// # Errors
/// [`Error::Device`] for an unknown name, or one whose feature is off.
///
/// ```
/// # #[cfg(feature = "flex")]
/// assert!(moe_core::device::device("flex").is_ok());
/// assert!(moe_core::device::device("abacus").is_err());
/// ```
pub fn device(name: &str) -> Result<Device> {
    let all: [(&str, Option<Device>); 4] = [("cuda", cuda()), ("vulkan", vulkan()), ("wgpu", wgpu()), ("flex", flex())];
    let available = || {
        let names: Vec<&str> = all.iter().filter(|(_, device)| device.is_some()).map(|(name, _)| *name).collect();
        if names.is_empty() { "none".to_owned() } else { names.join(", ") }
    };
    let found = match name {
        "default" => all.iter().find_map(|(_, device)| device.clone()),
        _ => match all.iter().find(|(known, _)| *known == name) {
            Some((_, device)) => device.clone(),
            None => {
                return Err(Error::Device { name: name.into(), reason: "unknown".into(), available: available() });
            }
        },
    };
    found.ok_or_else(|| Error::Device { name: name.into(), reason: "not compiled in".into(), available: available() })
}

fn flex() -> Option<Device> {
    #[cfg(feature = "flex")]
    return Some(Device::flex());
    #[cfg(not(feature = "flex"))]
    None
}

fn wgpu() -> Option<Device> {
    #[cfg(feature = "wgpu")]
    return Some(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice));
    #[cfg(not(feature = "wgpu"))]
    None
}

fn vulkan() -> Option<Device> {
    #[cfg(feature = "vulkan")]
    return Some(Device::vulkan(burn::tensor::DeviceKind::DefaultDevice));
    #[cfg(not(feature = "vulkan"))]
    None
}

fn cuda() -> Option<Device> {
    #[cfg(feature = "cuda")]
    return Some(Device::cuda(0));
    #[cfg(not(feature = "cuda"))]
    None
}
