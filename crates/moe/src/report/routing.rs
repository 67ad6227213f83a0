//! Which experts tokens go to.

use moe_core::Model;
use moe_core::data::Wave;
use moe_importance::Calibration;
use moe_importance::statistics::ROUTED_TOKENS;

use super::ByExpert;
use crate::Result;

/// Tokens that chose each expert, layer by layer, from a forward pass over `waves`. Nothing behind the last router is
/// computed.
///
/// # Errors
/// Whatever stops the model.
pub fn routing(model: &Model, waves: &[Wave]) -> Result<ByExpert> {
    let statistics = Calibration::of_waves(model, waves).statistics([ROUTED_TOKENS]).run(&mut |_| ())?;
    let layers = model.checkpoint().shape().layers.iter().map(|layer| layer.layer);
    layers.map(|layer| Ok((layer, statistics.expert(ROUTED_TOKENS.as_str(), layer)?.to_vec()))).collect()
}
